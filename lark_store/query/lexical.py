"""BM25 over the samples' texts: the lexical rival of gradients, with the same samples and filters.

The corpus is every sample of the store that is no query, whatever a question searches, so that scores of several
sources can be compared. `bm25` is Lucene's variant by bm25s, made for large sources; its index is kept in the store's
folder (or the user's cache) and made anew when samples were added. `bm25plus` is its BM25+, `bm25-okapi` is rank-bm25's
BM25Okapi, the paper's baseline; both are made anew in each process. All read the same words: lower case, two letters or
more, without English stop words.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from sqlalchemy import select

from lark_store.errors import NothingToScoreError
from lark_store.schema.catalog import Source
from lark_store.schema.vectors import where

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from lark_store.query.rows import Rows
    from lark_store.schema.database import Database

_KEPT_FROM = 2_000  # documents; a smaller index is made faster than it is read
_TEXT = pl.coalesce("text", pl.concat_str(["prompt", "response"], separator="\n"))
_KEYS = "documents.parquet"
# δ = 1 is that of Lv & Zhai (2011), who made BM25+: a word that occurs counts, however long the text.
BM25S: dict[str, dict[str, Any]] = {"bm25": {"method": "lucene"}, "bm25plus": {"method": "bm25+", "delta": 1.0}}


@dataclass(frozen=True)
class Lexical:
    """A BM25 index: `documents` (source, sample_id) in the order of its scores."""

    engine: str
    documents: pl.DataFrame
    _index: Any

    def scores(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return the BM25 score of every document for each text, (Q, documents)."""
        made = np.zeros((len(texts), len(self.documents)), np.float32)
        for row, asked in zip(made, words(texts), strict=True):
            if asked:
                row[:] = self._index.get_scores(asked)
        return made

    def of_rows(self, rows: Rows, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return the scores of some sketches' samples, (Q, N)."""
        keys = ["source", "sample_id"]
        numbered = self.documents.with_row_index("_document")
        places = rows.frame.join(numbered, on=keys, how="left", maintain_order="left")["_document"]
        if places.null_count():
            raise NothingToScoreError(
                f"{places.null_count()} of the samples searched are not in the lexical corpus",
                "it holds every sample of the store that is no query",
            )
        found: NDArray[np.float32] = self.scores(texts)[:, places.to_numpy()]
        return found


def words(texts: Sequence[str]) -> list[list[str]]:
    """Return the words of each text that BM25 looks at."""
    import bm25s

    found: list[list[str]] = bm25s.tokenize(list(texts), stopwords="en", return_ids=False, show_progress=False)
    return found


def texts_of(db: Database, source: str, ids: Sequence[str]) -> list[str]:
    """Return samples' texts, a prompt and its response as one, in the order of `ids`."""
    columns = ["sample_id", "prompt", "response", "text"]
    found = db.vectors.read("samples", columns, where(source=source, sample_id=list(ids)))
    by_id = dict(found.select("sample_id", _TEXT).iter_rows())
    return [by_id[name] for name in ids]


def open_lexical(db: Database, engine: str) -> Lexical:
    """Open the index of the samples as they are now, made if it is not there."""
    version = db.vectors.table("samples").version
    return db.remember(f"lexical {engine}", version, lambda: _open(db, engine, version))


def _open(db: Database, engine: str, version: int) -> Lexical:
    kept = db.location.cache / "lexical" / f"samples-{_identity(db, version)}"
    if engine == "bm25" and (kept / _KEYS).is_file():
        import bm25s

        return Lexical(engine, pl.read_parquet(kept / _KEYS), bm25s.BM25.load(str(kept), mmap=True))
    documents, texts = _corpus(db)
    if documents.is_empty():
        raise NothingToScoreError("there is no sample but queries", "add a source with `lark-store source add`")
    if engine == "bm25-okapi":
        from rank_bm25 import BM25Okapi

        return Lexical(engine, documents, BM25Okapi(words(texts)))
    import bm25s

    index = bm25s.BM25(**BM25S[engine])
    index.index(words(texts), show_progress=False)
    if engine == "bm25" and len(documents) >= _KEPT_FROM:
        _keep(index, documents, kept)
    return Lexical(engine, documents, index)


def _identity(db: Database, version: int) -> str:
    """Return the identity of the commit that made a version: also another store of this name has others."""
    return str(db.vectors.table("samples").to_lance().read_transaction(version).uuid)


def corpus_sha256(db: Database) -> str:
    """Return the hash of the corpus: scores are the same as long as it is."""
    found = db.vectors.read("samples", ["source", "sample_id", "content_sha256"])
    documents = found.filter(~pl.col("source").is_in(_query_sources(db))).sort(found.columns)
    return hashlib.sha256(documents.write_csv().encode()).hexdigest()


def _query_sources(db: Database) -> list[str]:
    with db.session() as session:
        return list(session.scalars(select(Source.name).where(Source.stage == "query")))


def _corpus(db: Database) -> tuple[pl.DataFrame, list[str]]:
    queries = _query_sources(db)
    columns = ["source", "sample_id", "prompt", "response", "text"]
    found = db.vectors.read("samples", columns).filter(~pl.col("source").is_in(queries))
    return found.select("source", "sample_id"), found.select(_TEXT).to_series().to_list()


def _keep(index: Any, documents: pl.DataFrame, place: Path) -> None:
    """Write an index beside the store's tables, whole or not at all; older ones go."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=place.parent))
    except OSError:  # a store that can only be read: the index is made anew each time
        return
    try:
        index.save(str(draft), show_progress=False)
        documents.write_parquet(draft / _KEYS)
        for old in place.parent.glob("samples-*"):
            if old != place:
                shutil.rmtree(old, ignore_errors=True)
        if not place.exists():
            draft.rename(place)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
