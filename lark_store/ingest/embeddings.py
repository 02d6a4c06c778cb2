"""Sample embeddings: computed once, stored in one Lance table per encoder, read in blocks.

A row is keyed by a sample's content, so a sample with changed text has no embedding. Rows are committed a few thousand
at a time; an interrupted run resumes after the last commit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pyarrow as pa

from lark_store.modeling.batching import windows
from lark_store.modeling.sample import Sample
from lark_store.results import Progress
from lark_store.schema.chats import CONTENT
from lark_store.schema.checksums import with_checksums
from lark_store.schema.locks import working
from lark_store.schema.vectors import where

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from lark_store.modeling.sentence_encoders import Encoder
    from lark_store.results import OnProgress
    from lark_store.schema.database import Database

    Block = tuple[list[str], NDArray[np.float32]]

_IDENTITY = ["sample_id", "content_sha256"]
_ROWS_PER_COMMIT = 4096
_ROWS_PER_BLOCK = 1024


class Embeddings:
    """The embeddings of a store's samples under one encoder."""

    def __init__(self, db: Database, encoder: Encoder, on_progress: OnProgress | None = None) -> None:
        self.db, self.encoder, self.on_progress = db, encoder, on_progress

    def complete(self, sources: Sequence[str]) -> None:
        """Compute and store the missing embeddings of some sources.

        Raises
        ------
        StoreBusyError
            Another process is embedding with this encoder, or removing data.
        CheckpointError
        """
        if not any(len(self._missing(source)) for source in sources):
            return
        table = self.encoder.table
        with working(self.db.location, table.replace("_", "-"), "embedding samples", {"source": list(sources)}):
            for source in sources:
                for rows, unit_BD in self._embed(source):
                    self._append(source, rows, unit_BD)
            if self.db.vectors.has(table):
                self.db.vectors.refresh_indices(self.db.vectors.table(table))

    def blocks(self, source: str) -> Iterator[Block]:
        """Yield the ids of a source's samples and their unit vectors, (B, D).

        Missing embeddings are computed but not stored.
        """
        if self.db.vectors.has(self.encoder.table):
            hash_of = dict(self._samples(source).iter_rows())
            columns = [*_IDENTITY, "vector"]
            for batch in self.db.vectors.scan(self.encoder.table, columns, where(source=source), _ROWS_PER_BLOCK):
                ids, hashes = (batch.column(name).to_pylist() for name in _IDENTITY)
                current = np.array([hash_of.get(i) == h for i, h in zip(ids, hashes, strict=True)], bool)
                vectors = batch.column("vector").flatten().to_numpy().reshape(len(ids), -1)
                yield [i for i, ok in zip(ids, current, strict=True) if ok], vectors[current]
        for rows, unit_BD in self._embed(source):
            yield rows["sample_id"].to_list(), unit_BD

    def _samples(self, source: str) -> pl.DataFrame:
        return self.db.vectors.read("samples", _IDENTITY, where(source=source))

    def _missing(self, source: str) -> pl.DataFrame:
        """Return a source's samples without an embedding of their content."""
        samples, table = self._samples(source), self.encoder.table
        if not self.db.vectors.has(table):
            return samples
        return samples.join(self.db.vectors.read(table, _IDENTITY, where(source=source)), on=_IDENTITY, how="anti")

    def _embed(self, source: str) -> Iterator[tuple[pl.DataFrame, NDArray[np.float32]]]:
        """Encode the missing samples; yield rows of `_IDENTITY` and their vectors."""
        missing = set(self._missing(source)["sample_id"])
        n_done = 0
        for window in windows(self._texts(source, missing), _ROWS_PER_COMMIT):
            unit_ND: NDArray[np.float32] | None = None
            for numbers, unit_BD in self.encoder.encode([text for _, _, text in window]):
                if unit_ND is None:
                    unit_ND = np.empty((len(window), unit_BD.shape[1]), np.float32)
                unit_ND[numbers] = unit_BD
                n_done += len(numbers)
                if self.on_progress:
                    self.on_progress(Progress(f"embedding {source}", n_done, len(missing)))
            assert unit_ND is not None
            yield pl.DataFrame([row[:2] for row in window], schema=_IDENTITY, orient="row"), unit_ND

    def _texts(self, source: str, sample_ids: set[str]) -> Iterator[tuple[str, str, str]]:
        """Yield the samples' ids, content hashes and texts (prompt and response joined)."""
        if not sample_ids:
            return
        for batch in self.db.vectors.scan("samples", [*_IDENTITY, *CONTENT], where(source=source)):
            for row in batch.to_pylist():
                if row["sample_id"] in sample_ids:
                    sha256 = row.pop("content_sha256")
                    yield row["sample_id"], sha256, Sample(**row).whole

    def _append(self, source: str, rows: pl.DataFrame, unit_ND: NDArray[np.float32]) -> None:
        table: Any = self.db.vectors.embeddings(self.encoder.table, unit_ND.shape[1])
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(unit_ND.reshape(-1)), unit_ND.shape[1])
        columns = [pa.array([source] * len(rows)), *(pa.array(rows[name].to_list()) for name in _IDENTITY), vectors]
        embedded = pa.Table.from_arrays(columns, ["source", *_IDENTITY, "vector"])
        self.db.vectors.append(table, with_checksums(embedded).cast(table.schema))
