"""Names of the tensors in weight files: prefixes of wrapped models, and traces of quantisation. Loads no torch."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

# DistributedDataParallel and DataParallel put `module.` first; torch.compile puts `_orig_mod.` before what it compiled.
PREFIXES = (r"^(?:(?:module|_orig_mod)\.)+", r"(?<=\.)_orig_mod\.")
_PATTERN = re.compile("|".join(PREFIXES))
# Tensors that libraries store beside quantised weights, or instead of them.
_QUANTISED = {
    "bitsandbytes": re.compile(r"\.(SCB|weight_format|absmax|quant_map|nested_absmax|quant_state\..+)$"),
    "GPTQ or AWQ": re.compile(r"\.(qweight|qzeros|g_idx)$"),
    "FP8": re.compile(r"\.weight_scale_inv$"),
    "MXFP4": re.compile(r"\.experts\..*_(blocks|scales)$"),
}


def plain_name(key: str) -> str:
    """Return a tensor's name without the prefixes of wrapped models.

    >>> plain_name("module._orig_mod.model.layers.0.weight"), plain_name("model.layers.0._orig_mod.mlp.weight")
    ('model.layers.0.weight', 'model.layers.0.mlp.weight')
    """
    return _PATTERN.sub("", key)


def wrapped(keys: Iterable[str]) -> list[str]:
    """Return the names with a prefix of a wrapped model."""
    return [key for key in keys if plain_name(key) != key]


def quantisation(keys: Iterable[str]) -> tuple[str, str] | None:
    """Return the quantisation that the tensors' names show, and one such name; None for full-precision weights."""
    listed = list(keys)
    for name, pattern in _QUANTISED.items():
        first = next((key for key in listed if pattern.search(key)), None)
        if first is not None:
            return name, first
    return None


def tensor_names(paths: Iterable[Path]) -> list[str]:
    """Return the names of the tensors in .safetensors files; unreadable files have none, loading reports them."""
    names: list[str] = []
    for path in paths:
        names += _names(path) or []
    return names


def truncated(paths: Iterable[Path]) -> Path | None:
    """Return the first .safetensors file that is incomplete, for example because it is still being written."""
    return next((path for path in paths if _names(path) is None), None)


def _names(path: Path) -> list[str] | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as content:
            return list(content.keys())
    except (OSError, SafetensorError):
        return None
