"""`index build`: give every sketch a code where one is missing, and measure what an approximate search finds by them.

Codes are written with the sketches, so nothing goes out of date when sketches are added or removed; what is measured is
how many candidates the codes must name. Queries are searched exactly and by codes. By one half of them
the number is chosen, on the other half, which had no part in that, the recall is
measured that approximate answers then tell.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pyarrow as pa
from sqlalchemy import select

from lark_store.errors import NothingToScoreError
from lark_store.query.candidates import estimates
from lark_store.query.groups import Group, committed_groups
from lark_store.query.rows import Rows, find_rows
from lark_store.query.scoring import Queries, matrix, stored_of
from lark_store.schema.catalog import IngestRun, SearchIndex, Sketcher, now
from lark_store.schema.codes import code_bytes, codes_of
from lark_store.schema.database import find
from lark_store.schema.records import Progress
from lark_store.schema.retry import retried
from lark_store.schema.vectors import sketch_table

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from lark_store.schema.database import Database
    from lark_store.schema.records import OnProgress

_AIM = 0.995  # recall on the queries by which the number of candidates is chosen
_CHOICES = (50, 100, 200, 400, 800, 1_600, 3_200)
_K = 10
_MOST_QUERIES = 100


def find_index(db: Database, fingerprint: str, sketcher: str) -> SearchIndex:
    """Return what was measured about a sketch table.

    Raises
    ------
    NothingToScoreError
        Nothing yet.
    """
    with db.session() as session:
        index = session.get(SearchIndex, fingerprint)
    if index is None:
        raise NothingToScoreError(
            f"the sketches of `{sketcher}` have no approximate index",
            f"make it with `lark-store index build {sketcher}`",
        )
    return index


def build(db: Database, sketcher: str, on_progress: OnProgress | None = None) -> list[SearchIndex]:
    """Complete and measure the codes of a sketcher's tables; see `Store.index_build`."""
    with db.session() as session:
        by = find(session, Sketcher, sketcher)
        runs = select(IngestRun).filter_by(sketcher_id=by.id, status="done").where(IngestRun.n_sketched > 0)
        at = {run.checkpoint_id: run.checkpoint for run in session.scalars(runs)}
        groups: dict[str, list[list[Group]]] = {}
        for checkpoint in at.values():
            for group in committed_groups(session, by, checkpoint):
                same = groups.setdefault(group.fingerprint, [])
                if not same or same[-1][0].checkpoint.id != checkpoint.id:
                    same.append([])
                same[-1].append(group)
    if not groups:
        raise NothingToScoreError(f"`{sketcher}` has no committed sketches", "make them with `lark-store ingest`")
    made = []
    for fingerprint, per_checkpoint in groups.items():
        _complete(db, fingerprint, by.k)
        made.append(_measure(db, fingerprint, per_checkpoint, on_progress))
    return made


def _complete(db: Database, fingerprint: str, k: int) -> None:
    """Add the codes to a table that was made before there were any."""
    table = db.vectors.table(sketch_table(fingerprint))
    if "code" not in table.schema.names:
        kind = pa.list_(pa.uint8(), code_bytes(k))

        def coded(batch: pa.RecordBatch) -> pa.RecordBatch:
            codes = codes_of(stored_of(batch.column("vector")).numpy())
            column = pa.FixedSizeListArray.from_arrays(pa.array(codes.reshape(-1)), type=kind)
            return pa.RecordBatch.from_arrays([column], schema=pa.schema([pa.field("code", kind)]))

        def add() -> None:
            table.checkout_latest()
            table.to_lance().add_columns(coded, read_columns=["vector"], batch_size=64)

        retried(add, f"the codes of `{table.name}` can't be added")
        table.checkout_latest()
    db.vectors.refresh_indices(table)


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
        raise NothingToScoreError("there are too few sketches to measure a search", "ingest more samples")
    chosen_by, held_out = places[::2], places[1::2] or places
    candidates = next((n for n in _CHOICES if _recall(chosen_by, n) >= _AIM), _CHOICES[-1])
    recall = _recall(held_out, candidates)
    index = SearchIndex(
        fingerprint=fingerprint,
        candidates=candidates,
        recall=recall,
        n_queries=len(held_out),
        n_rows=n_rows,
        built_at=now(),
    )
    with db.session() as session:
        session.merge(index)
    return index


def _recall(places: Iterable[NDArray[np.int64]], candidates: int) -> float:
    """Return the share of the exact best that stand among the first `candidates` by code."""
    return float(np.mean(np.concatenate(list(places)) < candidates))


def _places(db: Database, rows: Rows, share: int) -> list[NDArray[np.int64]]:
    """Return, for some queries at one checkpoint, the places by code (from 0) of their exact ten best."""
    numbers = _drawn(rows, share)
    sketches = _sketches(rows, numbers)
    exact, _ = matrix(rows, sketches)
    searched = ~_asking(rows)
    found = []
    for query, number in enumerate(numbers):
        others = np.flatnonzero(searched & (np.arange(len(rows)) != number))  # a sample is its own nearest
        best = others[np.argsort(-exact[query][others], kind="stable")[:_K]]
        guess = estimates(db, rows, sketches.unit_QK[query].numpy())
        order = np.sort(-guess[others])
        found.append(np.searchsorted(order, -guess[best], side="left"))
    return [places for places in found if len(places)]


def _drawn(rows: Rows, share: int) -> NDArray[np.int64]:
    """Draw rows to ask with, always the same: those of query sources, or any where there are none."""
    asking = _asking(rows)
    pool = np.flatnonzero(asking) if asking.any() else np.arange(len(rows))
    drawn: NDArray[np.int64] = np.random.default_rng(0).permutation(pool)[:share]
    return drawn


def _asking(rows: Rows) -> NDArray[np.bool_]:
    """Return which rows are queries, (N); none if nothing else is there."""
    asking = np.array([group.source.stage == "query" for group in rows.groups])
    of_rows: NDArray[np.bool_] = (asking & ~asking.all())[rows.frame["group"].to_numpy()]
    return of_rows


def _sketches(rows: Rows, numbers: NDArray[np.int64]) -> Queries:
    some = rows.only(numbers)
    import torch

    unit: Any = None
    for places, column in some.stream():
        stored = stored_of(column)
        unit = torch.empty(len(some), stored.shape[1]) if unit is None else unit
        unit[torch.from_numpy(places)] = torch.nn.functional.normalize(stored.float(), dim=1)
    norms = torch.from_numpy(some.frame["grad_norm"].to_numpy().copy())
    return Queries(some.frame["sample_id"].to_list(), unit, norms)


def report(made: list[SearchIndex]) -> pl.DataFrame:
    """Return what was measured as a frame; see `Store.index_build`."""
    names = ("fingerprint", "n_rows", "candidates", "recall", "n_queries")
    kinds = {"fingerprint": pl.String, "recall": pl.Float64}
    rows = [[getattr(index, name) for name in names] for index in made]
    return pl.DataFrame(rows, schema={name: kinds.get(name, pl.Int64) for name in names}, orient="row")
