"""Coverage: the share of each source searched. An answer over part of a source says nothing about the rest.

Computed from the samples in a source now and the sketches of committed runs. The runs' recipes explain the rest:
candidates were chosen, or a limit was set. If a run took all samples, the rest failed or was added later.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import polars as pl
import pyarrow as pa
from sqlalchemy import select
from sqlalchemy.orm import joinedload

from lark_store.query.methods import Method
from lark_store.schema.catalog import Checkpoint, IngestRun, ScoreRun, Sketcher
from lark_store.schema.database import Database, find
from lark_store.schema.table_schemas import sketch_table
from lark_store.schema.vectors import where

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from lark_store.query.select.resolve import Group

COVERAGE = {
    **dict.fromkeys(("sketcher", "checkpoint", "source", "stage", "variant"), pl.String),
    "n_samples": pl.Int64,
    "n_searched": pl.Int64,
    "n_truncated": pl.Int64,
    "n_cut": pl.Int64,
    "chosen": pl.String,
    "note": pl.String,
}
_BLOCK = 1 << 16  # rows
_Cut = tuple[int | None, int | None]  # truncated samples, and the tokens cut off them
_Key = tuple[str, int, int, int, int]  # fingerprint and the ids of sketcher, checkpoint, source and variant


def coverage(
    db: Database,
    checkpoint: str | None,
    sketcher: str | None,
    method: str | None,
    query_checkpoint: str | None = None,
) -> pl.DataFrame:
    """Return the coverage of each source; see `Store.coverage`."""
    if method is not None:
        method = Method.of(method).name
    with db.session() as session:
        filters: dict[str, int] = {}
        if checkpoint is not None:
            filters["checkpoint_id"] = find(session, Checkpoint, checkpoint).id
        if sketcher is not None:
            filters["sketcher_id"] = find(session, Sketcher, sketcher).id
        scores = select(ScoreRun).filter_by(**filters)
        if query_checkpoint is None:
            scores = scores.where(ScoreRun.query_checkpoint_id == ScoreRun.checkpoint_id)
        else:
            scores = scores.filter_by(query_checkpoint_id=find(session, Checkpoint, query_checkpoint).id)
        scored = None if method is None else _scored(session.scalars(scores), method)
    return _frame(db, filters, scored, counted=True)


def notes_of(db: Database, groups: Collection[Group]) -> tuple[str, ...]:
    """Return the coverage notes of groups with unsketched samples."""
    names = {(group.checkpoint.name, group.source.name, group.variant.name) for group in groups}
    units = {(group.sketcher.id, group.checkpoint.id) for group in groups}
    frames = [
        _frame(db, {"sketcher_id": sketcher, "checkpoint_id": checkpoint}) for sketcher, checkpoint in sorted(units)
    ]
    rows = (row for frame in frames for row in frame.iter_rows(named=True))
    return tuple(r["note"] for r in rows if r["note"] and (r["checkpoint"], r["source"], r["variant"]) in names)


def _scored(runs: Iterable[ScoreRun], method: str) -> dict[_Key, ScoreRun]:
    """Return each group's score run by a method; of several, the run over the fewest samples."""
    runs_by_key: dict[_Key, ScoreRun] = {}
    for run in runs:
        if run.status == "done" and run.method == method:
            runs_by_key[_key(run)] = min(
                run, runs_by_key.get(_key(run), run), key=lambda candidate: candidate.n_samples
            )
    return runs_by_key


def _key(run: IngestRun | ScoreRun) -> _Key:
    return run.fingerprint, run.sketcher_id, run.checkpoint_id, run.source_id, run.variant_id


def _cuts(db: Database, fingerprints: Iterable[str]) -> dict[int, _Cut]:
    """Return each ingest run's number of truncated samples and cut tokens; None where a row has no count.

    Omits runs without rows.
    """
    cuts: dict[int, _Cut] = {}
    for fingerprint in fingerprints:
        if not db.vectors.has(sketch_table(fingerprint)):
            continue
        batches = db.vectors.scan(sketch_table(fingerprint), ["ingest_run", "n_cut"], batch_rows=_BLOCK)
        for block in _blocks(batches, _BLOCK):
            cut = pl.col("n_cut")
            is_complete = cut.null_count() == 0
            sums = (pl.when(is_complete).then((cut > 0).sum()), pl.when(is_complete).then(cut.sum()))
            per_run = block.group_by("ingest_run").agg(n_truncated=sums[0], n_cut=sums[1])
            for run, n_truncated, n_cut in per_run.iter_rows():
                cuts[run] = _sum([cuts.get(run, (0, 0)), (n_truncated, n_cut)])
    return cuts


