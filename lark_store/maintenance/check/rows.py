"""Row checks of samples, embeddings, failures and scores."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from lark_store.core.retry import retry
from lark_store.maintenance.check.checksums import CHANGED, MISSING, check_checksums, checked_rows, without_checksum
from lark_store.maintenance.check.findings import Finding, Repair, name_list
from lark_store.maintenance.check.frozen_store import FrozenStore, duplicates, hashes, run_filter, stream
from lark_store.maintenance.delete_rows import delete_rows, deletion
from lark_store.schema.catalog import ScoreRun, Source
from lark_store.schema.chats import CONTENT, sample_hash
from lark_store.schema.checksums import score_checksums
from lark_store.schema.faults import FAULTS, first_line
from lark_store.schema.score_inputs import GROUP_KEYS, has_valid_inputs, n_common, query_groups, scored_groups
from lark_store.schema.table_schemas import INFLUENCE, SAMPLES, SOURCE_INFLUENCE, kind_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from lark_store.schema.database import Database

_SAMPLE_KEYS = ["source", "sample_id"]
_RESTORE = "it can't be recomputed: restore a backup, or remove the sample and add its file again"
_SCORE_TABLES = ("influence", "source_influence")
_ROWS_PER_PORTION = 500_000


def check_samples(store: FrozenStore) -> list[Finding]:
    """Return problems of the samples, and fill `store.samples`."""
    try:
        return _check_samples(store)
    except (*FAULTS, pl.exceptions.PolarsError) as error:
        store.unreadable.add("samples")
        return [Finding("error", "unreadable", "samples", 1, f"{first_line(error)}; restore it from a backup")]


def _check_samples(store: FrozenStore) -> list[Finding]:
    parts: list[NDArray[np.uint64]] = []
    wrong_content: list[str] = []
    wrong_checksum: list[str] = []
    n_missing = 0
    unknown_sources: Counter[str] = Counter()
    sources = set(store.names[Source].values())
    for frame in stream(store.vectors, "samples", SAMPLES.names):
        parts.append(hashes(frame, _SAMPLE_KEYS))
        states = checked_rows(frame)
        n_missing += int((states == MISSING).sum())
        rows = frame.select(*_SAMPLE_KEYS, *CONTENT, "content_sha256").iter_rows()
        for (source, sample_id, *content, sha256), state in zip(rows, states, strict=True):
            if sample_hash(*content) != sha256:
                wrong_content.append(f"{source}/{sample_id}")
            elif state == CHANGED:
                wrong_checksum.append(f"{source}/{sample_id}")
            if source not in sources:
                unknown_sources[source] += 1
    findings = list(without_checksum("samples", n_missing))
    if wrong_checksum:
        detail = f"label, metadata or another value has changed: {name_list(wrong_checksum)}; {_RESTORE}"
        findings.append(Finding("error", "checksum", "samples", len(wrong_checksum), detail))
    if wrong_content:
        detail = f"the content does not match its hash: {name_list(wrong_content)}; {_RESTORE}"
        findings.append(Finding("error", "content", "samples", len(wrong_content), detail))
    for source, n in unknown_sources.items():
        if not store.pause.touches(source=source):
            detail = "an addition was interrupted: the source is not in the catalog; run the same `source add` again"
            findings.append(Finding("warning", "unknown source", f"source {source}", n, detail))
    findings += _duplicate_samples(store)
    store.samples = np.unique(np.concatenate(parts)) if parts else np.empty(0, np.uint64)
    return findings


def _duplicate_samples(store: FrozenStore) -> Iterator[Finding]:
    """Yield duplicate samples; a repair removes those that agree in all columns."""
    columns = store.vectors.table("samples").schema.names
    rows = duplicates(store.vectors, "samples", _SAMPLE_KEYS, [name for name in columns if name not in _SAMPLE_KEYS])
    if rows.is_empty():
        return
    names = rows.select(pl.concat_str(_SAMPLE_KEYS, separator="/")).to_series().unique(maintain_order=True)
    extra = rows.sort("_rowid").filter(~pl.struct(columns).is_first_distinct())
    n_conflicts = len(rows) - len(names) - len(extra)
    if len(extra):
        ids = extra["_rowid"].to_numpy()
        repair = Repair("delete all but one", lambda db: delete_rows(db, "samples", ids))
        detail = f"identical duplicate samples: {name_list(names)}"
        yield Finding("error", "duplicate key", "samples", len(extra), detail, repair)
    if n_conflicts:
        detail = f"samples with the same id and different contents, see {name_list(names)}; {_RESTORE}"
        yield Finding("error", "duplicate key", "samples", n_conflicts, detail)


def check_embeddings(store: FrozenStore) -> Iterator[Finding]:
    """Yield duplicate embeddings, and embeddings of missing samples."""
    for table in (name for name in store.vectors.table_names() if kind_of(name) == "embeddings"):
        try:
            rows = duplicates(store.vectors, table, _SAMPLE_KEYS, []).sort("_rowid")
            extra = rows.filter(~pl.struct(_SAMPLE_KEYS).is_first_distinct())["_rowid"].to_numpy()
            if len(extra):
                detail = "duplicate embeddings"
                yield Finding("error", "duplicate key", table, len(extra), detail, deletion(table, extra))
            yield from check_checksums(store, table, "embeddings", "delete the rows; `ingest` recomputes them")
            if store.samples is None:
                continue
            orphans = [
                frame["_rowid"].to_numpy()[~np.isin(hashes(frame, _SAMPLE_KEYS), store.samples)]
                for frame in stream(store.vectors, table, _SAMPLE_KEYS)
            ]
            ids = np.concatenate(orphans) if orphans else np.empty(0, np.uint64)
            if len(ids):
                detail = "embeddings of samples that are not in the store"
                yield Finding("warning", "orphan rows", table, len(ids), detail, deletion(table, ids))
        except FAULTS as error:
            yield Finding("error", "unreadable", table, 1, f"{first_line(error)}; restore it from a backup")


def rows_per_run(store: FrozenStore, table: str, column: str) -> dict[int, int]:
    """Return the number of a table's rows per run id."""
    counts: dict[int, int] = defaultdict(int)
    for frame in stream(store.vectors, table, [column]):
        for run, n in frame.group_by(column).len().rows():
            counts[run] += n
    return counts


