"""Events of facts over checkpoints: learned, or lost, and when.

A fact that is wrong at the baseline is acquired (if it was trained on) or generalised to (if it was withheld) at the
first later checkpoint with a correct greedy answer; one that is correct there is degraded at the first wrong one. Under
the rule `stable`, the answer must be the same at the next checkpoint too. Facts without an event are censored at their
last checkpoint. Time is epochs since the baseline.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import polars as pl

from lark_store.core.text import coded, joined
from lark_store.errors import InputError, NothingToScoreError
from lark_store.query.sql.columns import FACT_EVENTS, frame_schema
from lark_store.query.sql.connection import ask
from lark_store.schema.catalog import Checkpoint, Source
from lark_store.schema.database import find

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lark_store.schema.database import Database
    from lark_store.specs import EventsSpec

RULES = ("first", "stable")
EVENTS = ("acquisition", "generalisation", "degradation")
_PROBES = """
SELECT p.checkpoint, c.epoch, p.source, p.variant, p.sample_id, p.is_correct, p.n_correct, p.n_samples,
       p.answer_logprob, p.p_any, p.is_latent, p.n_tokens, s.meta, s.content_sha256
FROM probes p JOIN checkpoints c ON c.name = p.checkpoint JOIN samples s USING (source, sample_id)
WHERE p.reason IS NULL AND ($source IS NULL OR p.source = $source) AND ($variant IS NULL OR p.variant = $variant)
QUALIFY row_number() OVER (
    PARTITION BY p.checkpoint, p.source, p.variant, p.sample_id ORDER BY p.n_samples DESC, p.probe_run DESC) = 1
ORDER BY c.epoch, p.sample_id"""
_TRUE, _FALSE = {"true", "yes", "seen", "1", "train"}, {"false", "no", "withheld", "0", "test", "null"}


def fact_events(db: Database, spec: EventsSpec) -> pl.DataFrame:
    """Return a row per fact, in the columns of `FACT_EVENTS`; see `Store.survival`.

    Raises
    ------
    NameUnknownError, InputError
    NothingToScoreError
        No facts were probed at the baseline and a later checkpoint.
    """
    return followed(db, spec)[0]


def followed(db: Database, spec: EventsSpec) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return the events of `fact_events`, and the recall at each checkpoint.

    The latter has the columns checkpoint, epoch, group (seen or withheld), n, n_correct, recall, low and high, its 95%
    interval (Wilson).
    """
    if spec.rule not in RULES:
        raise InputError(f"there is no rule `{spec.rule}`", f"`--rule` is {joined(coded(RULES), 'or')}")
    probes = _probes(db, spec)
    epochs = _course(probes, spec)
    probes = probes.filter(pl.col("checkpoint").is_in(list(epochs)))
    base = probes.filter(checkpoint=next(iter(epochs)))
    seen = _seen(db, base, spec)
    return _events(probes, epochs, seen, spec.rule), _recall(probes, seen)


def _events(probes: pl.DataFrame, epochs: dict[str, float], seen: dict[str, bool], rule: str) -> pl.DataFrame:
    start, *later = epochs
    base = probes.filter(checkpoint=start)
    answers: dict[str, dict[str, bool]] = {}
    for checkpoint, sample_id, is_correct in probes.select("checkpoint", "sample_id", "is_correct").iter_rows():
        answers.setdefault(sample_id, {})[checkpoint] = is_correct
    rows = []
    for row in base.iter_rows(named=True):
        own = answers[row["sample_id"]]
        at = [(epochs[name] - epochs[start], own[name]) for name in later if name in own]
        if at:
            known, is_seen = row["is_correct"], seen[row["sample_id"]]
            time, observed = _first(at, not known, rule)
            event = "degradation" if known else "acquisition" if is_seen else "generalisation"
            rows.append(row | {"event": event, "seen": is_seen, "time": time, "observed": observed, "baseline": start})
    if not rows:
        raise NothingToScoreError(
            f"no fact was probed at `{start}` and a later checkpoint", "probe more with `lark-store probe`"
        )
    frame = pl.DataFrame(rows, infer_schema_length=None).with_columns(p=pl.col("answer_logprob").exp())
    return frame.select(list(FACT_EVENTS)).cast(frame_schema(FACT_EVENTS))


