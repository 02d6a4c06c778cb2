"""The scope of a page: its queries, their variant, the sketcher, the method and the checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import polars as pl

from lark_store.errors import NameUnknownError, NothingToScoreError
from lark_store.query.methods import METHODS

if TYPE_CHECKING:
    from lark_store.store import Store
    from lark_store.ui.parameters import Parameters

_SKETCHED = """
SELECT r.sketcher, r.source AS queries, r.variant AS query_variant, r.checkpoint, max(r.ingest_run) AS newest
FROM ingest_runs r JOIN sources s ON s.name = r.source
WHERE r.status = 'done' AND s.stage = 'query' GROUP BY ALL"""
_SCORED = """
SELECT sketcher, queries, query_variant, checkpoint, method, max(score_run) AS newest
FROM score_runs WHERE status = 'done' AND over_checkpoints IS NULL AND query_checkpoint = checkpoint AND n_queries > 0
GROUP BY ALL"""
_ORDER = "SELECT name FROM checkpoints ORDER BY epoch NULLS FIRST, created_at, name"
_HINTS = {
    False: "add queries with `lark-store source add --stage query`, then run `lark-store ingest`",
    True: "score the sources for the queries with `lark-store attribute --checkpoint NAME`",
}


@dataclass(frozen=True)
class Scope:
    """What a page is about. `method` names a scoring method; queries and samples are at the same checkpoint."""

    sketcher: str
    queries: str
    query_variant: str
    method: str
    checkpoint: str

    @property
    def search(self) -> dict[str, Any]:
        """The keywords of `Store.top` and `Store.scores`."""
        return {
            "checkpoint": self.checkpoint,
            "queries": self.queries,
            "query_variant": self.query_variant,
            "sketcher": self.sketcher,
            "method": self.method,
        }

    def url(self, path: str, **more: Any) -> str:
        """Return the address of a page with this scope."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return f"{path}?{urlencode(own | {name: value for name, value in more.items() if value not in (None, '')})}"


@dataclass(frozen=True)
class Choices:
    """A scope, and for each of its fields the values that there are."""

    scope: Scope
    values: dict[str, list[str]]

    @property
    def checkpoints(self) -> list[str]:
        """All checkpoints to choose from, in order of their epochs."""
        return self.values["checkpoint"]


def choose(store: Store, parameters: Parameters, *, scored: bool) -> Choices:
    """Return the scope that a URL names; what it leaves out is the newest that there is, at the last checkpoint.

    With `scored` it is one of stored scores, else of sketched queries.

    Raises
    ------
    NothingToScoreError, NameUnknownError
    """
    rows = store.sql(_SCORED if scored else _SKETCHED)
    if rows.is_empty():
        what = "there are no scores yet" if scored else "no queries are sketched yet"
        raise NothingToScoreError(what, _HINTS[scored])
    if not scored:
        rows = rows.join(pl.DataFrame({"method": list(METHODS)}), how="cross")
    order = store.sql(_ORDER)["name"].to_list()
    values, chosen = {}, {}
    for field in fields(Scope):
        values[field.name] = _values(rows, field.name, order)
        chosen[field.name] = _chosen(store, field.name, parameters.text(field.name), rows, order)
        rows = rows.filter(pl.col(field.name) == chosen[field.name])
    return Choices(Scope(**chosen), values)


def _values(rows: pl.DataFrame, name: str, order: list[str]) -> list[str]:
    found = set(rows[name])
    if name == "method":
        return [method for method in METHODS if method in found]
    return [value for value in order if value in found] if name == "checkpoint" else sorted(found)


def _chosen(store: Store, name: str, given: str | None, rows: pl.DataFrame, order: list[str]) -> str:
    """Return a field's value: the given one, or the default among the rows that are left."""
    values = _values(rows, name, order)
    if given is not None:
        if given in values:
            return given
        kind = name.replace("_", " ")
        raise NameUnknownError.of(kind, given, values, "choose another one")
    if name == "checkpoint":
        return values[-1]
    if name == "method":
        return "cosine" if "cosine" in values else values[0]
    if name == "sketcher" and store.default_sketcher in values:
        return store.default_sketcher
    newest: str = rows.sort("newest")[name][-1]
    return newest
