"""How much of each source was looked at: an answer over a part of a source says nothing of the rest.

From facts: the samples that a source has now, and the sketches that committed runs have of it. Why the rest has none is
in the runs' recipes: candidates were chosen, or a limit given. Where a run took all, the rest failed or came later.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import polars as pl
from sqlalchemy import select
from sqlalchemy.orm import joinedload

from lark_store.query.methods import Method
from lark_store.schema.catalog import Checkpoint, IngestRun, ScoreRun, Sketcher
from lark_store.schema.database import Database, find
from lark_store.schema.vectors import where

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from lark_store.query.groups import Group

COVERAGE = {
    **dict.fromkeys(("sketcher", "checkpoint", "source", "stage", "variant"), pl.String),
    "n_samples": pl.Int64,
    "n_searched": pl.Int64,
    "chosen": pl.String,
    "note": pl.String,
}
_Key = tuple[str, int, int, int, int]  # fingerprint and the ids of sketcher, checkpoint, source and variant


def coverage(db: Database, checkpoint: str | None, sketcher: str | None, method: str | None) -> pl.DataFrame:
    """Say how much of each source was looked at; see `Store.coverage`."""
    if method is not None:
        method = Method.of(method).name
    with db.session() as session:
        wanted: dict[str, int] = {}
        if checkpoint is not None:
            wanted["checkpoint_id"] = find(session, Checkpoint, checkpoint).id
        if sketcher is not None:
            wanted["sketcher_id"] = find(session, Sketcher, sketcher).id
        scored = None if method is None else _scored(session.scalars(select(ScoreRun).filter_by(**wanted)), method)
    return _frame(db, wanted, scored)


def notes_of(db: Database, groups: Collection[Group]) -> tuple[str, ...]:
    """Return the notes on those groups of which not every sample has a sketch."""
    named = {(group.checkpoint.name, group.source.name, group.variant.name) for group in groups}
    at = {(group.sketcher.id, group.checkpoint.id) for group in groups}
    frames = [_frame(db, {"sketcher_id": by, "checkpoint_id": checkpoint}) for by, checkpoint in sorted(at)]
    rows = (row for frame in frames for row in frame.iter_rows(named=True))
    return tuple(r["note"] for r in rows if r["note"] and (r["checkpoint"], r["source"], r["variant"]) in named)


def _scored(runs: Iterable[ScoreRun], method: str) -> dict[_Key, ScoreRun]:
    """Return the run of each group that a method's scores come from: that over the fewest samples, of several."""
    found: dict[_Key, ScoreRun] = {}
    for run in runs:
        if run.status == "done" and run.method == method:
            found[_key(run)] = min(run, found.get(_key(run), run), key=lambda one: one.n_samples)
    return found


def _key(run: IngestRun | ScoreRun) -> _Key:
    return run.fingerprint, run.sketcher_id, run.checkpoint_id, run.source_id, run.variant_id


def _frame(db: Database, wanted: dict[str, int], scored: dict[_Key, ScoreRun] | None = None) -> pl.DataFrame:
    done = select(IngestRun).filter_by(status="done", **wanted).order_by(IngestRun.id)
    loaded = (IngestRun.sketcher, IngestRun.checkpoint, IngestRun.source, IngestRun.variant)
    units: dict[_Key, list[IngestRun]] = {}
    with db.session() as session:
        for run in session.scalars(done.options(*map(joinedload, loaded))):
            units.setdefault(_key(run), []).append(run)
    samples = db.vectors.table("samples") if units else None
    sizes: dict[str, int] = {}
    rows: list[tuple[Any, ...]] = []
    for key, runs in units.items():
        if scored is not None and key not in scored:
            continue
        of = None if scored is None else scored[key]
        read = runs if of is None else [run for run in runs if run.id in of.recipe["ingest_runs"]]
        n_searched = sum(run.n_sketched for run in runs) if of is None else of.n_samples
        run = runs[0]
        source = run.source.name
        if source not in sizes:
            assert samples is not None
            sizes[source] = int(samples.count_rows(where(source=source)))
        chosen = None if n_searched >= sizes[source] else _chosen(read)
        note = _note(run, n_searched, sizes[source], chosen)
        names = (run.sketcher.name, run.checkpoint.name, source, run.source.stage, run.variant.name)
        rows.append((*names, sizes[source], n_searched, chosen, note))
    return pl.DataFrame(rows, schema=COVERAGE, orient="row")


def _chosen(runs: list[IngestRun]) -> str | None:
    """Return how the samples that runs took were chosen; None if one of the runs took all there were."""
    words = [next(_taken(run.recipe), None) for run in runs]
    return None if not words or None in words else " and ".join(dict.fromkeys(word for word in words if word))


def _taken(recipe: dict[str, Any]) -> Iterator[str]:
    if candidates := recipe.get("candidates"):
        yield f"candidates by {candidates['by']} for `{candidates['queries']}`"
    if recipe.get("limit") is not None:
        yield f"the first {recipe['limit']}"


def _note(run: IngestRun, n_searched: int, n_samples: int, chosen: str | None) -> str | None:
    if n_searched >= n_samples:
        return None
    why = f"{chosen}; the rest was never looked at" if chosen else "the rest failed, or came later"
    of = f"`{run.source.name}` as `{run.variant.name}` at `{run.checkpoint.name}`"
    return f"searched {n_searched:,} of {n_samples:,} samples of {of}: {why}"
