"""Checks of samples, failures and scores, row by row."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from lark_store.schema.catalog import ScoreRun, Source
from lark_store.schema.hashes import content_hash
from lark_store.schema.retry import retried
from lark_store.schema.vectors import kind_of
from lark_store.upkeep.check_sketches import delete_rows, deletion
from lark_store.upkeep.findings import Finding, Mend, shown
from lark_store.upkeep.moment import FAULTS, Moment, duplicates, first_line, hashes, run_filter, stream

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from lark_store.schema.database import Database

_SAMPLE_KEYS = ["source", "sample_id"]
_CONTENT = ["prompt", "response", "text"]
_RESTORE = "it can't be made again: restore the store from a backup, or remove the sample and add its file again"
_SCORE_TABLES = ("influence", "source_influence")
_ROWS_AT_ONCE = 500_000


def check_samples(at: Moment) -> tuple[NDArray[np.uint64] | None, list[Finding]]:
    """Check the samples; returns the sorted hashes of their names too, None if they can't be read."""
    try:
        return _check_samples(at)
    except FAULTS as error:
        at.unread.add("samples")
        return None, [Finding("error", "unreadable", "samples", 1, f"{first_line(error)}; restore it from a backup")]


def _check_samples(at: Moment) -> tuple[NDArray[np.uint64], list[Finding]]:
    parts: list[NDArray[np.uint64]] = []
    changed: list[str] = []
    unknown: Counter[str] = Counter()
    known = set(at.names[Source].values())
    for frame in stream(at.vectors, "samples", [*_SAMPLE_KEYS, *_CONTENT, "content_sha256"]):
        parts.append(hashes(frame, _SAMPLE_KEYS))
        for source, sample_id, *content, sha256 in frame.drop("_rowid").iter_rows():
            if content_hash(*content) != sha256:
                changed.append(f"{source}/{sample_id}")
            if source not in known:
                unknown[source] += 1
    findings = []
    if changed:
        detail = f"the content is not what its hash says: {shown(changed)}; {_RESTORE}"
        findings.append(Finding("error", "content", "samples", len(changed), detail))
    for source, n in unknown.items():
        if not at.pause.touches(source=source):
            detail = "an addition was cut off: the source is not in the catalog; run the same `source add` again"
            findings.append(Finding("warning", "unknown source", f"source {source}", n, detail))
    findings += _doubled_samples(at)
    return np.unique(np.concatenate(parts)) if parts else np.empty(0, np.uint64), findings


def _doubled_samples(at: Moment) -> Iterator[Finding]:
    """Yield samples that are there twice: of those that are the same in all columns, one can go."""
    columns = at.vectors.table("samples").schema.names
    rows = duplicates(at.vectors, "samples", _SAMPLE_KEYS, [name for name in columns if name not in _SAMPLE_KEYS])
    if rows.is_empty():
        return
    names = rows.select(pl.concat_str(_SAMPLE_KEYS, separator="/")).to_series().unique(maintain_order=True)
    extra = rows.sort("_rowid").filter(~pl.struct(columns).is_first_distinct())
    others = len(rows) - len(names) - len(extra)
    if len(extra):
        ids = extra["_rowid"].to_numpy()
        mend = Mend("delete all but one", lambda db: delete_rows(db, "samples", ids))
        detail = f"samples that are there twice, all the same: {shown(names)}"
        yield Finding("error", "duplicate key", "samples", len(extra), detail, mend)
    if others:
        detail = f"samples of one id with different contents, see {shown(names)}; {_RESTORE}"
        yield Finding("error", "duplicate key", "samples", others, detail)


