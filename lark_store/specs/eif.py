"""Options of measured influence (EIF)."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING, TypedDict

from lark_store.errors import InputError
from lark_store.specs.compute import Compute
from lark_store.specs.option import option

if TYPE_CHECKING:
    from collections.abc import Sequence

_OPTIMIZERS = ("sgd", "adamw")


@dataclass(frozen=True, kw_only=True)
class EifSpec:
    """A measurement of the influence of a source's samples on queries; see `Store.eif`."""

    checkpoint: str
    source: str
    compute: Compute = field(default_factory=Compute)
    queries: str | None = option(
        None, flags="--queries -q", metavar="NAME", help="The queries' source (default: the only one of stage `query`)."
    )
    variant: str = option("chatml", flags="--variant -v", metavar="NAME", help="The samples' format variant.")
    query_variant: str | None = option(
        None, metavar="NAME", help="The queries' format variant (default: the samples')."
    )
    max_samples: int | None = option(None, help="Use only N samples, drawn at random as in `evaluate`.")
    max_queries: int | None = option(None, help="Use only the first N queries.")
    seed: int = option(0, help="Seed of the draw of samples.")
    by_draw: bool = option(
        False, help="Measure each draw of a domain alone: samples and queries with one `draw` in their metadata."
    )
    in_context: bool = option(False, help="Put the sample before the query instead of training on it.")
    optimizer: str = option("sgd", help="`sgd` or `adamw` (without weight decay), with a new state for each sample.")
    learning_rate: float = option(1e-4, help="The learning rate; `--sweep` finds one.")
    steps: int = option(1, help="Steps on each sample.")
    sweep: str | None = option(
        None, metavar="LOW:HIGH", help="Measure at learning rates from LOW to HIGH, two per decade; name the plateau."
    )
    plan: bool = option(False, help="Only count the forward and backward passes.")

    def __post_init__(self) -> None:
        if self.optimizer not in _OPTIMIZERS:
            raise InputError(f"unknown optimizer `{self.optimizer}`", "the optimizers are `sgd` and `adamw`")
        if not 0 < self.learning_rate < inf:
            raise InputError(f"the learning rate {self.learning_rate} is not a positive number", "for example `1e-3`")
        if self.steps < 1:
            raise InputError(f"`--steps` must be at least 1, not {self.steps}", "the default is 1")
        for name, n in (("samples", self.max_samples), ("queries", self.max_queries)):
            if n is not None and n < 1:
                raise InputError(f"`--max-{name}` must be at least 1, not {n}", f"leave it out to use all {name}")
        if self.in_context and self.sweep is not None:
            raise InputError("in context there is no learning rate", "leave `--sweep` or `--in-context` out")
        _ = self.rates  # parses the sweep

    @property
    def rates(self) -> list[float | None]:
        """The learning rates to measure at; None in context.

        >>> EifSpec(checkpoint="base", source="s", sweep="1e-4:1e-3").rates
        [0.0001, 0.000316228, 0.001]
        """
        if self.in_context:
            return [None]
        if self.sweep is None:
            return [self.learning_rate]
        from math import log10

        try:
            low, high = (float(text) for text in self.sweep.split(":"))
        except ValueError as error:
            raise InputError(f"`--sweep {self.sweep}` is not LOW:HIGH", "for example `--sweep 1e-6:1e-2`") from error
        if not 0 < low < high < inf:
            raise InputError(f"`--sweep {self.sweep}` is no range of learning rates", "for example `--sweep 1e-6:1e-2`")
        n = max(1, round(2 * log10(high / low)))
        return [float(f"{low * (high / low) ** (i / n):.6g}") for i in range(n + 1)]


@dataclass(frozen=True, kw_only=True)
class EifReportSpec:
    """Stored measurements to report on; see `Store.eif_report`."""

    sources: Sequence[str] = option(
        (), flags="--source -s", metavar="NAME", help="A domain's source; repeatable (default: all measured by draw)."
    )
    optimizer: str | None = option(None, help="Only measurements by this optimizer, and those in context.")
    learning_rate: float | None = option(None, help="Only measurements at this learning rate, and those in context.")


class EifOptions(TypedDict, total=False):
    """The keywords of `Store.eif`."""

    queries: str | None
    variant: str
    query_variant: str | None
    max_samples: int | None
    max_queries: int | None
    seed: int
    by_draw: bool
    in_context: bool
    optimizer: str
    learning_rate: float
    steps: int
    sweep: str | None
    plan: bool
    device: str
    precision: str
    attention: str
    batch_tokens: int | None


class EifReportOptions(TypedDict, total=False):
    """The keywords of `Store.eif_report`."""

    sources: Sequence[str]
    optimizer: str | None
    learning_rate: float | None