def row_deletion(table: str, column: str, run: int) -> Repair:
    """Return a repair that deletes the rows of a run."""

    def delete(db: Database) -> None:
        retry(lambda: db.vectors.table(table).delete(run_filter(column, [run])), f"rows of `{table}` can't be deleted")

    return Repair("delete the rows", delete)


def check_failures(store: FrozenStore) -> Iterator[Finding]:
    """Yield failures without a run."""
    try:
        yield from check_checksums(store, "failures", "reasons of failures", "delete the rows")
        counts = rows_per_run(store, "failures", "ingest_run")
    except FAULTS as error:
        yield Finding("error", "unreadable", "failures", 1, first_line(error))
        return
    for run, n in counts.items():
        if run not in store.ingest_runs:
            repair = row_deletion("failures", "ingest_run", run)
            location = f"failures of ingest run {run}"
            yield Finding("warning", "orphan rows", location, n, "the run does not exist", repair)


# --- scores --------------------------------------------------------------------------------------------------------


def check_scores(store: FrozenStore) -> Iterator[Finding]:
    """Yield score runs that contradict their rows, and rows of runs that are never read."""
    try:
        counts = {table: rows_per_run(store, table, "score_run") for table in _SCORE_TABLES}
        yield from _unread_rows(store, counts)
        done = [run for run in store.score_runs.values() if run.status == "done"]
        n_missing = 0
        for portion in _portions(done, counts["influence"]):
            filter_ = run_filter("score_run", [run.id for run in portion])
            tops = store.vectors.read("influence", INFLUENCE.names, filter_)
            sums = store.vectors.read("source_influence", SOURCE_INFLUENCE.names, filter_)
            n_missing += sums["checksum"].null_count()
            for run in portion:
                run_rows = tops.filter(score_run=run.id), sums.filter(score_run=run.id)
                problems = _problems(store, run, *run_rows) or list(_changed(*run_rows))
                if problems:
                    detail = "; ".join(problems)
                    yield Finding("error", "scores", store.label(run), len(problems), detail, _supersede(run.id))
        yield from without_checksum("source_influence", n_missing)
    except FAULTS as error:
        yield Finding("error", "unreadable", "influence", 1, first_line(error))


def _changed(tops: pl.DataFrame, sums: pl.DataFrame) -> Iterator[str]:
    """Compare the rows of each query with their checksum."""
    stored = sums["checksum"]
    n_changed = (stored != pl.Series(score_checksums(sums.to_arrow(), tops.to_arrow()), dtype=pl.Int64)).sum()
    if n_changed:
        yield f"the scores of {n_changed} queries changed after they were written"


