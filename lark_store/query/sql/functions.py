"""Table functions: Python that computes inside a query, for what no view can hold.

Each is a macro over a Python function that returns a list of structs for each row of its arguments; so it joins with
everything else, also laterally, where one call answers many rows and the sketches are read once for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import polars as pl
import pyarrow as pa

from lark_store.errors import InputError, NothingToScoreError
from lark_store.query.methods import BETWEEN
from lark_store.query.sql.views import Column

if TYPE_CHECKING:
    from collections.abc import Callable

    import duckdb

    from lark_store.query.sql.stop import Stop
    from lark_store.schema.database import Database

    Arguments = dict[str, Any]
    Answer = Callable[[Database, list[Arguments], Stop], list[pl.DataFrame | None]]

_EXAMPLES = {"checkpoint": "'epoch-2'", "k": "10"}
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
    """A table function: what a row of it is, its parameters with their types and defaults, and its columns.

    `answer` takes the arguments of several calls and returns a frame for each, or None for no rows.
    """

    name: str
    meaning: str
    parameters: dict[str, tuple[str, str]]
    columns: dict[str, Column]
    answer: Answer = field(repr=False)

    @property
    def signature(self) -> str:
        """How it is called, with its defaults."""
        return f"{self.name}({', '.join(f'{name} := {default}' for name, (_, default) in self.parameters.items())})"

    def register(self, connection: duckdb.DuckDBPyConnection, db: Database, stop: Stop) -> None:
        """Make the function on a connection."""
        row = pa.struct([(name, _ARROW[column.type]) for name, column in self.columns.items()])

        def call(calls: pa.ChunkedArray) -> pa.Array:
            try:
                frames = self.answer(db, calls.to_pylist(), stop)
            except Exception as error:  # DuckDB would keep its text alone
                stop.end(error)
                raise
            return pa.array([[] if f is None else _rows(f, self.columns) for f in frames], type=pa.list_(row))

        given = ", ".join(f'"{name}" {kind}' for name, (kind, _) in self.parameters.items())
        returned = ", ".join(f'"{name}" {column.type}' for name, column in self.columns.items())
        how: dict[str, Any] = {"type": "arrow", "null_handling": "special"}
        connection.create_function(f"_{self.name}", call, [f"STRUCT({given})"], f"STRUCT({returned})[]", **how)
        defaults = ", ".join(f"{name} := {default}" for name, (_, default) in self.parameters.items())
        passed = ", ".join(f"'{name}': {name}::{kind}" for name, (kind, _) in self.parameters.items())
        connection.execute(
            f"CREATE TEMP MACRO {self.name}({defaults}) AS TABLE SELECT unnest(_row, recursive := true) "  # noqa: S608
            f"FROM (SELECT unnest(_{self.name}({{{passed}}})) AS _row)"
        )


def _rows(frame: pl.DataFrame, columns: dict[str, Column]) -> list[dict[str, Any]]:
    missing = [pl.lit(None).alias(name) for name in columns if name not in frame.columns]
    return frame.with_columns(missing).select(list(columns)).to_dicts()


def _required(arguments: Arguments, *names: str) -> None:
    for name in names:
        if arguments[name] is None:
            raise InputError(f"`{name}` is missing", f"for example `{name} := {_EXAMPLES[name]}`")


def _listed(value: str | None) -> tuple[str, ...]:
    return () if value is None else (value,)


def _top_influence(db: Database, calls: list[Arguments], stop: Stop) -> list[pl.DataFrame | None]:
    """Answer calls; those that differ by the query alone are answered together."""
    from lark_store.query.groups import Wanted, ask
    from lark_store.query.top import Ranking, top

    together: dict[tuple[Any, ...], list[int]] = {}
    for number, call in enumerate(calls):
        if call["query"] is not None:
            together.setdefault(tuple(v for n, v in call.items() if n != "query"), []).append(number)
    frames: list[pl.DataFrame | None] = [None] * len(calls)
    for numbers in together.values():
        call = calls[numbers[0]]
        _required(call, "checkpoint", "k")
        wanted = Wanted(
            call["checkpoint"].split(BETWEEN),
            call["sketcher"] or db.default_sketcher,
            call["queries"],
            _listed(call["source"]),
            _listed(call["variant"]),
            call["query_checkpoint"],
            call["query_variant"],
            call["method"],
            call["over_checkpoints"],
        )
        ranking = Ranking(call["k"], bool(call["opponents"]), call["condition"], check=stop.check)
        ids = list(dict.fromkeys(calls[number]["query"] for number in numbers))
        answers = top(db, ids, ask(db, wanted), ranking, lenient=True)  # DuckDB may hand over one row or many
        for number in numbers:
            hits = answers.get(calls[number]["query"])
            if hits is not None:
                more = {"checkpoint": wanted.checkpoints[-1], "query_id": hits.query_id, "scored_by": hits.score}
                note = pl.lit("\nnote: ".join(hits.notes) or None, pl.String).alias("note")
                frames[number] = hits.frame.with_columns(*(pl.lit(v).alias(n) for n, v in more.items()), note)
    return frames


def _ft_pt(db: Database, calls: list[Arguments], stop: Stop) -> list[pl.DataFrame | None]:
    from lark_store.query.answers import check_query, ft_pt
    from lark_store.query.groups import Wanted

    known: dict[tuple[Any, ...], pl.DataFrame] = {}
    frames: list[pl.DataFrame | None] = []
    for call in calls:
        if call["checkpoint"] is None:
            frames.append(None)
            continue
        names = (call["checkpoint"].split(BETWEEN), call["sketcher"] or db.default_sketcher, call["queries"])
        key = tuple(v for n, v in call.items() if n != "query")
        if key not in known:
            how = {name: call[name] for name in ("query_variant", "method", "over_checkpoints")}
            wanted = Wanted(*names, **how)
            known[key] = ft_pt(db, wanted, check=stop.check)
        frame = known[key]
        if call["query"] is not None:
            frame = frame.filter(query_id=call["query"])
            if frame.is_empty():
                check_query(db, call["query"])
        frames.append(frame)
    return frames


def _trajectory(db: Database, calls: list[Arguments], stop: Stop) -> list[pl.DataFrame | None]:
    from lark_store.query.answers import trajectory
    from lark_store.query.groups import Wanted

    frames: list[pl.DataFrame | None] = []
    for call in calls:
        stop.check()
        if call["query"] is None or call["sample_id"] is None:
            frames.append(None)
            continue
        of, by = (_listed(call["source"]), _listed(call["variant"])), call["sketcher"] or db.default_sketcher
        wanted = Wanted([], by, call["queries"], *of, query_variant=call["query_variant"], method=call["method"])
        try:
            frames.append(trajectory(db, call["query"], call["sample_id"], wanted))
        except NothingToScoreError:
            frames.append(None)
    return frames


def _similar_text(db: Database, calls: list[Arguments], stop: Stop) -> list[pl.DataFrame | None]:
    from lark_store.query.answers import similar_text

    frames: list[pl.DataFrame | None] = []
    for call in calls:
        stop.check()
        if call["query"] is None and call["text"] is None:
            frames.append(None)
            continue
        _required(call, "k")
        sources = _listed(call["source"])
        frames.append(similar_text(db, call["query"], text=call["text"], k=call["k"], sources=sources))
    return frames


def _text(**meanings: str) -> dict[str, Column]:
    return {name: Column("VARCHAR", meaning) for name, meaning in meanings.items()}


def _double(**meanings: str) -> dict[str, Column]:
    return {name: Column("DOUBLE", meaning) for name, meaning in meanings.items()}


def _whole(**meanings: str) -> dict[str, Column]:
    return {name: Column("INTEGER", meaning) for name, meaning in meanings.items()}


_NAME, _YES = ("VARCHAR", "NULL"), ("BOOLEAN", "false")
_ASKED = {"queries": _NAME, "query_variant": _NAME, "sketcher": _NAME, "method": _NAME}
_RANK = _whole(rank="place, from 1")
_SCORE = {"score": Column("FLOAT", "by the method; above 0 a proponent, below 0 an opponent")}
_NOISE = _double(noise="standard deviation of the score from sketching")
_SAMPLE = _text(
    source="name of the sample's source",
    stage="the source's stage",
    variant="name of the format variant",
    sample_id="id of the sample",
    text="the sample's text; a prompt and its response as one",
)
_AT = _text(checkpoint="name of the checkpoint, of a sum the last", query_id="id of the query")
_BY = _text(scored_by="sketcher and method, and of a sum its checkpoints")
_NOTE = _text(note="what there is to know of the score; else null")
_OVER = {"over_checkpoints": _NAME}  # with several checkpoints, as `base + epoch-1`
_PARTS = {
    "cosine": Column("FLOAT", "of `hybrid`: the cosine"),
    **_whole(cosine_rank="of `hybrid`: place by cosine"),
    "bm25": Column("FLOAT", "of `hybrid`: the BM25 score"),
    **_whole(bm25_rank="of `hybrid`: place by BM25"),
}
_SIGNIFICANCE = _double(
    p_value="chance of such a score in the other sources",
    q_value="Benjamini–Hochberg: the share of false hits up to here",
)
_PAIR = _text(
    source="name of the fine-tuning source",
    variant="its format variant",
    against_source="name of the pretraining source",
    against_variant="its format variant",
)
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
        "query_checkpoint": _NAME,
        **_ASKED,
        **_OVER,
    },
    {**_AT, **_RANK, **_SCORE, **_NOISE, **_SIGNIFICANCE, **_PARTS, **_SAMPLE, **_BY, **_NOTE},
    _top_influence,
)
FUNCTIONS = {
    function.name: function
    for function in (
        _TOP,
        Function(
            "ft_pt",
            "What fine-tuning and pretraining reach for a query",
            {"checkpoint": _NAME, "query": _NAME, **_ASKED, **_OVER},
            {
                "checkpoint": _AT["checkpoint"],
                **_text(queries="name of the query source"),
                "query_id": _AT["query_id"],
                **_PAIR,
                **_double(
                    ft="Φ of the fine-tuning group: its highest score",
                    pt="Φ of the pretraining group",
                    ratio="ft / pt; null where pt is not above 0",
                ),
                **_text(winner="finetune, pretrain or tie"),
                **_BY,
                **_NOTE,
            },
            _ft_pt,
        ),
        Function(
            "trajectory",
            "A sample's influence on a query at one checkpoint",
            {"query": _NAME, "sample_id": _NAME, "source": _NAME, "variant": _NAME, **_ASKED},
            {
                "checkpoint": _AT["checkpoint"],
                **_double(epoch="epochs trained", learning_rate="the learning rate there"),
                "step": Column("BIGINT", "optimizer steps trained"),
                **_text(queries="name of the query source"),
                "query_id": _AT["query_id"],
                **{name: _SAMPLE[name] for name in ("source", "variant", "sample_id")},
                **_double(score="cosine or dot of the two gradients"),
                **_NOISE,
                **_double(query_loss="the query's loss, nats per target token", sample_loss="the sample's loss"),
                **_BY,
            },
            _trajectory,
        ),
        Function(
            "similar_text",
            "One of the k samples that share most words with a query",
            {"query": _NAME, "k": ("INTEGER", "10"), "text": _NAME, "source": _NAME},
            {
                **_RANK,
                "score": Column("FLOAT", "the BM25 score"),
                **{name: _SAMPLE[name] for name in ("source", "stage", "sample_id", "text")},
            },
            _similar_text,
        ),
    )
}
