"""Table functions: SQL functions computed in Python, for results that no view can provide.

Each is a macro over a Python function that returns a list of structs per row of arguments. So it joins with everything
else, also laterally, where one call answers many rows and reads the sketches once for all of them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import polars as pl
import pyarrow as pa

from lark_store.core.names import SUM_SEPARATOR
from lark_store.errors import InputError, LarkStoreError, NothingToScoreError
from lark_store.query.sql.columns import (
    FACT_EVENTS,
    FT_PT,
    GROUPS,
    METRICS,
    SIMILAR_TEXT,
    SURVIVAL,
    TOP,
    TRAJECTORY,
    Column,
)
from lark_store.specs import EventsSpec, RankSpec, SearchSpec, SurvivalSpec, build

if TYPE_CHECKING:
    from collections.abc import Callable

    import duckdb

    from lark_store.query.sql.limits import Stop
    from lark_store.schema.database import Database

    Arguments = dict[str, Any]
    Answer = Callable[[Database, list[Arguments], Stop], list[pl.DataFrame | None]]

_OPTION = re.compile(r"`--?([a-z][a-z-]*)(?:[ =]([^`]+))?`")
_FORGOTTEN = "\x01"  # default of a required macro parameter; no name equals it
_EXAMPLES = {
    "checkpoint": "'epoch-2'",
    "query": "'q1'",
    "sample_id": "'s1'",
    "k": "10",
    "view": "'all'",
    "key": "'topic'",
}


_ARROW = {
    "VARCHAR": pa.string(),
    "DOUBLE": pa.float64(),
    "FLOAT": pa.float32(),
    "INTEGER": pa.int32(),
    "BIGINT": pa.int64(),
    "BOOLEAN": pa.bool_(),
}


@dataclass(frozen=True)
class Function:
    """A table function: the meaning of a row, its parameters with types and defaults, and its columns.

    `answer` takes the arguments of several calls and returns a frame for each, or None for no rows. A missing
    `required` argument is an error; a NULL one, as in a lateral join, gives no rows.
    """

    name: str
    meaning: str
    parameters: dict[str, tuple[str, str]]
    columns: dict[str, Column]
    answer: Answer = field(repr=False)
    required: tuple[str, ...] = ()

    @property
    def signature(self) -> str:
        """The call with its defaults."""
        arguments = (
            name if name in self.required else f"{name} := {default}" for name, (_, default) in self.parameters.items()
        )
        return f"{self.name}({', '.join(arguments)})"

    def _check(self, calls: list[Arguments | None]) -> None:
        for call in calls:
            if call is None:
                raise InputError(f"`_{self.name}(NULL)` has no arguments", f"call `{self.signature}`")
            _required(call, *self.required, missing=_FORGOTTEN)

    def _in_sql(self, message: str) -> str:
        """Return a message with this function's options in SQL spelling: `k := 10`."""

        def argument(option: re.Match[str]) -> str:
            name, value = option[1].replace("-", "_"), option[2]
            if name not in self.parameters:
                return option[0]
            kind = self.parameters[name][0]
            if value is None:
                return f"`{name} := true`" if kind == "BOOLEAN" else f"`{name}`"
            return f"`{name} := '{value}'`" if kind == "VARCHAR" else f"`{name} := {value}`"

        return _OPTION.sub(argument, message)

    def register(self, connection: duckdb.DuckDBPyConnection, db: Database, stop: Stop) -> None:
        """Create the function on a connection."""
        row = pa.struct([(name, _ARROW[column.type]) for name, column in self.columns.items()])

        def call(calls: pa.ChunkedArray) -> pa.Array:
            try:
                arguments = calls.to_pylist()
                self._check(arguments)
                frames = self.answer(db, arguments, stop)
            except Exception as error:  # DuckDB would keep only its text
                if isinstance(error, LarkStoreError):
                    error.respell(self._in_sql, everywhere=True)
                stop.end(error)
                raise
            return pa.array([[] if f is None else _rows(f, self.columns) for f in frames], type=pa.list_(row))

        parameters = ", ".join(f'"{name}" {kind}' for name, (kind, _) in self.parameters.items())
        returned = ", ".join(f'"{name}" {column.type}' for name, column in self.columns.items())
        options: dict[str, Any] = {"type": "arrow", "null_handling": "special"}
        connection.create_function(f"_{self.name}", call, [f"STRUCT({parameters})"], f"STRUCT({returned})[]", **options)
        defaults = ", ".join(
            f"{name} := '{_FORGOTTEN}'" if name in self.required else f"{name} := {default}"
            for name, (_, default) in self.parameters.items()
        )
        passed = ", ".join(f"'{name}': {name}::{kind}" for name, (kind, _) in self.parameters.items())
        connection.execute(
            f"CREATE TEMP MACRO {self.name}({defaults}) AS TABLE SELECT unnest(_row, recursive := true) "  # noqa: S608
            f"FROM (SELECT unnest(_{self.name}({{{passed}}})) AS _row)"
        )


