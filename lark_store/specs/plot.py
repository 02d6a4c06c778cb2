"""Options of a plot and of a report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lark_store.errors import InputError
from lark_store.specs.option import like, option
from lark_store.specs.search import GroupsOptions, GroupsSpec, MethodOptions, RankSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

_MOST_SHOWN = 100  # the course of a sample is that among the first 100 hits


@dataclass(frozen=True, kw_only=True)
class PlotSpec:
    """What a plot shows; see `Store.plot`. A kind refuses the options that it does not use."""

    k: int = option(10, flags="-k", help="Samples in `hits`, on each side, and in `histogram`.")
    where: str | None = like(RankSpec, "where")
    by: Sequence[str] = like(GroupsSpec, "by")
    how: str = option("max", help="A group's value: the `mean`, `sum` or `max` of its samples' scores.")
    measure: str = option("influence", help="What `trajectory` shows: `influence` or `loss`.")


class PlotOptions(GroupsOptions, total=False):
    """The keywords of `Store.plot`."""

    k: int
    measure: str


@dataclass(frozen=True, kw_only=True)
class ReportSpec:
    """What a report of a store shows; see `Store.report`."""

    limit: int = option(200, flags="--limit -n", metavar="N", help="Queries in the picker, the first N by id.")
    k: int = option(5, flags="-k", help="Samples shown for a query at each checkpoint.")
    where: str | None = like(RankSpec, "where")

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise InputError(f"`--limit` must be at least 1, not {self.limit}", "the default is 200")
        if not 1 <= self.k <= _MOST_SHOWN:
            raise InputError(f"`-k` must be between 1 and {_MOST_SHOWN}, not {self.k}", "try `-k 5`")


class ReportOptions(MethodOptions, total=False):
    """The keywords of `Store.report`."""

    sources: Sequence[str]
    variants: Sequence[str]
    where: str | None
    limit: int
    k: int
    device: str
    memory: int
