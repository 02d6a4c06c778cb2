"""Options of the events of facts and of their survival analysis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

from lark_store.specs.option import option

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, kw_only=True)
class EventsSpec:
    """Which facts to follow over which checkpoints, and what counts as an event. See `Store.survival`."""

    source: str | None = option(
        None, flags="--source -s", metavar="NAME", help="The source of facts, if several were probed."
    )
    variant: str | None = option(
        None, flags="--variant -v", metavar="NAME", help="Their format variant, if they were probed in several."
    )
    checkpoints: Sequence[str] = option(
        (), flags="--checkpoint -c", metavar="NAME", help="A checkpoint to follow; repeatable (default: all probed)."
    )
    baseline: str | None = option(
        None, metavar="NAME", help="The checkpoint to start from (default: that of the lowest epoch)."
    )
    rule: str = option("first", help="When an event counts: the `first` time, or `stable`, twice in a row.")
    seen_in: str | None = option(
        None, metavar="NAME", help="The source that was trained on: its facts are seen, the others withheld."
    )
    seen_key: str = option("seen", metavar="KEY", help="Without `--seen-in`: the metadata key that marks seen facts.")


@dataclass(frozen=True, kw_only=True)
class SurvivalSpec(EventsSpec):
    """A survival analysis. See `Store.survival`."""

    event: str = option("acquisition", help="`acquisition`, `generalisation`, `learning` (both) or `degradation`.")
    by: str | None = option(
        None, metavar="KEY", help="Curves by `latent`, `seen` or a metadata key (default: `latent` if it is known)."
    )
    covariates: Sequence[str] = option(
        (),
        flags="--covariate -x",
        metavar="NAME",
        help="`latent`, `p`, `logprob`, `n_tokens`, `seen`, `phi_pt`, `best_driver`, `self_influence` or a metadata "
        "key; repeatable (default: `latent`).",
    )
    method: str | None = option(
        None, flags="--method -m", metavar="NAME", help="The method of stored scores, if there are several."
    )
    sketcher: str | None = option(None, metavar="NAME", help="The sketcher of stored scores, if there are several.")


class EventsOptions(TypedDict, total=False):
    """`EventsSpec` as keywords."""

    source: str | None
    variant: str | None
    checkpoints: Sequence[str]
    baseline: str | None
    rule: str
    seen_in: str | None
    seen_key: str


class SurvivalOptions(EventsOptions, total=False):
    """The keywords of `Store.survival`."""

    event: str
    by: str | None
    covariates: Sequence[str]
    method: str | None
    sketcher: str | None
