"""The interface of a kind of plot: a subclass of `Plot`, with one entry in the registry."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from lark_store.errors import InputError, NothingToScoreError
from lark_store.specs import SearchSpec, build

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lark_store.charts.style import Figure
    from lark_store.schema.database import Database
    from lark_store.specs import PlotSpec


@dataclass(frozen=True)
class Asked:
    """What to draw: the queries and the checkpoints (none: the kind's default), what to show, and all options.

    `notes` are on what was chosen.
    """

    db: Database
    queries: list[str]
    checkpoints: list[str]
    show: PlotSpec
    options: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def search(self) -> SearchSpec:
        """The search at the checkpoints."""
        return build(SearchSpec, self.options, checkpoints=self.checkpoints)

    @property
    def tuning(self) -> list[str]:
        """The names of the fine-tuning sources."""
        from sqlalchemy import select

        from lark_store.schema.catalog import Source

        with self.db.session() as session:
            return list(session.scalars(select(Source.name).filter_by(stage="finetune").order_by(Source.id)))

    @property
    def colours(self) -> dict[str, str]:
        """The colours of the store's sources, the same in all plots."""
        from sqlalchemy import select

        from lark_store.charts.style import colours_of
        from lark_store.schema.catalog import Source

        with self.db.session() as session:
            names = list(session.scalars(select(Source.name).where(Source.stage != "query").order_by(Source.id)))
        return colours_of(names, self.tuning)

    def at_all_checkpoints(self) -> Asked:
        """Return the same by one sketcher at the given checkpoints, or at all that can be shown, by epoch.

        Raises
        ------
        NothingToScoreError
            There are none.
        """
        from lark_store.query.select.sketchers import sketched_checkpoints, with_sketcher
        from lark_store.schema.database import find_sketcher

        spec, notes = with_sketcher(self.db, self.search)
        chosen = replace(self, options={**self.options, "sketcher": spec.sketcher}, notes=(*self.notes, *notes))
        if self.checkpoints:
            return chosen
        with self.db.session() as session:
            names = [
                checkpoint.name for checkpoint in sketched_checkpoints(session, find_sketcher(session, spec.sketcher))
            ]
        if not names:
            raise NothingToScoreError(
                f"there are no `{spec.sketcher}` sketches", "create some with `lark-store ingest`"
            )
        return _where_scored(chosen, names)

    def check_checkpoint(self) -> None:
        """Check that there is a checkpoint.

        Raises
        ------
        InputError
            There is none.
        """
        if not self.checkpoints:
            raise InputError("no checkpoint is given", "add `--checkpoint NAME`")

    def one_query(self) -> str:
        """Return the only query.

        Raises
        ------
        InputError
            There are none, or several.
        """
        if len(self.queries) != 1:
            fact = "no query is given" if not self.queries else f"{len(self.queries)} queries are given"
            raise InputError(fact, "give the id of one query")
        return self.queries[0]


def _where_scored(asked: Asked, checkpoints: list[str]) -> Asked:
    """Return the same at those of the checkpoints with sketches of queries and samples; a note names the others."""
    from lark_store.query.select.resolve import ask

    faults: dict[str, NothingToScoreError] = {}
    for name in checkpoints:
        try:
            ask(asked.db, build(SearchSpec, asked.options, checkpoints=[name]))
        except NothingToScoreError as fault:
            faults[name] = fault
    if len(faults) == len(checkpoints):
        raise next(iter(faults.values()))
    left_out = (f"`{name}` is left out: {fault.fact}" for name, fault in faults.items())
    kept = [name for name in checkpoints if name not in faults]
    return replace(asked, checkpoints=kept, notes=(*asked.notes, *left_out))


class Plot:
    """A kind of plot. `name` is its name, `meaning` its help; `uses` are the options that it reads."""

    name: ClassVar[str]
    meaning: ClassVar[str]
    uses: ClassVar[frozenset[str]]

    def draw(self, asked: Asked) -> tuple[Figure, Sequence[str]]:
        """Return the chart, and notes for the reader."""
        raise NotImplementedError


SEARCH = frozenset(
    ("queries", "query_variant", "query_checkpoint", "sketcher", "method", "over_checkpoints", "sources", "variants")
)
EXACT = SEARCH | {"where", "device"}
GROUPS = EXACT | {"by", "how", "memory"}
