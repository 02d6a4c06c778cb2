"""The arithmetic of the sketch on each kind of device, in one form.

A *kernel* adds stretches of gradients to sketches in gather form: every place of the sketch collects what comes to it,
chunk after chunk, so no two writes meet and the same gradients always give the same bytes. The codes of the map are
worked out once for all samples of a stretch, on the way, and nothing is stored.

Shape letters: S samples, N coordinates of the stretch, K bins, Z partial sums (GPU).
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from lark_store.ingest.oporp import Oporp


class Kernel(Protocol):
    """Adds gradients to sketches under one map, on one device."""

    def new(self, n: int) -> torch.Tensor:
        """Return what `n` empty sketches are summed in: float32, (S, K) or (Z, S, K)."""
        ...

    def add(self, gradient_SN: torch.Tensor, first_chunk: int, out: torch.Tensor) -> None:
        """Add to `out` the stretches that start at chunk `first_chunk`; the last chunk may be a partial one.

        `gradient_SN` is float32, bfloat16 or float16, contiguous in its last dimension.
        """
        ...

    def finish(self, out: torch.Tensor) -> torch.Tensor:
        """Return the sketches, (S, K) float32."""
        ...


def kernel_for(oporp: Oporp, device: torch.device) -> Kernel:
    """Return the fastest kernel for a device: numba on a CPU, Triton on CUDA, plain torch elsewhere."""
    if device.type == "cpu":
        from lark_store.ingest.kernels.cpu import CpuKernel

        return CpuKernel(oporp)
    if device.type == "cuda" and torch.version.hip is None and find_spec("triton"):
        from lark_store.ingest.kernels.gpu import GpuKernel

        return GpuKernel(oporp, device)
    from lark_store.ingest.kernels.plain import PlainKernel

    return PlainKernel(oporp, device)
