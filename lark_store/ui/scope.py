"""The scope of a page: its queries, their variant, the sketcher, the method and the checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

import polars as pl

from lark_store.core.names import SUM_SEPARATOR
from lark_store.errors import NameUnknownError, NothingToScoreError
from lark_store.query.methods import METHODS, OVER, Method

if TYPE_CHECKING:
    from collections.abc import Sequence

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
SELECT sketcher, queries, query_variant, checkpoint, method, query_checkpoint, over_checkpoints,
       max(score_run) AS newest
FROM score_runs WHERE status = 'done' AND n_queries > 0 GROUP BY ALL"""
# With the names of all checkpoints in order, and where the queries have gradients, with or without samples.
_WITH_ORDER = """
WITH found AS ({found})
SELECT f.*, (SELECT list(name ORDER BY epoch NULLS FIRST, created_at, name) FROM checkpoints) AS in_order,
       (SELECT list(DISTINCT r.checkpoint) FROM ingest_runs r
        WHERE r.status = 'done' AND r.sketcher = f.sketcher AND r.source = f.queries AND r.variant = f.query_variant)
       AS query_checkpoints
FROM found f"""
_FIELDS = ("sketcher", "queries", "query_variant", "method", "checkpoint")
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
    """What a page is about. `method` names the score at one checkpoint.

    The samples are at `checkpoint`, or their scores are combined by `over_checkpoints` over those `summed`. The queries
    are at the samples' checkpoints, or at `query_checkpoint`.
    """

    sketcher: str
    queries: str
    query_variant: str
    method: str
    checkpoint: str
    query_checkpoint: str | None = None
    over_checkpoints: str | None = None
    summed: tuple[str, ...] = ()

    @property
    def at(self) -> list[str]:
        """The checkpoints of the samples: one, or those of a sum."""
        return list(self.summed) if self.over_checkpoints else [self.checkpoint]

    @property
    def place(self) -> str:
        """The checkpoints for people, as `epoch-1 + epoch-2, queries at epoch-1`."""
        across = f", queries at {self.query_checkpoint}" if self.query_checkpoint else ""
        return f"{SUM_SEPARATOR.join(self.at)}{across}"

    @property
    def is_plain(self) -> bool:
        """Whether samples and queries are at the same one checkpoint."""
        return not self.over_checkpoints and self.query_checkpoint in (None, self.checkpoint)

    @property
    def stored_method(self) -> str:
        """The method's name in the store, as `cosine-sum`."""
        return Method.of(self.method, self.over_checkpoints).name

    @property
    def search(self) -> dict[str, Any]:
        """The keywords of `Store.top` and `Store.scores`."""
        return {
            "checkpoint": self.at if self.over_checkpoints else self.checkpoint,
            "queries": self.queries,
            "query_variant": self.query_variant,
            "sketcher": self.sketcher,
            "method": self.method,
        } | {name: value for name, value in self._combined.items() if value is not None}

    @property
    def _combined(self) -> dict[str, str | None]:
        return {"query_checkpoint": self.query_checkpoint, "over_checkpoints": self.over_checkpoints}

    def at_each(self, checkpoint: str) -> Scope:
        """Return the same at one checkpoint, without a sum."""
        return replace(self, checkpoint=checkpoint, over_checkpoints=None, summed=())

    @property
    def parameters(self) -> list[tuple[str, str]]:
        """The parameters of an address with this scope."""
        own = {name: getattr(self, name) for name in _FIELDS} | self._combined
        summed = self.summed if self.over_checkpoints else ()
        return [(name, value) for name, value in own.items() if value is not None] + [("summed", n) for n in summed]

    def url(self, path: str, **more: Any) -> str:
        """Return the address of a page with this scope."""
        given = [(name, value) for name, value in more.items() if value is not None]
        return f"{path}?{urlencode(self.parameters + given)}"

    def sample_url(self, source: str, sample_id: str) -> str:
        """Return the address of a sample's page with this scope."""
        return self.url(sample_path(source, sample_id))

    def query_url(self, query_id: str) -> str:
        """Return the address of a query's page with this scope."""
        return self.url(f"/query/{segment(query_id)}")