def _rows(frame: pl.DataFrame, columns: dict[str, Column]) -> list[dict[str, Any]]:
    missing = [pl.lit(None).alias(name) for name in columns if name not in frame.columns]
    return frame.with_columns(missing).select(list(columns)).to_dicts()


def _required(arguments: Arguments, *names: str, missing: str | None = None) -> None:
    for name in names:
        if arguments[name] == missing:
            raise InputError(f"`{name}` is missing", f"for example `{name} := {_EXAMPLES[name]}`")


def _listed(value: str | None) -> tuple[str, ...]:
    return () if value is None else (value,)


def _search_of(call: Arguments) -> SearchSpec:
    """Return the search of a call."""
    checkpoints = call["checkpoint"].split(SUM_SEPARATOR) if "checkpoint" in call else ()
    groups = {"sources": _listed(call.get("source")), "variants": _listed(call.get("variant"))}
    return build(SearchSpec, call | {"sketcher": call["sketcher"] or None}, checkpoints=checkpoints, **groups)


def _top_influence(db: Database, calls: list[Arguments], stop: Stop) -> list[pl.DataFrame | None]:
    """Answer calls; those that differ only by the query are answered together."""
    from lark_store.query.answers.top import Ranking, top
    from lark_store.query.select.resolve import ask

    together: dict[tuple[Any, ...], list[int]] = {}
    for number, call in enumerate(calls):
        if call["query"] is not None:
            together.setdefault(tuple(v for n, v in call.items() if n != "query"), []).append(number)
    frames: list[pl.DataFrame | None] = [None] * len(calls)
    for numbers in together.values():
        call = calls[numbers[0]]
        _required(call, "checkpoint", "k")
        spec = _search_of(call)
        ranking = Ranking(k=call["k"], opponents=bool(call["opponents"]), where=call["condition"], check=stop.check)
        ids = list(dict.fromkeys(calls[number]["query"] for number in numbers))
        answers = top(db, ids, ask(db, spec), ranking, lenient=True)  # DuckDB may pass one row or many
        for number in numbers:
            hits = answers.get(calls[number]["query"])
            if hits is not None:
                constants = {"checkpoint": spec.checkpoints[-1], "query_id": hits.query_id, "scored_by": hits.score}
                note = pl.lit("\nnote: ".join(hits.notes) or None, pl.String).alias("note")
                frames[number] = hits.frame.with_columns(*(pl.lit(v).alias(n) for n, v in constants.items()), note)
    return frames


def _ft_pt(db: Database, calls: list[Arguments], stop: Stop) -> list[pl.DataFrame | None]:
    from lark_store.query.answers.ft_pt import ft_pt
    from lark_store.query.answers.similar_text import check_query

    cached: dict[tuple[Any, ...], pl.DataFrame] = {}
    frames: list[pl.DataFrame | None] = []
    for call in calls:
        if call["checkpoint"] is None:
            frames.append(None)
            continue
        key = tuple(v for n, v in call.items() if n != "query")
        if key not in cached:
            cached[key] = ft_pt(db, _search_of(call), check=stop.check)
        frame = cached[key]
        if call["query"] is not None:
            frame = frame.filter(query_id=call["query"])
            if frame.is_empty():
                check_query(db, call["query"])
        frames.append(frame)
    return frames


def _influence_by(db: Database, calls: list[Arguments], stop: Stop) -> list[pl.DataFrame | None]:
    from lark_store.query.answers.groups import Grouped, groups

    frames: list[pl.DataFrame | None] = []
    for call in calls:
        if call["checkpoint"] is None or call["key"] is None:
            frames.append(None)
            continue
        by = [key for key in (call["key"], call["key2"]) if key is not None]
        spec = _search_of(call)
        for_each = Grouped(by=by, how=call["how"] or "mean", where=call["condition"], check=stop.check)
        frames.append(groups(db, _listed(call["query"]) or None, spec, for_each))
    return frames


def _trajectory(db: Database, calls: list[Arguments], stop: Stop) -> list[pl.DataFrame | None]:
    from lark_store.query.answers.trajectory import trajectory

    frames: list[pl.DataFrame | None] = []
    for call in calls:
        stop.check()
        if call["query"] is None or call["sample_id"] is None:
            frames.append(None)
            continue
        try:
            frames.append(trajectory(db, call["query"], call["sample_id"], _search_of(call)))
        except NothingToScoreError:
            frames.append(None)
    return frames


def _similar_text(db: Database, calls: list[Arguments], stop: Stop) -> list[pl.DataFrame | None]:
    from lark_store.query.answers.similar_text import similar_text

    frames: list[pl.DataFrame | None] = []
    for call in calls:
        stop.check()
        if call["query"] is None and call["text"] is None:
            frames.append(None)
            continue
        _required(call, "k")
        sources = _listed(call["source"])
        frames.append(similar_text(db, call["query"], text=call["text"], k=RankSpec(k=call["k"]).k, sources=sources))
    return frames


