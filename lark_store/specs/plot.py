"""Options of a plot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lark_store.specs.option import like, option
from lark_store.specs.search import GroupsOptions, GroupsSpec, RankSpec

if TYPE_CHECKING:
    from collections.abc import Sequence


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