def _blocks(batches: Iterable[pa.RecordBatch], n_rows: int) -> Iterator[pl.DataFrame]:
    """Yield frames of at least `n_rows` rows: the batches of a table that was never compacted are small."""
    waiting: list[pa.RecordBatch] = []
    n_waiting = 0
    for batch in batches:
        waiting.append(batch)
        n_waiting += len(batch)
        if n_waiting >= n_rows:
            yield pl.DataFrame(pa.Table.from_batches(waiting))
            waiting, n_waiting = [], 0
    if waiting:
        yield pl.DataFrame(pa.Table.from_batches(waiting))


def _sum(pairs: Iterable[_Cut]) -> _Cut:
    """Add up pairs; an unknown number makes the sum unknown."""
    n_truncated: int | None = 0
    n_cut: int | None = 0
    for truncated, cut in pairs:
        n_truncated = None if n_truncated is None or truncated is None else n_truncated + truncated
        n_cut = None if n_cut is None or cut is None else n_cut + cut
    return n_truncated, n_cut


def _frame(
    db: Database, filters: dict[str, int], scored: dict[_Key, ScoreRun] | None = None, *, counted: bool = False
) -> pl.DataFrame:
    """Return a row per group. `counted` fills the truncation counts, which takes reading the sketches."""
    committed = select(IngestRun).filter_by(status="done", **filters).order_by(IngestRun.id)
    loaded = (IngestRun.sketcher, IngestRun.checkpoint, IngestRun.source, IngestRun.variant)
    units: dict[_Key, list[IngestRun]] = {}
    with db.session() as session:
        for run in session.scalars(committed.options(*map(joinedload, loaded))):
            units.setdefault(_key(run), []).append(run)
    samples = db.vectors.table("samples") if units else None
    cuts = _cuts(db, {key[0] for key in units}) if counted else {}
    sizes: dict[str, int] = {}
    rows: list[tuple[Any, ...]] = []
    for key, runs in units.items():
        if scored is not None and key not in scored:
            continue
        score_run = None if scored is None else scored[key]
        read = runs if score_run is None else [run for run in runs if run.id in score_run.recipe["ingest_runs"]]
        n_searched = sum(run.n_sketched for run in runs) if score_run is None else score_run.n_samples
        run = runs[0]
        source = run.source.name
        if source not in sizes:
            assert samples is not None
            sizes[source] = int(samples.count_rows(where(source=source)))
        selection = None if n_searched >= sizes[source] else _selection(read)
        note = _note(run, n_searched, sizes[source], selection)
        names = (run.sketcher.name, run.checkpoint.name, source, run.source.stage, run.variant.name)
        cut = _sum(cuts.get(run.id, (0, 0)) for run in read) if counted else (None, None)
        rows.append((*names, sizes[source], n_searched, *cut, selection, note))
    return pl.DataFrame(rows, schema=COVERAGE, orient="row")


def _selection(runs: list[IngestRun]) -> str | None:
    """Return how the samples of the runs were chosen; None if a run took all of them."""
    words = [next(_selected_by(run.recipe), None) for run in runs]
    return None if not words or None in words else " and ".join(dict.fromkeys(word for word in words if word))


def _selected_by(recipe: dict[str, Any]) -> Iterator[str]:
    if candidates := recipe.get("candidates"):
        yield f"candidates by {candidates['by']} for `{candidates['queries']}`"
    if recipe.get("limit") is not None:
        yield f"the first {recipe['limit']}"


def _note(run: IngestRun, n_searched: int, n_samples: int, selection: str | None) -> str | None:
    if n_searched >= n_samples:
        return None
    reason = f"{selection}; the rest was not searched" if selection else "the rest failed or was added later"
    group = f"`{run.source.name}` as `{run.variant.name}` at `{run.checkpoint.name}`"
    return f"searched {n_searched:,} of {n_samples:,} samples of {group}: {reason}"
