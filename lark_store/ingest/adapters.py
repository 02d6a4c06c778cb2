"""LoRA checkpoints: a folder of adapters made by the peft library, on a base model that lies elsewhere."""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lark_store.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

    import torch

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PLACE = ("base_model_name_or_path", "revision")  # where the base is: not what the adapters are
_SETS = ("target_modules", "exclude_modules", "modules_to_save")  # peft writes them in any order
_PREFIX = "base_model.model."  # peft's, before the names of the model's own parameters
TRAINED = "lark_trained_parameters"  # an attribute of the model: the names of what was trained


@dataclass(frozen=True)
class Adapters:
    """Adapters in `folder`, the base model they need, and a hash of their config that holds wherever the base is."""

    folder: Path
    base: str
    revision: str | None
    config_sha256: str


def find_adapters(folder: Path) -> Adapters | None:
    """Return the adapters in a checkpoint's folder, None if it holds a plain model.

    Raises
    ------
    CheckpointError
        There are adapters that can't be used: without .safetensors weights, without a base, or not LoRA.
    """
    path = folder / CONFIG
    if not path.is_file():
        return None
    try:
        config = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"`{path}` is no JSON object", "save the adapters again with `save_pretrained`"
        ) from error
    kind = config.get("peft_type")
    if kind != "LORA" or config.get("alora_invocation_tokens"):
        raise CheckpointError(
            f"`{folder}` holds adapters of the type {'activated LoRA' if kind == 'LORA' else kind}, not LoRA",
            "merge them into the base model and save it whole, if they can be merged",
        )
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(
            f"`{folder}` has {CONFIG} but no {WEIGHTS}",
            f"save the adapters with `save_pretrained`; for a merged model, take {CONFIG} out of its folder",
        )
    base, revision = (config.pop(key, None) for key in _PLACE)
    if not base:
        raise CheckpointError(
            f"`{path}` names no base model", "set its `base_model_name_or_path` to the base's folder or hub name"
        )
    if not isinstance(base, str) or not isinstance(revision, str | None):
        raise CheckpointError(f"in `{path}`, {_PLACE[0]} and revision are no texts", "save the adapters again")
    config |= {key: sorted(config[key], key=str) for key in _SETS if isinstance(config.get(key), list)}
    text = json.dumps(config, sort_keys=True)
    return Adapters(folder, base, revision, hashlib.sha256(text.encode()).hexdigest())


def attach_empty(model: torch.nn.Module, folder: Path) -> torch.nn.Module:
    """Put adapters without weights on a model on the meta device."""
    config = _config(folder)
    config.init_lora_weights = False  # some ways to start need the base's weights; shapes are the same
    return _unwrap(_wrap(model, config))


def attach(model: torch.nn.Module, folder: Path, *, widen: bool) -> torch.nn.Module:
    """Put adapters with their weights on a model; `widen` makes half-precision LoRA weights float32, as in training.

    Raises
    ------
    CheckpointError
        The adapters' tensors are not those that their config asks for.
    """
    config = _config(folder)
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    tensors = load_file(folder / WEIGHTS)
    wrapped = _wrap(model, config, autocast_adapter_dtype=widen)
    found = f"the adapters in `{folder}`"
    try:
        with warnings.catch_warnings(action="ignore"):
            outcome: Any = set_peft_model_state_dict(wrapped, tensors)
    except KeyError as error:  # of a module that was trained whole
        raise _lacking(found, [str(error.args[0])]) from error
    except RuntimeError as error:  # other shapes; its first line names the class alone
        facts = [line.strip() for line in str(error).splitlines()]
        raise CheckpointError(
            f"{found} do not fit their base model: {facts[min(1, len(facts) - 1)]}",
            "is it the base that they were trained on? if its embeddings were resized, merge the adapters into the "
            "base and save it whole",
        ) from error
    trained = {name for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    missing = sorted(trained & set(outcome.missing_keys))
    if missing:
        raise _lacking(found, missing)
    if outcome.unexpected_keys:
        raise CheckpointError(
            f"{found} have {len(outcome.unexpected_keys)} tensors that the model has no place for, "
            f"such as `{outcome.unexpected_keys[0]}`",
            f"does their {CONFIG} belong to them?",
        )
    return _unwrap(wrapped)


def _lacking(found: str, names: list[str]) -> CheckpointError:
    return CheckpointError(
        f"{found} lack {len(names)} of their tensors, such as `{names[0].removeprefix(_PREFIX)}`",
        "adapters with random tensors would give wrong gradients; save them whole",
    )


def _config(folder: Path) -> Any:
    try:
        from peft import PeftConfig
    except ImportError as error:
        raise CheckpointError(
            f"`{folder}` holds LoRA adapters, and the peft library can't be imported: {error}",
            "pip install 'lark-store[lora]'",
        ) from error
    config: Any = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = False  # so that what was trained is marked
    return config


def _wrap(model: torch.nn.Module, config: Any, **options: Any) -> Any:
    from peft import PeftModel

    with warnings.catch_warnings(action="ignore"):  # on merging and tied embeddings
        return PeftModel(model, config, **options)


def _unwrap(wrapped: Any) -> torch.nn.Module:
    """Return the model itself, adapters in place: its own `forward`, config and parameter names."""
    model: torch.nn.Module = wrapped.get_base_model()
    names = frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    setattr(model, TRAINED, names)
    return model