def check_embeddings(at: Moment, samples: NDArray[np.uint64] | None) -> Iterator[Finding]:
    """Yield embeddings that are there twice, and those of samples that are not in the store."""
    for table in (name for name in at.vectors.table_names() if kind_of(name) == "embeddings"):
        try:
            rows = duplicates(at.vectors, table, _SAMPLE_KEYS, []).sort("_rowid")
            extra = rows.filter(~pl.struct(_SAMPLE_KEYS).is_first_distinct())["_rowid"].to_numpy()
            if len(extra):
                yield Finding(
                    "error",
                    "duplicate key",
                    table,
                    len(extra),
                    "embeddings that are there twice",
                    deletion(table, extra),
                )
            if samples is None:
                continue
            orphans = [
                frame["_rowid"].to_numpy()[~np.isin(hashes(frame, _SAMPLE_KEYS), samples)]
                for frame in stream(at.vectors, table, _SAMPLE_KEYS)
            ]
            gone = np.concatenate(orphans) if orphans else np.empty(0, np.uint64)
            if len(gone):
                detail = "embeddings of samples that are not in the store"
                yield Finding("warning", "orphan rows", table, len(gone), detail, deletion(table, gone))
        except FAULTS as error:
            yield Finding("error", "unreadable", table, 1, f"{first_line(error)}; restore it from a backup")


def _per_run(at: Moment, table: str, column: str) -> dict[int, int]:
    counts: dict[int, int] = defaultdict(int)
    for frame in stream(at.vectors, table, [column]):
        for run, n in frame.group_by(column).len().rows():
            counts[run] += n
    return counts


def _forget(table: str, column: str, run: int) -> Mend:
    def act(db: Database) -> None:
        retried(lambda: db.vectors.table(table).delete(run_filter(column, [run])), f"rows of `{table}` can't go")

    return Mend("delete the rows", act)


def check_failures(at: Moment) -> Iterator[Finding]:
    """Yield failures that belong to no run."""
    try:
        counts = _per_run(at, "failures", "ingest_run")
    except FAULTS as error:
        yield Finding("error", "unreadable", "failures", 1, first_line(error))
        return
    for run, n in counts.items():
        if run not in at.ingest_runs:
            mend = _forget("failures", "ingest_run", run)
            yield Finding("warning", "orphan rows", f"failures of ingest run {run}", n, "there is no such run", mend)


# --- scores --------------------------------------------------------------------------------------------------------


def check_scores(at: Moment, samples: NDArray[np.uint64] | None) -> Iterator[Finding]:
    """Yield score runs whose rows are not what they say, and rows of runs that nobody reads."""
    try:
        counts = {table: _per_run(at, table, "score_run") for table in _SCORE_TABLES}
        yield from _dead_rows(at, counts)
        done = [run for run in at.score_runs.values() if run.status == "done"]
        for some in _portions(done, counts["influence"]):
            filter_ = run_filter("score_run", [run.id for run in some])
            tops = _read(at, "influence", ["query_id", "sample_id", "score", "rank"], filter_)
            sums = _read(at, "source_influence", ["query_id", "max", "argmax", "mean", "std", "n"], filter_)
            for run in some:
                of_run = tops.filter(score_run=run.id), sums.filter(score_run=run.id)
                wrong = _wrong(at, run, *of_run, samples)
                if wrong:
                    yield Finding("error", "scores", at.label(run), len(wrong), "; ".join(wrong), _supersede(run.id))
    except FAULTS as error:
        yield Finding("error", "unreadable", "influence", 1, first_line(error))


def _read(at: Moment, table: str, columns: list[str], filter_: str) -> pl.DataFrame:
    return at.vectors.read(table, ["score_run", "checkpoint", "source", "variant", *columns], filter_)


def _portions(runs: list[ScoreRun], counts: dict[int, int]) -> Iterator[list[ScoreRun]]:
    """Yield runs in portions of a bounded number of rows."""
    some: list[ScoreRun] = []
    n = 0
    for run in runs:
        if some and n + counts.get(run.id, 0) > _ROWS_AT_ONCE:
            yield some
            some, n = [], 0
        some.append(run)
        n += counts.get(run.id, 0)
    if some:
        yield some


