"""Weight gradients, as products of two factors, into sketches, without building whole gradients.

Shape letters: B samples, T tokens, S pairs of a token and its expert, E experts, L and R left and right factor of a
product, H the model's width.
"""

from __future__ import annotations

import math
from itertools import accumulate, chain, groupby
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lark_store.gradients.sketch.accumulate import GradientSketcher

# Weight-gradient coordinates of all samples in memory at a time, 32 MB: of bfloat16 on CUDA, within an L2 cache (50 MB
# on an H100); elsewhere of float32, small beside the activations.
_HELD, _HELD_CUDA = 1 << 23, 1 << 24


def add_products(
    name: str,
    lefts: Sequence[torch.Tensor],
    rights: Sequence[torch.Tensor],
    sketcher: GradientSketcher,
    out: torch.Tensor,
) -> None:
    """Add each sample's leftᵀ · right, (L, R), a few rows at a time, without building whole gradients.

    If the correction needs whole gradients, build them a few samples at a time.
    """
    if sketcher.corrector.by_product:
        _add_whole(name, lefts, rights, sketcher, out)
        return
    left_TL = [sketcher.corrector.left(name, left.flatten(0, -2)) for left in lefts]
    right_TR = [sketcher.corrector.right(name, right.flatten(0, -2)) for right in rights]
    n, n_left, n_right = len(left_TL), left_TL[0].shape[1], right_TR[0].shape[1]
    step = _rows_at_once(n, n_right, sketcher)
    if sketcher.together:
        left_BTL, right_BTR = _stacked(left_TL, right_TR)
    for start in range(0, n_left, step):
        stop = min(start + step, n_left)
        stretch = sketcher.scratch((n, stop - start, n_right), left_TL[0].dtype)
        if sketcher.together:
            torch.bmm(left_BTL[:, :, start:stop].mT, right_BTR, out=stretch)
        else:
            for part, left, right in zip(stretch, left_TL, right_TR, strict=True):
                torch.mm(left[:, start:stop].T, right, out=part)
        sketcher.add(name, stretch.view(n, -1), out, chunk=start * n_right // sketcher.oporp.k)


def _add_whole(
    name: str,
    lefts: Sequence[torch.Tensor],
    rights: Sequence[torch.Tensor],
    sketcher: GradientSketcher,
    out: torch.Tensor,
) -> None:
    n, (n_left, n_right) = len(lefts), sketcher.placements[name].shape
    step = max(1, _HELD // (n_left * n_right))
    for start in range(0, n, step):
        stop = min(start + step, n)
        products = [
            sketcher.corrector.product(name, left.flatten(0, -2), right.flatten(0, -2))
            for left, right in zip(lefts[start:stop], rights[start:stop], strict=True)
        ]
        sketcher.add(name, torch.stack(products).view(stop - start, -1), out[..., start:stop, :])


def _stacked(left_TL: Sequence[torch.Tensor], right_TR: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad with zeros, for one product over all samples."""
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(list(left_TL), batch_first=True), pad(list(right_TR), batch_first=True)


def add_sums(name: str, terms: Sequence[torch.Tensor], sketcher: GradientSketcher, out: torch.Tensor) -> None:
    """Add each sample's sum over its tokens."""
    sums_BH = torch.stack([term.flatten(0, -2).sum(dim=0, dtype=torch.float32) for term in terms])
    sketcher.add(name, sketcher.corrector.vector(name, sums_BH), out)


def _rows_at_once(n: int, n_right: int, sketcher: GradientSketcher) -> int:
    """Return a number of rows of `n` samples' gradients that ends at a chunk boundary."""
    k = sketcher.oporp.k
    n_aligned = k // math.gcd(k, n_right)  # this many rows end at a chunk boundary
    held_at_once = _HELD_CUDA if sketcher.device.type == "cuda" else _HELD
    return max(1, held_at_once // (n * n_right * n_aligned)) * n_aligned


# --- stacks of matrices --------------------------------------------------------------------------------------------


class StackFactors:
    """Factors of a stack's gradients: left (S, L) and right (S, R), ordered by matrix, then by sample.

    `counts_EB` has the number of rows of each matrix and sample.
    """

    def __init__(self, left_SL: torch.Tensor, right_SR: torch.Tensor, counts_EB: list[list[int]]) -> None:
        self.left_SL, self.right_SR, self.counts_EB = left_SL, right_SR, counts_EB
        ends = list(accumulate(chain.from_iterable(counts_EB), initial=0))
        n = len(counts_EB[0])
        self._starts_EB = [ends[e * n : (e + 1) * n] for e in range(len(counts_EB))]
        self._padded: tuple[int, torch.Tensor, torch.Tensor] | None = None  # of the last matrix

    def multiply(self, e: int, rows: slice, samples: range, out_BLR: torch.Tensor, *, together: bool) -> None:
        """Write rows of a matrix's gradient for some samples; zero for a sample without tokens."""
        if together:
            left_BTL, right_BTR = self._pad(e)
            some = slice(samples.start, samples.stop)
            torch.bmm(left_BTL[some, :, rows].mT, right_BTR[some], out=out_BLR)
            return
        for b, product in zip(samples, out_BLR, strict=True):
            part = slice(self._starts_EB[e][b], self._starts_EB[e][b] + self.counts_EB[e][b])
            torch.mm(self.left_SL[part, rows].T, self.right_SR[part], out=product)

    def _pad(self, e: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a matrix's factors, padded with zeros, for one product over all samples."""
        if self._padded is None or self._padded[0] != e:
            device = self.left_SL.device
            start_B, count_B = (torch.tensor(values[e], device=device) for values in (self._starts_EB, self.counts_EB))
            step_T = torch.arange(max(self.counts_EB[e]), device=device)
            index_BT = (start_B[:, None] + step_T).clamp(max=len(self.left_SL) - 1)
            empty_BT = step_T >= count_B[:, None]
            left, right = (
                values[index_BT].masked_fill_(empty_BT[..., None], 0) for values in (self.left_SL, self.right_SR)
            )
            self._padded = (e, left, right)
        return self._padded[1:]


def add_stack(name: str, factors: StackFactors, sketcher: GradientSketcher, out: torch.Tensor) -> None:
    """Add a stack of matrices' gradients, (E, L, R), a few rows at a time, without building whole gradients.

    Samples without tokens for the matrices at hand are skipped.
    """
    counts_EB, n_left, n_right = factors.counts_EB, factors.left_SL.shape[1], factors.right_SR.shape[1]
    n, n_rows = len(counts_EB[0]), len(counts_EB) * n_left
    step = _rows_at_once(n, n_right, sketcher)
    for start in range(0, n_rows, step):
        stop = min(start + step, n_rows)
        matrices = range(start // n_left, -(-stop // n_left))
        for samples in runs([any(counts_EB[e][b] for e in matrices) for b in range(n)]):
            stretch = sketcher.scratch((len(samples), stop - start, n_right), factors.left_SL.dtype)
            for e in matrices:
                first, last = max(start, e * n_left), min(stop, (e + 1) * n_left)
                rows, part = slice(first - e * n_left, last - e * n_left), stretch[:, first - start : last - start]
                factors.multiply(e, rows, samples, part, together=sketcher.together)
            some = out[..., samples.start : samples.stop, :]
            sketcher.add(name, stretch.view(len(samples), -1), some, chunk=start * n_right // sketcher.oporp.k)


def runs(used: Sequence[bool]) -> Iterator[range]:
    """Return the runs of true values.

    >>> list(runs([True, True, False, True]))
    [range(0, 2), range(3, 4)]
    """
    start = 0
    for value, run in groupby(used):
        stop = start + len(list(run))
        if value:
            yield range(start, stop)
        start = stop
