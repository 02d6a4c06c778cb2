"""`index build`: measure the number of candidates an approximate search needs, and its recall.

Codes are written with the sketches, so the index stays current when sketches are added or removed. Queries are searched
exactly and by codes: one half determines the number of candidates, the other half measures the recall.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from sqlalchemy import func, select

from lark_store.errors import NothingToScoreError, StoreBusyError
from lark_store.query.scoring.products import Queries, matrix, units
from lark_store.query.select.hints import for_sketches
from lark_store.query.select.resolve import Group, committed_groups
from lark_store.query.select.rows import Rows, find_rows
from lark_store.results import Progress
from lark_store.schema.catalog import IngestRun, SearchIndex, Sketcher
from lark_store.schema.catalog_base import now
from lark_store.schema.database import find, lock_catalog
from lark_store.schema.table_schemas import sketch_table

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from lark_store.results import OnProgress
    from lark_store.schema.database import Database

_AIM = 0.995  # target recall on the queries that determine the number of candidates
_CHOICES = (50, 100, 200, 400, 800, 1_600, 3_200)
_K = 10
_MOST_QUERIES = 100
_ATTEMPTS = 3


def find_index(db: Database, fingerprint: str, sketcher: str) -> SearchIndex:
    """Return the measurements of a sketch table.

    Raises
    ------
    NothingToScoreError
        There are none yet.
    """
    with db.session() as session:
        index = session.get(SearchIndex, fingerprint)
    if index is None:
        raise NothingToScoreError(
            f"the sketches of `{sketcher}` have no approximate index",
            "leave out `--approximate`: a snapshot is read-only"
            if db.is_snapshot
            else f"build it with `lark-store index build {sketcher}`",
        )
    return index


def build(db: Database, sketcher: str, on_progress: OnProgress | None = None) -> list[SearchIndex]:
    """Measure the codes of a sketcher's tables; see `Store.index_build`."""
    with db.session() as session:
        sketcher_row = find(session, Sketcher, sketcher)
    groups = _groups(db, sketcher_row)
    if not groups:
        raise NothingToScoreError(f"`{sketcher}` has no committed sketches", for_sketches(db, sketcher_row, None))
    indices = []
    for fingerprint in groups:
        db.vectors.refresh_indices(db.vectors.table(sketch_table(fingerprint)))
        indices.append(_settled(db, sketcher_row, fingerprint, on_progress))
    return indices


def _groups(db: Database, sketcher: Sketcher) -> dict[str, list[list[Group]]]:
    """Return a sketcher's groups by table, grouped by checkpoint."""
    groups: dict[str, list[list[Group]]] = {}
    with db.session() as session:
        runs = select(IngestRun).filter_by(sketcher_id=sketcher.id, status="done").where(IngestRun.n_sketched > 0)
        checkpoints = {run.checkpoint_id: run.checkpoint for run in session.scalars(runs)}
        for checkpoint in checkpoints.values():
            for group in committed_groups(session, sketcher, checkpoint):
                per_checkpoint = groups.setdefault(group.fingerprint, [])
                if not per_checkpoint or per_checkpoint[-1][0].checkpoint.id != checkpoint.id:
                    per_checkpoint.append([])
                per_checkpoint[-1].append(group)
    return groups


def _settled(db: Database, sketcher: Sketcher, fingerprint: str, on_progress: OnProgress | None) -> SearchIndex:
    """Measure a table and store the result if the measured rows still exist; else measure again.

    Sketchers with the same settings share a table: newer measurements over more rows take precedence.
    """
    for _ in range(_ATTEMPTS):
        started = now()
        groups = _groups(db, sketcher).get(fingerprint, [])
        index = _measure(db, fingerprint, groups, on_progress)
        measured = {run for checkpoint_groups in groups for group in checkpoint_groups for run in group.runs}
        with db.session() as session:
            lock_catalog(session)
            standing = select(func.count()).where(IngestRun.id.in_(measured), IngestRun.status == "done")
            if session.scalar(standing) != len(measured):
                continue
            newer = session.get(SearchIndex, fingerprint)
            if newer is not None and newer.built_at > started and newer.n_rows > index.n_rows:
                return newer
            session.merge(index)
            return index
    raise StoreBusyError(
        f"the sketches of `{sketcher.name}` were replaced during the measurement", "run `index build` again"
    )


