"""The store at one moment: catalog and tables as they were while no run was committed and no work began.

What a check looks at: an ingest that goes on meanwhile changes nothing of it. Behind `maintenance`, so that no version
of that moment is cleaned up.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from sqlalchemy import select

from lark_store.schema.catalog import Checkpoint, Correction, FormatVariant, IngestRun, ScoreRun, Sketcher, Source
from lark_store.schema.vectors import SKETCH_PREFIX, VectorStore, where

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    from lark_store.schema.database import Database
    from lark_store.schema.location import Location
    from lark_store.schema.locks import Pause

FAULTS = (OSError, RuntimeError, ValueError)  # what Lance raises for files that it can't read
_ROWS_PER_BATCH = 8192
_HASHES_AT_ONCE = 1 << 25  # 256 MiB of keys are looked at together; more keys take more passes
IMPORTED = "imported"


@dataclass(frozen=True)
class Moment:
    """What was there: rows of the catalog by id, and the tables at their versions.

    `broken` has the tables that can't be opened and why. `samples` and `counts` are filled by the checks: the sorted
    hashes of all samples (None: not readable), and the rows that each ingest run has.
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
    counts: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    unread: set[str] = field(default_factory=set)

    @property
    def nobody(self) -> bool:
        """Whether nobody was at work."""
        return not self.pause.works

    def names_of(self, run: IngestRun | ScoreRun) -> dict[str, str]:
        """Return the names that the rows of a run carry."""
        return {
            "checkpoint": self.names[Checkpoint].get(run.checkpoint_id, "?"),
            "source": self.names[Source].get(run.source_id, "?"),
            "variant": self.names[FormatVariant].get(run.variant_id, "?"),
        }

    def label(self, run: IngestRun | ScoreRun) -> str:
        """Return a run in a few words."""
        kind = "ingest" if isinstance(run, IngestRun) else "score"
        return f"{kind} run {run.id}: {' · '.join(self.names_of(run).values())}"

    def is_at_work(self, run: IngestRun) -> bool:
        """Tell whether somebody may be writing to a run."""
        return run.status == "running" and self.pause.touches(**self.names_of(run))

    def sketch_tables(self) -> list[str]:
        """Return the names of the sketch tables that can be opened."""
        return [name for name in self.vectors.table_names() if name.startswith(SKETCH_PREFIX)]


def take(db: Database, pause: Pause) -> Moment:
    """Take the store as it is, while the gate is held."""
    versions: dict[str, int] = {}
    broken: dict[str, str] = {}
    with db.engine.connect():  # the first connection sets the journal's mode, which it can't once the catalog is locked
        pass
    with db.location.catalog.frozen():
        with db.session() as session:
            rows: dict[type, list[Any]] = {
                kind: list(session.scalars(select(kind).order_by(kind.id)))
                for kind in (Checkpoint, Source, FormatVariant, Sketcher, IngestRun, ScoreRun, Correction)
            }
            for row in rows[Correction]:
                _ = row.checkpoint  # read while the session is open
        for name in sorted(db.vectors.table_names()):
            try:
                versions[name] = int(db.vectors.connection.open_table(name).version)
            except FAULTS as error:
                broken[name] = first_line(error)
    return Moment(
        location=db.location,
        pause=pause,
        vectors=VectorStore(db.vectors.uri, versions),
        broken=broken,
        names={kind: {row.id: row.name for row in rows[kind]} for kind in (Checkpoint, Source, FormatVariant)},
        sketchers={row.id: row for row in rows[Sketcher]},
        checkpoints=rows[Checkpoint],
        ingest_runs={row.id: row for row in rows[IngestRun]},
        score_runs={row.id: row for row in rows[ScoreRun]},
        corrections=rows[Correction],
    )


def first_line(error: Exception) -> str:
    """Return the first line of an error's message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


def stream(vectors: VectorStore, table: str, columns: list[str], filter_: str | None = None) -> Iterator[pl.DataFrame]:
    """Yield a table's narrow columns in frames, with `_rowid`."""
    dataset = vectors.table(table).to_lance()
    scanner = dataset.scanner(columns=columns, filter=filter_, with_row_id=True, batch_size=_ROWS_PER_BATCH)
    for batch in scanner.to_batches():
        if batch.num_rows:
            yield pl.DataFrame(pl.from_arrow(batch))


def hashes(frame: pl.DataFrame, columns: Iterable[str]) -> NDArray[np.uint64]:
    """Return a hash of some columns of each row; good within this process."""
    found: NDArray[np.uint64] = frame.select(pl.struct(list(columns)).hash(0)).to_series().to_numpy()
    return found


def duplicates(vectors: VectorStore, table: str, keys: list[str], others: list[str]) -> pl.DataFrame:
    """Return the rows whose keys another row has too: `_rowid`, the keys and other columns.

    Two passes over the keys: by their hashes, then the rows of those that come twice.
    """
    n_rows = int(vectors.table(table).count_rows())
    parts = max(1, -(-n_rows // _HASHES_AT_ONCE))
    twice: list[NDArray[np.uint64]] = []
    for part in range(parts):
        seen = [h[h % parts == part] for h in (hashes(f, keys) for f in stream(vectors, table, keys))]
        if seen:
            values, counts = np.unique(np.concatenate(seen), return_counts=True)
            twice.append(values[counts > 1])
    if not any(len(values) for values in twice):
        return pl.DataFrame(schema={"_rowid": pl.UInt64} | dict.fromkeys([*keys, *others], pl.Null))
    wanted = np.concatenate(twice)
    found = [f.filter(pl.Series(np.isin(hashes(f, keys), wanted))) for f in stream(vectors, table, [*keys, *others])]
    rows = pl.concat(found)
    return rows.filter(pl.struct(keys).is_duplicated())


def run_filter(column: str, runs: Iterable[int]) -> str:
    """Return the filter of the rows of some runs."""
    return where(**{column: list(runs)})