def _portions(runs: list[ScoreRun], counts: dict[int, int]) -> Iterator[list[ScoreRun]]:
    """Yield runs in portions with a bounded number of rows."""
    portion: list[ScoreRun] = []
    n = 0
    for run in runs:
        if portion and n + counts.get(run.id, 0) > _ROWS_PER_PORTION:
            yield portion
            portion, n = [], 0
        portion.append(run)
        n += counts.get(run.id, 0)
    if portion:
        yield portion


def _unread_rows(store: FrozenStore, counts: dict[str, dict[int, int]]) -> Iterator[Finding]:
    scoring = any(work["touches"] is None for work in store.pause.works)
    for table, per_run in counts.items():
        for run_id, n in sorted(per_run.items()):
            run, location = store.score_runs.get(run_id), f"{table} of score run {run_id}"
            repair = row_deletion(table, "score_run", run_id)
            if run is None:
                detail = "their score run does not exist; a new run may get its id"
                yield Finding("error", "orphan rows", location, n, detail, repair)
            elif run.status == "superseded" and not scoring:
                detail = "their run is superseded; they are never read"
                yield Finding("warning", "orphan rows", location, n, detail, repair)
    if not scoring:
        for run in store.score_runs.values():
            if run.status in {"running", "interrupted", "failed"}:
                n = sum(per_run.get(run.id, 0) for per_run in counts.values())
                detail = f"{run.status}, without a running process: its rows are not read; `attribute` scores it again"
                yield Finding("note", "stale run", store.label(run), n, detail, _supersede(run.id))


def _supersede(run_id: int) -> Repair:
    def supersede(db: Database) -> None:
        with db.session() as session:
            session.get_one(ScoreRun, run_id).status = "superseded"

    return Repair("supersede the run; `attribute` scores it again", supersede)


def _problems(store: FrozenStore, run: ScoreRun, tops: pl.DataFrame, sums: pl.DataFrame) -> list[str]:
    """Return the problems of a committed run."""
    return [
        *_wrong_groups(store, run),
        *_wrong_names(store, run, tops, sums),
        *_wrong_values(run, tops, sums, store.samples),
    ]


def _wrong_groups(store: FrozenStore, run: ScoreRun) -> Iterator[str]:
    """Compare the number of scored rows with the rows of the ingest runs."""
    if not has_valid_inputs(run, store.ingest_runs, GROUP_KEYS):
        yield "ingest runs of its samples or queries are missing or not committed"
        return
    if store.unreadable or store.broken:
        return
    for groups, n, label in (
        (scored_groups(run, store.ingest_runs), run.n_samples, "samples"),
        (query_groups(run, store.ingest_runs) if run.n_samples else [], run.n_queries, "queries"),
    ):
        if not groups:
            continue
        if len(groups) == 1:
            n_rows = sum(store.counts.get(ingest.id, 0) for ingest in groups[0])
        else:
            n_rows = n_common(store.vectors, groups)
        if n_rows != n:
            yield f"it scored {n} {label}, its ingest runs have {n_rows}"


def _wrong_names(store: FrozenStore, run: ScoreRun, tops: pl.DataFrame, sums: pl.DataFrame) -> Iterator[str]:
    for frame in (tops, sums):
        n = len(frame.filter(pl.any_horizontal([pl.col(c) != name for c, name in store.names_of(run).items()])))
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
        yield f"influence lacks ranks 1 to {hits} for some of {n_queries} queries"
    if (sums["n"] != run.n_samples).any():
        yield f"source_influence does not count {run.n_samples} samples"
    figures = [*(sums[c] for c in ("max", "mean", "std")), tops["score"]]
    if not all(figure.is_finite().all() for figure in figures):
        yield "scores are not finite"
    best = sums.join(tops.filter(rank=1), on="query_id", how="inner")
    if len(best.filter((pl.col("max") != pl.col("score")) | (pl.col("argmax") != pl.col("sample_id")))):
        yield "the maximum is not the score of rank 1"
    if not tops.sort("query_id", "rank").select((pl.col("score").diff() <= 0).over("query_id").all()).item():
        yield "scores do not decrease with rank"
    if samples is not None and not np.isin(hashes(tops, ["source", "sample_id"]), samples).all():
        yield "some of its hits are not in the store"