def _measure(
    db: Database, fingerprint: str, per_checkpoint: list[list[Group]], on_progress: OnProgress | None
) -> SearchIndex:
    share = max(2, _MOST_QUERIES // len(per_checkpoint))
    places: list[NDArray[np.int64]] = []
    n_rows = 0
    for number, groups in enumerate(per_checkpoint):
        if on_progress:
            on_progress(Progress("measuring the approximate search", number, len(per_checkpoint)))
        rows = find_rows(db, groups)
        places += _places(db, rows, share)
        n_rows += len(rows)
    if not places:
        raise NothingToScoreError("too few sketches to measure a search", "ingest more samples")
    chosen_by, held_out = places[::2], places[1::2] or places
    candidates = next((n for n in _CHOICES if _recall(chosen_by, n) >= _AIM), _CHOICES[-1])
    recall = _recall(held_out, candidates)
    return SearchIndex(
        fingerprint=fingerprint,
        candidates=candidates,
        recall=recall,
        n_queries=len(held_out),
        n_rows=n_rows,
        built_at=now(),
    )


def _recall(places: Iterable[NDArray[np.int64]], candidates: int) -> float:
    """Return the share of the exact best ranked among the first `candidates` by code."""
    return float(np.mean(np.concatenate(list(places)) < candidates))


def _places(db: Database, rows: Rows, share: int) -> list[NDArray[np.int64]]:
    """Return, for some queries at one checkpoint, the ranks by code (from 0) of their exact top ten."""
    from lark_store.query.scoring.ann import estimates

    numbers = _drawn(rows, share)
    sketches = _sketches(rows, numbers)
    exact, _ = matrix(rows, sketches)
    searched = ~_is_query(rows)
    ranks = []
    for query, number in enumerate(numbers):
        eligible = np.flatnonzero(searched & (np.arange(len(rows)) != number))  # excludes the query itself
        best = eligible[np.argsort(-exact[query][eligible], kind="stable")[:_K]]
        guess = estimates(db, rows, sketches.unit_QK[query])
        order = np.sort(-guess[eligible])
        ranks.append(np.searchsorted(order, -guess[best], side="left"))
    return [places for places in ranks if len(places)]


def _drawn(rows: Rows, share: int) -> NDArray[np.int64]:
    """Draw the rows used as queries, always the same: rows of query sources, or any rows without them."""
    is_query = _is_query(rows)
    pool = np.flatnonzero(is_query) if is_query.any() else np.arange(len(rows))
    drawn: NDArray[np.int64] = np.random.default_rng(0).permutation(pool)[:share]
    return drawn


def _is_query(rows: Rows) -> NDArray[np.bool_]:
    """Return which rows are queries, (N); none if there are only queries."""
    is_query = np.array([group.source.stage == "query" for group in rows.groups])
    of_rows: NDArray[np.bool_] = (is_query & ~is_query.all())[rows.frame["group"].to_numpy()]
    return of_rows


def _sketches(rows: Rows, numbers: NDArray[np.int64]) -> Queries:
    selected = rows.only(numbers)
    unit: Any = None
    for places, unit_BK in units(selected):
        unit = np.empty((len(selected), unit_BK.shape[1]), np.float32) if unit is None else unit
        unit[places] = unit_BK
    norms = selected.frame["grad_norm"].to_numpy().copy()
    return Queries(selected.frame["sample_id"].to_list(), unit, norms)


def report(indices: list[SearchIndex]) -> pl.DataFrame:
    """Return the measurements as a frame; see `Store.index_build`."""
    names = ("fingerprint", "n_rows", "candidates", "recall", "n_queries")
    kinds = {"fingerprint": pl.String, "recall": pl.Float64}
    rows = [[getattr(index, name) for name in names] for index in indices]
    return pl.DataFrame(rows, schema={name: kinds.get(name, pl.Int64) for name in names}, orient="row")
