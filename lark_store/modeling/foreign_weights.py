"""Weights that can't be read: shards of FSDP and DeepSpeed, pickles, quantised files. Each error names a way out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lark_store.errors import CheckpointError
from lark_store.modeling.weight_keys import quantisation, tensor_names

if TYPE_CHECKING:
    from pathlib import Path

_FULL = "gradients need the full-precision weights: add the checkpoint that was quantised"
_PICKLES = ("*.bin", "*.pt", "*.pth")
_NOT_WEIGHTS = (
    "optimizer",
    "scheduler",
    "training_args",
    "rng_state",
    "random_states",
    "scaler",
    "sampler",
    "dl_state",
)
_DEEPSPEED = ("zero_to_fp32.py", "global_step*/*_states.pt", "*/mp_rank_*_states.pt", "mp_rank_*_states.pt")


def unreadable_weights(folder: Path, path: str) -> CheckpointError | None:
    """Return the error for a folder without .safetensors weights, None if nothing in it is known.

    `path` is the folder's name in messages.
    """
    shards = next((match.parent for pattern in ("*.distcp", "*/*.distcp") for match in folder.glob(pattern)), None)
    if shards is not None:
        where = path if shards == folder else f"{path}/{shards.name}"
        return CheckpointError(
            f"`{path}` holds the shards of an FSDP training, not a whole model",
            f"merge them with `accelerate merge-weights {where} OUT`, then add `OUT` with `--config` and `--tokenizer`",
        )
    if any(True for pattern in _DEEPSPEED for _ in folder.glob(pattern)):
        return CheckpointError(
            f"`{path}` holds the shards of a DeepSpeed training, not a whole model",
            f"convert them with `python {path}/zero_to_fp32.py {path} OUT --safe_serialization`, then add `OUT` with "
            "`--config` and `--tokenizer`",
        )
    gguf = next(folder.glob("*.gguf"), None)
    if gguf is not None:
        return CheckpointError(f"`{path}` holds a GGUF file, `{gguf.name}`, which can't be trained", _FULL)
    pickles = [match.name for pattern in _PICKLES for match in folder.glob(pattern)]
    weights = sorted(name for name in pickles if not name.startswith(_NOT_WEIGHTS))
    if weights:
        return CheckpointError(
            f"`{path}` has no .safetensors file, only pickled weights: `{weights[0]}`",
            "pickled weights can run code and are never read; load them where you trust them and save the model with "
            "`save_pretrained`, or with accelerate's `safe_serialization=True`",
        )
    return None


def check_precision_kept(config: dict[str, Any], weights: list[Path], path: str) -> None:
    """Refuse quantised weights, by the config or by the names of their tensors.

    Raises
    ------
    CheckpointError
    """
    for part in (config, config.get("text_config")):
        settings = part.get("quantization_config") if isinstance(part, dict) else None
        if settings:
            method = settings.get("quant_method") if isinstance(settings, dict) else None
            raise CheckpointError(f"the weights of `{path}` are quantised ({method or 'unknown method'})", _FULL)
    traces = quantisation(tensor_names(weights))
    if traces is not None:
        raise CheckpointError(f"the weights of `{path}` are quantised ({traces[0]}): they have `{traces[1]}`", _FULL)
