"""Sketch kernels, one per kind of device, behind one interface.

A *kernel* adds stretches of gradients to sketches. Every bin collects its values chunk by chunk, so writes never
collide and equal gradients give equal bytes. The codes of the map are computed once for all samples of a stretch and
not stored.

Shape letters: S samples, N coordinates of the stretch, K bins, Z partial sums (GPU).
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from lark_store.gradients.sketch.oporp import Oporp


class Kernel(Protocol):
    """Adds gradients to sketches with one map, on one device."""

    def new(self, n: int) -> torch.Tensor:
        """Return accumulators for `n` sketches: float32 zeros, (S, K) or (Z, S, K)."""
        ...

    def add(self, gradient_SN: torch.Tensor, first_chunk: int, out: torch.Tensor) -> None:
        """Add stretches that start at chunk `first_chunk` to `out`; the last chunk may be partial.

        `gradient_SN` is float32, bfloat16 or float16, contiguous in its last dimension.
        """
        ...

    def finish(self, out: torch.Tensor) -> torch.Tensor:
        """Return the sketches, (S, K) float32."""
        ...


def kernel_for(oporp: Oporp, device: torch.device) -> Kernel:
    """Return the fastest kernel for a device: numba on a CPU, Triton on CUDA, plain torch elsewhere."""
    if device.type == "cpu":
        from lark_store.gradients.sketch.kernels.cpu import CpuKernel

        return CpuKernel(oporp)
    if device.type == "cuda" and torch.version.hip is None and find_spec("triton"):
        from lark_store.gradients.sketch.kernels.gpu import GpuKernel

        return GpuKernel(oporp, device)
    from lark_store.gradients.sketch.kernels.torch_ops import PlainKernel

    return PlainKernel(oporp, device)