def _dead_rows(at: Moment, counts: dict[str, dict[int, int]]) -> Iterator[Finding]:
    scoring = any(work["touches"] is None for work in at.pause.works)
    for table, per_run in counts.items():
        for run_id, n in sorted(per_run.items()):
            run, where = at.score_runs.get(run_id), f"{table} of score run {run_id}"
            mend = _forget(table, "score_run", run_id)
            if run is None:
                yield Finding(
                    "error", "orphan rows", where, n, "no score run has their number; the next may get it", mend
                )
            elif run.status == "superseded" and not scoring:
                yield Finding("warning", "orphan rows", where, n, "the run is superseded; nobody reads them", mend)
    if not scoring:
        for run in at.score_runs.values():
            if run.status in {"running", "interrupted", "failed"}:
                n = sum(per_run.get(run.id, 0) for per_run in counts.values())
                detail = f"{run.status}, and nobody is at work on it: nobody reads its rows; `attribute` scores it anew"
                yield Finding("note", "stale run", at.label(run), n, detail, _supersede(run.id))


def _supersede(run_id: int) -> Mend:
    def act(db: Database) -> None:
        with db.session() as session:
            session.get_one(ScoreRun, run_id).status = "superseded"

    return Mend("supersede the run; `attribute` scores it again", act)


def _wrong(
    at: Moment, run: ScoreRun, tops: pl.DataFrame, sums: pl.DataFrame, samples: NDArray[np.uint64] | None
) -> list[str]:
    """Return what is wrong with a committed run."""
    return [*_wrong_groups(at, run), *_wrong_names(at, run, tops, sums), *_wrong_values(run, tops, sums, samples)]


def _wrong_groups(at: Moment, run: ScoreRun) -> Iterator[str]:
    """Compare the rows that a run scored with those that its ingest runs have."""
    for key, n, what in (("ingest_runs", run.n_samples, "samples"), ("query_ingest_runs", run.n_queries, "queries")):
        of_runs = [at.ingest_runs.get(number) for number in run.recipe.get(key, [])]
        if any(of is None or of.status != "done" for of in of_runs):
            yield f"ingest runs of its {what} are gone or not committed"
        elif of_runs and "weights" not in run.recipe and not at.unread and not at.broken and run.n_samples:
            have = sum(at.counts.get(of.id, 0) for of in of_runs if of)
            if have != n:
                yield f"it scored {n} {what}, its ingest runs have {have}"


def _wrong_names(at: Moment, run: ScoreRun, tops: pl.DataFrame, sums: pl.DataFrame) -> Iterator[str]:
    for frame in (tops, sums):
        n = len(frame.filter(pl.any_horizontal([pl.col(c) != name for c, name in at.names_of(run).items()])))
        if n:
            yield f"{n} rows name another checkpoint, source or variant"


def _wrong_values(
    run: ScoreRun, tops: pl.DataFrame, sums: pl.DataFrame, samples: NDArray[np.uint64] | None
) -> Iterator[str]:
    n_queries = run.n_queries if run.n_samples else 0
    if len(sums) != n_queries or sums["query_id"].n_unique() != n_queries:
        yield f"source_influence has {len(sums)} rows for {n_queries} queries"
    hits = min(int(run.recipe.get("hits", 0)), run.n_samples)
    per_query = (
        tops.sort("query_id", "rank").group_by("query_id", maintain_order=True).agg("rank", "score", "sample_id")
    )
    ranks = list(range(1, hits + 1))
    uneven = per_query.filter(pl.Series([row != ranks for row in per_query["rank"].to_list()], dtype=pl.Boolean))
    if len(per_query) != n_queries or len(uneven):
        yield f"influence has not ranks 1 to {hits} for each of {n_queries} queries"
    if (sums["n"] != run.n_samples).any():
        yield f"source_influence counts other samples than {run.n_samples}"
    figures = [*(sums[c] for c in ("max", "mean", "std")), tops["score"]]
    if not all(figure.is_finite().all() for figure in figures):
        yield "scores are not numbers"
    best = sums.join(tops.filter(rank=1), on="query_id", how="inner")
    if len(best.filter((pl.col("max") != pl.col("score")) | (pl.col("argmax") != pl.col("sample_id")))):
        yield "the maximum is not the score of rank 1"
    if not tops.sort("query_id", "rank").select((pl.col("score").diff() <= 0).over("query_id").all()).item():
        yield "scores do not fall with their ranks"
    if samples is not None and not np.isin(hashes(tops, ["source", "sample_id"]), samples).all():
        yield "samples among its hits are not in the store"
