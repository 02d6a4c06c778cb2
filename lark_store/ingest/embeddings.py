"""The embeddings of samples: made once by an encoder, kept in a Lance table of the encoder's own, read in blocks.

A row belongs to a sample's content: a sample whose text is another by now has none. Rows go in a few thousand at a
time, so what is killed goes on from there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pyarrow as pa

from lark_store.ingest.batches import windows
from lark_store.ingest.sources import Sample
from lark_store.schema.locks import working
from lark_store.schema.records import Progress
from lark_store.schema.vectors import where

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from lark_store.ingest.encoders import Encoder
    from lark_store.schema.database import Database
    from lark_store.schema.records import OnProgress

    Block = tuple[list[str], NDArray[np.float32]]

_IDENTITY = ["sample_id", "content_sha256"]
_TEXTS = ["prompt", "response", "text"]
_ROWS_PER_COMMIT = 4096
_ROWS_PER_BLOCK = 1024


class Embeddings:
    """The embeddings of a store's samples by one encoder."""

    def __init__(self, db: Database, encoder: Encoder, on_progress: OnProgress | None = None) -> None:
        self.db, self.encoder, self.on_progress = db, encoder, on_progress

    def complete(self, sources: Sequence[str]) -> None:
        """Make and keep the embeddings that some sources' samples lack.

        Raises
        ------
        StoreBusyError
            Another process makes this encoder's embeddings, or something is being removed.
        CheckpointError
        """
        if not any(len(self._missing(source)) for source in sources):
            return
        table = self.encoder.table
        with working(self.db.location, table.replace("_", "-"), "embedding samples", {"source": list(sources)}):
            for source in sources:
                for rows, unit_BD in self._made(source):
                    self._keep(source, rows, unit_BD)
            if self.db.vectors.has(table):
                self.db.vectors.refresh_indices(self.db.vectors.table(table))

    def blocks(self, source: str) -> Iterator[Block]:
        """Yield the ids of a source's samples and their unit vectors, (B, D); those not kept yet are made on the way.

        Nothing is written.
        """
        if self.db.vectors.has(self.encoder.table):
            now = dict(self._samples(source).iter_rows())
            columns = [*_IDENTITY, "vector"]
            for batch in self.db.vectors.scan(self.encoder.table, columns, where(source=source), _ROWS_PER_BLOCK):
                ids, hashes = (batch.column(name).to_pylist() for name in _IDENTITY)
                current = np.array([now.get(i) == h for i, h in zip(ids, hashes, strict=True)], bool)
                vectors = batch.column("vector").flatten().to_numpy().reshape(len(ids), -1)
                yield [i for i, good in zip(ids, current, strict=True) if good], vectors[current]
        for rows, unit_BD in self._made(source):
            yield rows["sample_id"].to_list(), unit_BD

    def _samples(self, source: str) -> pl.DataFrame:
        return self.db.vectors.read("samples", _IDENTITY, where(source=source))

    def _missing(self, source: str) -> pl.DataFrame:
        """Return which samples of a source have no embedding of their content."""
        there, table = self._samples(source), self.encoder.table
        if not self.db.vectors.has(table):
            return there
        return there.join(self.db.vectors.read(table, _IDENTITY, where(source=source)), on=_IDENTITY, how="anti")

    def _made(self, source: str) -> Iterator[tuple[pl.DataFrame, NDArray[np.float32]]]:
        """Encode what is missing; yields rows of `_IDENTITY` and their vectors."""
        missing = set(self._missing(source)["sample_id"])
        done = 0
        for window in windows(self._texts(source, missing), _ROWS_PER_COMMIT):
            unit_ND: NDArray[np.float32] | None = None
            for numbers, unit_BD in self.encoder.encode([text for _, _, text in window]):
                if unit_ND is None:
                    unit_ND = np.empty((len(window), unit_BD.shape[1]), np.float32)
                unit_ND[numbers] = unit_BD
                done += len(numbers)
                if self.on_progress:
                    self.on_progress(Progress(f"embedding {source}", done, len(missing)))
            assert unit_ND is not None
            yield pl.DataFrame([row[:2] for row in window], schema=_IDENTITY, orient="row"), unit_ND

    def _texts(self, source: str, wanted: set[str]) -> Iterator[tuple[str, str, str]]:
        """Yield some samples' ids, content hashes and texts, a prompt and its response as one."""
        if not wanted:
            return
        for batch in self.db.vectors.scan("samples", [*_IDENTITY, *_TEXTS], where(source=source)):
            for row in batch.to_pylist():
                if row["sample_id"] in wanted:
                    sha256 = row.pop("content_sha256")
                    yield row["sample_id"], sha256, Sample(**row).whole

    def _keep(self, source: str, rows: pl.DataFrame, unit_ND: NDArray[np.float32]) -> None:
        table: Any = self.db.vectors.embeddings(self.encoder.table, unit_ND.shape[1])
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(unit_ND.reshape(-1)), unit_ND.shape[1])
        columns = [pa.array([source] * len(rows)), *(pa.array(rows[name].to_list()) for name in _IDENTITY), vectors]
        self.db.vectors.append(table, pa.Table.from_arrays(columns, schema=table.schema))
