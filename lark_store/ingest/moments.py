"""Second moments of gradients, measured: means over samples of their own squared gradients.

One sample at a time through the hooks, which works for any model and holds one parameter's gradient at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lark_store.ingest.corrections import Corrector, Moments
from lark_store.ingest.gradients import HookPath, choose_parameters
from lark_store.ingest.variants import UnusableSampleError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lark_store.ingest.gradients import Chosen
    from lark_store.ingest.variants import Tokens

ROWS, COLUMNS = "rows", "columns"  # what a tensor is called after its parameter


def tensors_of(moments: Mapping[str, Moments]) -> dict[str, torch.Tensor]:
    """Return second moments as tensors by name, the means in the type that they have."""
    tensors = {}
    for name, each in moments.items():
        tensors[f"{name}/{ROWS}"] = each.rows
        if each.columns is not None:
            tensors[f"{name}/{COLUMNS}"] = each.columns
    return tensors


def moments_in(tensors: Mapping[str, torch.Tensor]) -> dict[str, Moments]:
    """Return second moments from tensors by name, in float64."""
    names = {key.rpartition("/")[0] for key in tensors}
    return {name: Moments(tensors[f"{name}/{ROWS}"], tensors.get(f"{name}/{COLUMNS}")).wide() for name in names}


class MomentSums:
    """Sums samples' squared gradients, over rows and columns; a sample counts once it is committed."""

    def __init__(self, chosen: Chosen, device: torch.device) -> None:
        self.device, self.corrector = device, Corrector()
        self.n = 0
        self._shapes = {name: tuple(p.shape) for name, p in chosen}
        self._sums: dict[str, Moments] = {}
        self._sample: dict[str, Moments] = {}

    def new(self) -> torch.Tensor:
        """Return what the sum of a sample's squares is added up in, (1,), and begin a sample."""
        return torch.zeros(1, dtype=torch.float64, device=self.device)

    def add(self, name: str, gradient_SN: torch.Tensor, out: torch.Tensor) -> None:
        """Take a parameter's whole gradient, (1, P)."""
        squares = gradient_SN.view(self._shapes[name]).float().square()
        out += squares.sum(dtype=torch.float64)
        self._sample[name] = Moments.of(squares)

    def finish(self, out: torch.Tensor) -> torch.Tensor:
        """Return the gradient's norm, (1, 1)."""
        return out.sqrt().view(1, 1)

    def commit(self, *, keep: bool) -> None:
        """Add the sample to the sums, or drop it."""
        sample, self._sample = self._sample, {}
        if not keep:
            return
        self.n += 1
        for name, each in sample.items():
            held = self._sums.get(name)
            self._sums[name] = each if held is None else held.plus(each)

    def sums(self) -> dict[str, Moments]:
        """Return the sums over the samples; what never had a gradient is not there."""
        return self._sums

    def restore(self, sums: dict[str, Moments], n: int) -> None:
        """Go on from sums over `n` samples."""
        self.n = n
        self._sums = {
            name: Moments(each.rows.to(self.device), None if each.columns is None else each.columns.to(self.device))
            for name, each in sums.items()
        }

    def means(self) -> dict[str, Moments]:
        """Return the means over the samples, on the CPU; zero for a parameter that never had a gradient."""
        empty = {name: Moments.of(torch.zeros(shape)) for name, shape in self._shapes.items() if name not in self._sums}
        return {name: each.over(self.n) for name, each in self._sums.items()} | empty


class MomentPass:
    """The one pass over the samples that second moments take."""

    what = "second moments"

    def __init__(self, model: Any, device: torch.device, before: object = None) -> None:  # noqa: ARG002
        chosen = choose_parameters(model, None, None)
        self._taker = MomentSums(chosen, device)
        self._path = HookPath(model, chosen, self._taker)

    @property
    def n(self) -> int:
        """The samples that count."""
        return self._taker.n

    @property
    def sums(self) -> dict[str, torch.Tensor]:
        """What a draft keeps."""
        return tensors_of(self._taker.sums())

    def take(self, tokens: Tokens, seed: int) -> None:  # noqa: ARG002
        """Add a sample, all of it or, if that raises UnusableSampleError, nothing."""
        made = self._path.sketch([tokens])[0]
        self._taker.commit(keep=not isinstance(made, UnusableSampleError))
        if isinstance(made, UnusableSampleError):
            raise made

    def restore(self, sums: dict[str, torch.Tensor], n: int) -> None:
        """Go on from what a fit had summed before."""
        self._taker.restore(moments_in(sums), n)

    def result(self) -> dict[str, torch.Tensor]:
        """Return the means as tensors, on the CPU."""
        return tensors_of(self._taker.means())

    def close(self) -> None:
        """Let go of the model."""
        self._path.close()