def _recall(probes: pl.DataFrame, seen: dict[str, bool]) -> pl.DataFrame:
    from scipy.stats import binomtest

    marks = pl.col("sample_id").replace_strict(seen, default=None, return_dtype=pl.Boolean)
    known = probes.with_columns(group=pl.when(marks).then(pl.lit("seen")).when(~marks).then(pl.lit("withheld")))
    counts = (
        known.drop_nulls("group")
        .group_by("checkpoint", "epoch", "group", maintain_order=True)
        .agg(n=pl.len().cast(pl.Int64), n_correct=pl.col("is_correct").sum().cast(pl.Int64))
        .sort("epoch", "group")
    )
    pairs = counts.select("n_correct", "n").iter_rows()
    intervals = [binomtest(k, n).proportion_ci(method="wilson") for k, n in pairs]
    return counts.with_columns(
        recall=pl.col("n_correct") / pl.col("n"),
        low=pl.Series([interval.low for interval in intervals], dtype=pl.Float64),
        high=pl.Series([interval.high for interval in intervals], dtype=pl.Float64),
    )


def _probes(db: Database, spec: EventsSpec) -> pl.DataFrame:
    """Return the probes of the facts, one per fact and checkpoint, by epoch."""
    names = [name for name in (*spec.checkpoints, spec.baseline) if name is not None]
    with db.session() as session:
        for name in names:
            find(session, Checkpoint, name)
        for source in (spec.source, spec.seen_in):
            if source is not None:
                find(session, Source, source)
    probes = ask(db, _PROBES, {"source": spec.source, "variant": spec.variant})
    if probes.is_empty():
        raise NothingToScoreError("no facts were probed", "probe some with `lark-store probe`")
    for column in ("source", "variant"):
        values = probes[column].unique().sort().to_list()
        if len(values) > 1:
            raise InputError(
                f"facts of several {column}s were probed: {joined(coded(values), 'and')}", f"add `--{column} NAME`"
            )
    return probes


def _course(probes: pl.DataFrame, spec: EventsSpec) -> dict[str, float]:
    """Return the checkpoints to follow with their epochs, in order; the baseline is the first."""
    known = dict(probes.select("checkpoint", "epoch").unique(maintain_order=True).iter_rows())
    wanted = [*spec.checkpoints, *([spec.baseline] if spec.baseline and spec.checkpoints else [])] or list(known)
    for name in (*wanted, *([spec.baseline] if spec.baseline else [])):
        if name not in known:
            raise NothingToScoreError(f"no facts were probed at `{name}`", "probe them with `lark-store probe`")
        if known[name] is None:
            raise InputError(f"checkpoint `{name}` has no epoch", "add it with `lark-store checkpoint add --epoch N`")
    course = dict(sorted(((name, known[name]) for name in set(wanted)), key=lambda item: item[1]))
    if len(set(course.values())) < len(course):
        raise InputError("several checkpoints have the same epoch", "name those of one training with `--checkpoint`")
    start = spec.baseline or next(iter(course))
    return {name: epoch for name, epoch in course.items() if epoch >= course[start]}


def _first(at: Sequence[tuple[float, bool]], target: bool, rule: str) -> tuple[float, bool]:
    """Return when an answer first becomes `target`, and True; or the last time, and False."""
    for n, (time, is_correct) in enumerate(at):
        is_kept = rule == "first" or (n + 1 < len(at) and at[n + 1][1] == target)
        if is_correct == target and is_kept:
            return time, True
    return at[-1][0], False


def _seen(db: Database, base: pl.DataFrame, spec: EventsSpec) -> dict[str, bool]:
    """Tell which facts were trained on."""
    if spec.seen_in is not None:
        query = "SELECT DISTINCT content_sha256 FROM samples WHERE source = $source"
        trained = set(ask(db, query, {"source": spec.seen_in})["content_sha256"])
        return {i: sha256 in trained for i, sha256 in base.select("sample_id", "content_sha256").iter_rows()}
    marks = {i: _mark(json.loads(meta), spec.seen_key) for i, meta in base.select("sample_id", "meta").iter_rows()}
    if all(mark is None for mark in marks.values()):
        raise InputError(
            f"no fact has `{spec.seen_key}` in its metadata, so none is known to be trained on",
            "name the source of the facts trained on with `--seen-in NAME`, or the key with `--seen-key KEY`",
        )
    return {i: bool(mark) for i, mark in marks.items()}


def _mark(meta: dict[str, Any], key: str) -> bool | None:
    if key not in meta:
        return None
    text = str(meta[key]).strip().lower().removesuffix(".0")
    if text not in _TRUE | _FALSE | {"none"}:
        raise InputError(f"`{key}` of a fact is {meta[key]!r}, neither true nor false", "use true or false")
    return text in _TRUE
