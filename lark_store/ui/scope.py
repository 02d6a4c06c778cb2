"""The scope of a page: its queries, their variant, the sketcher, the method and the checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

import polars as pl

from lark_store.errors import NameUnknownError, NothingToScoreError
from lark_store.query.methods import METHODS

if TYPE_CHECKING:
    from lark_store.store import Store
    from lark_store.ui.parameters import Parameters

# A checkpoint counts once samples are sketched there, too: an ingest begins with the queries or with the samples.
_SKETCHED = """
SELECT r.sketcher, r.source AS queries, r.variant AS query_variant, r.checkpoint, max(r.ingest_run) AS newest
FROM ingest_runs r JOIN sources s ON s.name = r.source
WHERE r.status = 'done' AND s.stage = 'query' AND r.source IN (SELECT source FROM samples)
  AND (r.sketcher, r.checkpoint) IN (
    SELECT (g.sketcher, g.checkpoint) FROM ingest_runs g JOIN sources t ON t.name = g.source
    WHERE g.status = 'done' AND t.stage <> 'query' AND g.source IN (SELECT source FROM samples))
GROUP BY ALL"""
# A new question needs no stored queries.
_ASKABLE = """
SELECT r.sketcher, '' AS queries, v.name AS query_variant, r.checkpoint,
       CASE WHEN v.name = 'chatml' THEN 1 ELSE 0 END AS newest
FROM ingest_runs r JOIN sources s ON s.name = r.source CROSS JOIN variants v
WHERE r.status = 'done' AND s.stage <> 'query' AND r.source IN (SELECT source FROM samples) GROUP BY ALL"""
_SCORED = """
SELECT sketcher, queries, query_variant, checkpoint, method, max(score_run) AS newest
FROM score_runs WHERE status = 'done' AND over_checkpoints IS NULL AND query_checkpoint = checkpoint AND n_queries > 0
GROUP BY ALL"""
_ORDER = "SELECT name FROM checkpoints ORDER BY epoch NULLS FIRST, created_at, name"
_KINDS = {
    "sketched": (
        _SKETCHED,
        "no queries are sketched yet at a checkpoint with sketched samples",
        "add queries with `lark-store source add --stage query`, then run `lark-store ingest`",
    ),
    "askable": (_ASKABLE, "no samples are sketched yet", "add a source, then run `lark-store ingest`"),
    "scored": (
        _SCORED,
        "there are no scores yet",
        "score the sources for the queries with `lark-store attribute --checkpoint NAME`",
    ),
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
        return f"{path}?{urlencode(own | {name: value for name, value in more.items() if value is not None})}"

    def sample_url(self, source: str, sample_id: str) -> str:
        """Return the address of a sample's page with this scope."""
        return self.url(sample_path(source, sample_id))

    def query_url(self, query_id: str) -> str:
        """Return the address of a query's page with this scope."""
        return self.url(f"/query/{quote(query_id, safe='')}")


def sample_path(source: str, sample_id: str) -> str:
    """Return the address of a sample's page, without a scope."""
    return f"/sample/{quote(source)}/{quote(sample_id, safe='')}"


@dataclass(frozen=True)
class Choices:
    """A scope, for each of its fields the values that there are, and notes on values that were replaced."""

    scope: Scope
    values: dict[str, list[str]]
    notes: list[str]

    @property
    def checkpoints(self) -> list[str]:
        """All checkpoints to choose from, in order of their epochs."""
        return self.values["checkpoint"]


def choose(store: Store, parameters: Parameters, kind: str = "sketched", *, strict: bool = False) -> Choices:
    """Return the scope that a URL names; what it leaves out is the newest that there is, at the last checkpoint.

    `kind` is `sketched` (queries with sketches), `askable` (a new question) or `scored` (stored scores). A value that
    exists, but not with the values before it, is replaced with a note; with `strict` it is an error.

    Raises
    ------
    NothingToScoreError, NameUnknownError
    """
    query, fact, hint = _KINDS[kind]
    rows = store.sql(query)
    if rows.is_empty():
        raise NothingToScoreError(fact, hint)
    if kind != "scored":
        rows = rows.join(pl.DataFrame({"method": list(METHODS)}), how="cross")
    order = store.sql(_ORDER)["name"].to_list()
    everything, values, chosen, notes = rows, {}, {}, []
    for name in (field.name for field in fields(Scope)):
        values[name] = _values(rows, name, order)
        given = None if (kind, name) == ("askable", "queries") else parameters.text(name)
        if given is None or given in values[name]:
            chosen[name] = given or _default(store, name, values[name], rows)
        elif strict or given not in set(everything[name]):
            raise NameUnknownError.of(name.replace("_", " "), given, values[name], "choose another one")
        else:
            chosen[name] = _default(store, name, values[name], rows)
            what = name.replace("_", " ")
            notes.append(f"The {what} {given} does not go with the other choices; this is {chosen[name]}.")
        rows = rows.filter(pl.col(name) == chosen[name])
    return Choices(Scope(**chosen), values, notes)


def _values(rows: pl.DataFrame, name: str, order: list[str]) -> list[str]:
    found = set(rows[name])
    if name == "method":
        return [method for method in METHODS if method in found]
    return [value for value in order if value in found] if name == "checkpoint" else sorted(found)


def _default(store: Store, name: str, values: list[str], rows: pl.DataFrame) -> str:
    """Return a field's default value among the rows that are left."""
    if name == "checkpoint":
        return values[-1]
    if name == "method":
        return "cosine" if "cosine" in values else values[0]
    if name == "sketcher" and store.default_sketcher in values:
        return store.default_sketcher
    newest: str = rows.sort("newest")[name][-1]
    return newest
