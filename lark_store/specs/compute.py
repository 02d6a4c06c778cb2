"""Options of a computation: device, precision, memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

from lark_store.specs.option import option


@dataclass(frozen=True, kw_only=True)
class Compute:
    """Where and how to compute."""

    device: str = option("auto", help="`auto`, `cpu`, `cuda` or `mps`.")
    precision: str = option(
        "auto", help="Precision of the model: `float32`, `bfloat16` or `auto` (as saved on CUDA, else float32)."
    )
    attention: str = option(
        "auto", help="Attention of the model: `eager`, `sdpa` or `auto` (the config's, if this machine has it)."
    )
    batch_tokens: int | None = option(
        None, metavar="N", help="Tokens per batch, padding included (default: 1,024 on a CPU, 8,192 on CUDA)."
    )
    gradient_checkpointing: bool = option(False, help="Use less memory and more time.")
    memory: int = option(1 << 30, metavar="MIB", unit=1 << 20, help="Memory for queries and for `whitened`, in MiB.")


class ComputeOptions(TypedDict, total=False):
    """How to run a model, as keywords."""

    device: str
    precision: str
    attention: str
    batch_tokens: int | None
    gradient_checkpointing: bool