def sample_path(source: str, sample_id: str) -> str:
    """Return the address of a sample's page, without a scope."""
    return f"/sample/{quote(source)}/{segment(sample_id)}"


def segment(name: str) -> str:
    """Return an id as the last part of an address. A browser would drop `..`, even if it is quoted.

    >>> segment("a/b"), segment(".."), segment("~")
    ('a%2Fb', '~..', '~~')
    """
    return quote(f"~{name}" if name in {".", ".."} or name.startswith("~") else name, safe="")


def id_of(part: str) -> str:
    """Return the id of a part made by `segment`, unquoted."""
    return part.removeprefix("~")


@dataclass(frozen=True)
class Choices:
    """A scope, for its fields the values that there are, and notes on values that were replaced.

    `query_checkpoints` are those where the queries have gradients; with `sums`, scores can be summed over checkpoints.
    """

    scope: Scope
    values: dict[str, list[str]]
    notes: list[str]
    query_checkpoints: list[str]
    sums: tuple[str, ...] = OVER

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
    NothingToScoreError, NameUnknownError, InputError
    """
    query, fact, hint = _KINDS[kind]
    rows = store.sql(_WITH_ORDER.format(found=query))
    if rows.is_empty():
        raise NothingToScoreError(fact, hint)
    if kind == "scored":
        rows = rows.with_columns(
            stored="method", method=pl.col("method").map_elements(lambda name: Method.of(name).base, pl.String)
        )
    else:
        rows = rows.join(pl.DataFrame({"method": list(METHODS)}), how="cross")
    order = rows["in_order"][0].to_list()
    everything, values, notes = rows, {}, []
    chosen: dict[str, Any] = {}
    for name in _FIELDS:
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
    sketcher, queries, query_variant, method, checkpoint = (chosen[name] for name in _FIELDS)
    scope = Scope(sketcher, queries, query_variant, method, checkpoint)
    if kind == "askable":
        return Choices(across(scope, parameters, order, ()), values, notes, order, ())
    sketched = set(rows["query_checkpoints"][0])
    found = [name for name in order if name in sketched]
    scope = across(scope, parameters, found, values["checkpoint"])
    return Choices(_stored(scope, rows) if kind == "scored" else scope, values, notes, found)


def across(
    scope: Scope, parameters: Parameters, query_checkpoints: list[str], summable: Sequence[str], side: str = ""
) -> Scope:
    """Return a scope with the queries' checkpoint and the sum that a URL names; without checkpoints, a sum is over all.

    Raises
    ------
    InputError
        There is no such checkpoint, or no such sum.
    """
    at = parameters.text(f"query_checkpoint{side}") and parameters.one_of(
        f"query_checkpoint{side}", query_checkpoints, ""
    )
    over = parameters.text(f"over_checkpoints{side}") and parameters.one_of(
        f"over_checkpoints{side}", OVER if summable else (), ""
    )
    named = parameters.several(f"summed{side}", summable) if over else []
    summed = tuple(name for name in summable if name in named or not named) if over else ()
    return replace(scope, query_checkpoint=at, over_checkpoints=over, summed=summed)


def _stored(scope: Scope, rows: pl.DataFrame) -> Scope:
    """Return a scope with stored scores: of queries elsewhere or of a sum, if it names neither and there are no others.

    `rows` are the runs that are left.
    """
    is_plain = pl.col("over_checkpoints").is_null() & (pl.col("query_checkpoint") == pl.col("checkpoint"))
    if not scope.is_plain or scope.query_checkpoint or rows.select(is_plain.any()).item():
        return scope
    newest = rows.sort("newest").row(-1, named=True)
    if newest["over_checkpoints"] is None:
        return replace(scope, query_checkpoint=newest["query_checkpoint"])
    over = Method.of(newest["stored"]).over
    return replace(scope, over_checkpoints=over, summed=tuple(newest["over_checkpoints"].split(SUM_SEPARATOR)))


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
