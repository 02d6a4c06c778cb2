"""Add gradients to sketches.

Shape letters: S samples, P coordinates of a parameter, N those of a stretch, T tokens, H the width of a row, K bins.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from lark_store.gradients.corrections import Corrector
from lark_store.gradients.sketch.kernels import kernel_for
from lark_store.gradients.sketch.oporp import LANES

if TYPE_CHECKING:
    from lark_store.gradients.sketch.oporp import Oporp
    from lark_store.gradients.sketch.placement import Placement


class GradientSketcher:
    """Adds gradients to sketches, parameter by parameter, for several samples at once.

    Gradients are (S, P), stretches from a chunk boundary, or single rows of an embedding. Callers apply `corrector`
    first; the default one changes nothing.
    """

    def __init__(
        self, oporp: Oporp, placements: list[Placement], device: torch.device, corrector: Corrector | None = None
    ) -> None:
        self.oporp = oporp
        self.corrector = corrector or Corrector()
        self.device = device
        self.placements = {p.name: p for p in placements}
        self.kernel = kernel_for(oporp, device)
        self.together = device.type == "cuda"  # one product over all samples is faster
        self._scratch: torch.Tensor | None = None

    def new(self, n: int = 1) -> torch.Tensor:
        """Return accumulators for `n` sketches; `finish` converts them."""
        return self.kernel.new(n)

    def finish(self, out: torch.Tensor) -> torch.Tensor:
        """Return the sketches, (S, K) float32."""
        return self.kernel.finish(out)

    def add(self, name: str, gradient_SN: torch.Tensor, out: torch.Tensor, chunk: int = 0) -> None:
        """Add a parameter's coordinates, (S, N), from its chunk `chunk`, to the sketches `out`."""
        self.kernel.add(gradient_SN, self.placements[name].first_chunk + chunk, out)

    def add_rows(self, name: str, index_T: torch.Tensor, values_TH: torch.Tensor, out: torch.Tensor, s: int) -> None:
        """Add values (T, H) for rows `index_T` of a parameter to sketch `s`; repeated rows add up.

        The cost depends on T·H, not on the size of the parameter.
        """
        n_rows, width = values_TH.shape
        start_T = index_T * width
        before = LANES - 1 if width % LANES else 0  # offset of a row in its run: any, or always 0
        wide = -(-(before + width) // LANES)
        runs = values_TH.new_zeros(n_rows, wide * LANES, dtype=torch.float32)
        place = (start_T % LANES)[:, None] + torch.arange(width, device=self.device)
        runs.scatter_(1, place, values_TH.float())
        run_TW = (start_T // LANES)[:, None] + torch.arange(wide, device=self.device)
        first = self.placements[name].first_chunk * self.oporp.rows
        row, lane, sign = self.oporp.codes_of(run_TW.flatten() + first)
        moved = runs.view(-1, LANES).gather(1, self._lanes ^ lane[:, None])
        bit = torch.where(self._lanes < 32, sign[:, :1] >> self._lanes, sign[:, 1:] >> (self._lanes - 32)) & 1
        moved *= 1 - 2 * bit
        bins = out.view(-1, *out.shape[-2:])[0, s].view(self.oporp.rows, LANES)
        if self.device.type == "cuda":
            bins.index_put_((row,), moved, accumulate=True)  # sorts first: reproducible bytes
        else:
            bins.index_add_(0, row, moved)

    def scratch(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return reused memory for a stretch: fresh pages cost as much as the sketch itself."""
        count = math.prod(shape)
        if self._scratch is None or self._scratch.numel() < count or self._scratch.dtype != dtype:
            self._scratch = torch.empty(count, dtype=dtype, device=self.device)
        return self._scratch[:count].view(shape)

    @cached_property
    def _lanes(self) -> torch.Tensor:
        return torch.arange(LANES, device=self.device)
