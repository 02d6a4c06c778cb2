"""LoRA checkpoints: a folder of peft adapters that names its base model."""

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
_BASE_KEYS = ("base_model_name_or_path", "revision")  # location of the base; not hashed
_SETS = ("target_modules", "exclude_modules", "modules_to_save")  # unordered: peft writes them in any order
_PREFIX = "base_model.model."  # peft prepends it to parameter names
TRAINED = "lark_trained_parameters"  # model attribute: names of the trained parameters


@dataclass(frozen=True)
class Adapters:
    """Adapters in `folder`, their base model, and a hash of their config without the base's location."""

    folder: Path
    base: str
    revision: str | None
    config_sha256: str


def find_adapters(folder: Path) -> Adapters | None:
    """Find the adapters in a checkpoint folder; None for a plain model.

    Raises
    ------
    CheckpointError
        The adapters are unusable: not LoRA, no .safetensors weights or no base model.
    """
    path = folder / CONFIG
    if not path.is_file():
        return None
    try:
        config = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"`{path}` is not a JSON object", "save the adapters again with `save_pretrained`"
        ) from error
    kind = config.get("peft_type")
    if kind != "LORA" or config.get("alora_invocation_tokens"):
        raise CheckpointError(
            f"`{folder}` holds {'activated LoRA' if kind == 'LORA' else kind} adapters; only LoRA is supported",
            "merge the adapters into the base model, if their type allows it, and save the whole model",
        )
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(
            f"`{folder}` has {CONFIG} but no {WEIGHTS}",
            f"save the adapters with `save_pretrained`; if the model is merged, remove {CONFIG} from its folder",
        )
    base, revision = (config.pop(key, None) for key in _BASE_KEYS)
    if not base:
        raise CheckpointError(
            f"`{path}` names no base model", "set `base_model_name_or_path` to the base model's folder or hub name"
        )
    if not isinstance(base, str) or not isinstance(revision, str | None):
        raise CheckpointError(f"{_BASE_KEYS[0]} and revision in `{path}` must be strings", "save the adapters again")
    config |= {key: sorted(config[key], key=str) for key in _SETS if isinstance(config.get(key), list)}
    text = json.dumps(config, sort_keys=True)
    return Adapters(folder, base, revision, hashlib.sha256(text.encode()).hexdigest())


def attach_empty(model: torch.nn.Module, folder: Path) -> torch.nn.Module:
    """Attach adapters without weights to a model on the meta device."""
    config = _config(folder)
    config.init_lora_weights = False  # some initialisations need the base's weights
    return _unwrap(_wrap(model, config))


def attach(model: torch.nn.Module, folder: Path, *, widen: bool) -> torch.nn.Module:
    """Attach adapters with their weights; `widen` casts half-precision LoRA weights to float32, as in training.

    Raises
    ------
    CheckpointError
        The adapters' tensors do not match their config.
    """
    config = _config(folder)
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    tensors = load_file(folder / WEIGHTS)
    wrapped = _wrap(model, config, autocast_adapter_dtype=widen)
    subject = f"the adapters in `{folder}`"
    try:
        with warnings.catch_warnings(action="ignore"):
            outcome: Any = set_peft_model_state_dict(wrapped, tensors)
    except KeyError as error:  # a tensor of a fully trained module
        raise _missing_tensors(subject, [str(error.args[0])]) from error
    except RuntimeError as error:  # shape mismatch; the first line only names the class
        facts = [line.strip() for line in str(error).splitlines()]
        raise CheckpointError(
            f"{subject} do not fit their base model: {facts[min(1, len(facts) - 1)]}",
            "check that they were trained on this base; if its embeddings were resized, merge the adapters into the "
            "base and save the whole model",
        ) from error
    trained = {name for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    missing = sorted(trained & set(outcome.missing_keys))
    if missing:
        raise _missing_tensors(subject, missing)
    if outcome.unexpected_keys:
        raise CheckpointError(
            f"{subject} have {len(outcome.unexpected_keys)} tensors unknown to the model, "
            f"such as `{outcome.unexpected_keys[0]}`",
            f"check that {CONFIG} belongs to these weights",
        )
    return _unwrap(wrapped)


def _missing_tensors(subject: str, names: list[str]) -> CheckpointError:
    return CheckpointError(
        f"{subject} lack {len(names)} of their tensors, such as `{names[0].removeprefix(_PREFIX)}`",
        "save the complete adapters: random tensors in their place would give wrong gradients",
    )


def _config(folder: Path) -> Any:
    try:
        from peft import PeftConfig
    except ImportError as error:
        raise CheckpointError(
            f"`{folder}` holds LoRA adapters, but the peft library can't be imported: {error}",
            "install it with `pip install 'lark-store[lora]'`",
        ) from error
    config: Any = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = False  # marks the trained parameters with requires_grad
    return config


def _wrap(model: torch.nn.Module, config: Any, **options: Any) -> Any:
    from peft import PeftModel

    with warnings.catch_warnings(action="ignore"):  # about merging and tied embeddings
        return PeftModel(model, config, **options)


def _unwrap(wrapped: Any) -> torch.nn.Module:
    """Return the model with adapters in place and its own `forward`, config and parameter names."""
    model: torch.nn.Module = wrapped.get_base_model()
    names = frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    setattr(model, TRAINED, names)
    return model