def _metrics(db: Database, calls: list[Arguments], stop: Stop) -> list[pl.DataFrame | None]:
    from lark_store.query.answers.metrics import measure
    from lark_store.query.select.resolve import method_across
    from lark_store.query.select.score_filter import ScoreFilter

    frames: list[pl.DataFrame | None] = []
    for call in calls:
        stop.check()
        _required(call, "view")
        checkpoints = call["checkpoint"].split(SUM_SEPARATOR) if call["checkpoint"] else []
        method = method_across(call["method"], call["over_checkpoints"], checkpoints, call["query_checkpoint"])
        scores = ScoreFilter(checkpoints, method, call["query_checkpoint"], call["query_variant"])
        frames.append(measure(db, scores, call["view"], call["sketcher"] or None))
    return frames


def _given(call: Arguments) -> Arguments:
    """Return the arguments with a value."""
    return {name: value for name, value in call.items() if value is not None}


def _fact_events(db: Database, calls: list[Arguments], stop: Stop) -> list[pl.DataFrame | None]:
    from lark_store.query.answers.fact_events import fact_events

    stop.check()
    return [fact_events(db, build(EventsSpec, _given(call))) for call in calls]


def _survival(db: Database, calls: list[Arguments], stop: Stop) -> list[pl.DataFrame | None]:
    from lark_store.query.answers.survival import survival

    stop.check()
    return [survival(db, build(SurvivalSpec, _given(call))).effects for call in calls]


_NAME, _YES = ("VARCHAR", "NULL"), ("BOOLEAN", "false")
_ASKED = {"queries": _NAME, "query_variant": _NAME, "sketcher": _NAME, "method": _NAME}
_OVER = {"over_checkpoints": _NAME}  # for several checkpoints, as `base + epoch-1`
_AT = {"query_checkpoint": _NAME}
_FOLLOWED = {
    "baseline": _NAME,
    "rule": ("VARCHAR", "'first'"),
    "source": _NAME,
    "variant": _NAME,
    "checkpoints": ("VARCHAR[]", "NULL"),
    "seen_in": _NAME,
    "seen_key": ("VARCHAR", "'seen'"),
}
_TOP = Function(
    "top_influence",
    "One of the k samples with the most influence on a query",
    {
        "checkpoint": _NAME,
        "query": _NAME,
        "k": ("INTEGER", "10"),
        "source": _NAME,
        "variant": _NAME,
        "condition": _NAME,
        "opponents": _YES,
        **_AT,
        **_ASKED,
        **_OVER,
    },
    TOP,
    _top_influence,
    required=("checkpoint", "query"),
)
FUNCTIONS = {
    function.name: function
    for function in (
        _TOP,
        Function(
            "ft_pt",
            "Highest fine-tuning and pretraining influence on a query",
            {"checkpoint": _NAME, "query": _NAME, **_ASKED, **_OVER, **_AT},
            FT_PT,
            _ft_pt,
            required=("checkpoint",),
        ),
        Function(
            "influence_by",
            "A group of samples with the same value of a key, and its influence",
            {
                "checkpoint": _NAME,
                "key": _NAME,
                "key2": _NAME,
                "query": _NAME,
                "how": ("VARCHAR", "'mean'"),
                "source": _NAME,
                "variant": _NAME,
                "condition": _NAME,
                **_AT,
                **_ASKED,
                **_OVER,
            },
            GROUPS,
            _influence_by,
            required=("checkpoint", "key"),
        ),
        Function(
            "trajectory",
            "A sample's influence on a query at one checkpoint",
            {"query": _NAME, "sample_id": _NAME, "source": _NAME, "variant": _NAME, **_ASKED, **_AT},
            TRAJECTORY,
            _trajectory,
            required=("query", "sample_id"),
        ),
        Function(
            "similar_text",
            "One of the k samples with the texts most similar to a query",
            {"query": _NAME, "k": ("INTEGER", "10"), "text": _NAME, "source": _NAME},
            SIMILAR_TEXT,
            _similar_text,
        ),
        Function(
            "metrics",
            "A metric of the stored scores, as `metrics` prints it",
            {
                "view": ("VARCHAR", "'all'"),
                "checkpoint": _NAME,
                "method": _NAME,
                "over_checkpoints": _NAME,
                "sketcher": _NAME,
                "query_variant": _NAME,
                **_AT,
            },
            METRICS,
            _metrics,
        ),
        Function(
            "fact_events",
            "A fact, and when it was learned or lost",
            _FOLLOWED,
            FACT_EVENTS,
            _fact_events,
        ),
        Function(
            "survival",
            "The hazard ratio of a covariate for an event of facts",
            {
                "event": ("VARCHAR", "'acquisition'"),
                "covariates": ("VARCHAR[]", "NULL"),
                **_FOLLOWED,
                "method": _NAME,
                "sketcher": _NAME,
            },
            SURVIVAL,
            _survival,
        ),
    )
}
