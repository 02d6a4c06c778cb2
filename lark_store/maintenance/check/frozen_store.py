"""A consistent view of the store for a check: catalog and tables at one point in time.

Concurrent ingests do not change it. Use it under `maintenance`, which prevents the cleanup of its
versions.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from sqlalchemy import select

from lark_store.schema.catalog import (
    Checkpoint,
    Correction,
    EifRun,
    FormatVariant,
    IngestRun,
    ProbeRun,
    ScoreRun,
    Sketcher,
    Source,
)
from lark_store.schema.faults import FAULTS, first_line
from lark_store.schema.table_schemas import SKETCH_PREFIX, projection
from lark_store.schema.vectors import VectorStore, where

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    from lark_store.schema.backends.base import Location
    from lark_store.schema.database import Database
    from lark_store.schema.locks import Pause

_ROWS_PER_BATCH = 8192
AnyRun = IngestRun | ScoreRun | ProbeRun | EifRun
_RUN_LABELS: dict[type[AnyRun], str] = {IngestRun: "ingest", ScoreRun: "score", ProbeRun: "probe", EifRun: "EIF"}
_HASHES_PER_PASS = 1 << 25  # 256 MiB of key hashes; more keys take more passes


@dataclass
class FrozenStore:
    """Rows of the catalog by id, and the tables at fixed versions; `deep` asks for slower, more thorough checks.

    `broken` has the tables that can't be opened, with the reason. The checks fill `samples`, the sorted hashes of all
    samples' keys (None if unreadable), `counts`, the number of rows of each ingest run, and `unreadable`, the tables
    whose rows can't be read.
    """

    location: Location
    pause: Pause
    vectors: VectorStore
    broken: dict[str, str]
    names: dict[type, dict[int, str]]
    sketchers: dict[int, Sketcher]
    checkpoints: list[Checkpoint]
    ingest_runs: dict[int, IngestRun]
    score_runs: dict[int, ScoreRun]
    corrections: list[Correction]
    probe_runs: dict[int, ProbeRun]
    eif_runs: dict[int, EifRun]
    deep: bool = False
    samples: NDArray[np.uint64] | None = None
    counts: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    unreadable: set[str] = field(default_factory=set)

    @property
    def is_idle(self) -> bool:
        """Whether no process was at work."""
        return not self.pause.works

    def names_of(self, run: AnyRun) -> dict[str, str]:
        """Return the names in the rows of a run."""
        return {
            "checkpoint": self.names[Checkpoint].get(run.checkpoint_id, "?"),
            "source": self.names[Source].get(run.source_id, "?"),
            "variant": self.names[FormatVariant].get(run.variant_id, "?"),
        }

    def label(self, run: AnyRun) -> str:
        """Return a short description of a run."""
        return f"{_RUN_LABELS[type(run)]} run {run.id}: {' · '.join(self.names_of(run).values())}"

    def is_at_work(self, run: AnyRun) -> bool:
        """Tell whether a process may be writing to a run."""
        return run.status == "running" and self.pause.touches(**self.names_of(run))

    def sketch_tables(self) -> list[str]:
        """Return the names of the sketch tables that can be opened."""
        return [name for name in self.vectors.table_names() if name.startswith(SKETCH_PREFIX)]


def freeze(db: Database, pause: Pause, *, deep: bool = False) -> FrozenStore:
    """Return the store's current state; the caller holds the gate."""
    versions: dict[str, int] = {}
    broken: dict[str, str] = {}
    kinds: list[Any] = [Checkpoint, Source, FormatVariant, Sketcher, Correction, *_RUN_LABELS]
    with db.engine.connect():  # the first connection sets the journal mode, impossible once the catalog is locked
        pass
    with db.location.catalog.frozen():
        with db.session() as session:
            rows: dict[type, list[Any]] = {
                kind: list(session.scalars(select(kind).order_by(kind.id))) for kind in kinds
            }
            for row in rows[Correction]:
                _ = row.checkpoint  # load it while the session is open
        for name in sorted(db.vectors.table_names()):
            try:
                versions[name] = int(db.vectors.newest(name).version)
            except FAULTS as error:
                broken[name] = first_line(error)
    return FrozenStore(
        location=db.location,
        pause=pause,
        vectors=VectorStore(db.vectors.uri, versions, use_indices=False),
        broken=broken,
        names={kind: {row.id: row.name for row in rows[kind]} for kind in (Checkpoint, Source, FormatVariant)},
        sketchers={row.id: row for row in rows[Sketcher]},
        checkpoints=rows[Checkpoint],
        ingest_runs={row.id: row for row in rows[IngestRun]},
        score_runs={row.id: row for row in rows[ScoreRun]},
        corrections=rows[Correction],
        probe_runs={row.id: row for row in rows[ProbeRun]},
        eif_runs={row.id: row for row in rows[EifRun]},
        deep=deep,
    )


def stream(vectors: VectorStore, table: str, columns: list[str], filter_: str | None = None) -> Iterator[pl.DataFrame]:
    """Yield frames of a table's narrow columns, with `_rowid`."""
    dataset = vectors.table(table).to_lance()
    columns_or_nulls = projection(dataset.schema, columns)
    scanner = dataset.scanner(columns=columns_or_nulls, filter=filter_, with_row_id=True, batch_size=_ROWS_PER_BATCH)
    for batch in scanner.to_batches():
        if batch.num_rows:
            yield pl.DataFrame(pl.from_arrow(batch))


def hashes(frame: pl.DataFrame, columns: Iterable[str]) -> NDArray[np.uint64]:
    """Return a hash of the given columns per row, valid within this process."""
    values: NDArray[np.uint64] = frame.select(pl.struct(list(columns)).hash(0)).to_series().to_numpy()
    return values


def duplicates(vectors: VectorStore, table: str, keys: list[str], columns: list[str]) -> pl.DataFrame:
    """Return the rows with duplicate keys: `_rowid`, the keys and the given columns.

    The first pass finds duplicate hashes of keys, the second reads their rows.
    """
    n_rows = int(vectors.table(table).count_rows())
    parts = max(1, -(-n_rows // _HASHES_PER_PASS))
    repeated: list[NDArray[np.uint64]] = []
    for part in range(parts):
        seen = [h[h % parts == part] for h in (hashes(f, keys) for f in stream(vectors, table, keys))]
        if seen:
            values, counts = np.unique(np.concatenate(seen), return_counts=True)
            repeated.append(values[counts > 1])
    if not any(len(values) for values in repeated):
        return pl.DataFrame(schema={"_rowid": pl.UInt64} | dict.fromkeys([*keys, *columns], pl.Null))
    repeated_hashes = np.concatenate(repeated)
    frames = stream(vectors, table, [*keys, *columns])
    rows = pl.concat([f.filter(pl.Series(np.isin(hashes(f, keys), repeated_hashes))) for f in frames])
    return rows.filter(pl.struct(keys).is_duplicated())


def run_filter(column: str, runs: Iterable[int]) -> str:
    """Return a filter for the rows of the runs."""
    return where(**{column: list(runs)})
