"""BM25 over the samples' texts: the lexical baseline, over the same samples and filters as gradients.

The corpus is every sample of the store except queries, whatever a question searches, so scores of several sources are
comparable. Samples of a source that is still being added are left out, as in all other answers. `bm25` is Lucene's
variant by bm25s, made for large sources; its index is kept in the store's folder (or the user's cache) and rebuilt when
samples are added. `bm25plus` is BM25+ by bm25s, and `bm25-okapi` is rank-bm25's BM25Okapi, the paper's baseline; both
are rebuilt in each process. All read the same words: lower case, two letters or more, without English stop words.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from sqlalchemy import select

from lark_store.core.words import words
from lark_store.errors import NothingToScoreError
from lark_store.query.methods import METHODS
from lark_store.schema.catalog import Source
from lark_store.schema.chats import CONTENT, search_text
from lark_store.schema.vectors import where

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from lark_store.query.select.rows import Rows
    from lark_store.schema.database import Database

_KEPT_FROM = 2_000  # documents; a smaller index is built faster than read
_KEYS = "documents.parquet"


@dataclass(frozen=True)
class Lexical:
    """A BM25 index: `documents` (source, sample_id) in the order of the scores."""

    engine: str
    documents: pl.DataFrame
    _index: Any

    def scores(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return the BM25 score of every document for each text, (Q, documents)."""
        scores = np.zeros((len(texts), len(self.documents)), np.float32)
        for row, query_words in zip(scores, words(texts), strict=True):
            if query_words:
                row[:] = self._index.get_scores(query_words)
        return scores

    def of_rows(self, rows: Rows, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return the scores of the rows' samples, (Q, N)."""
        keys = ["source", "sample_id"]
        numbered = self.documents.with_row_index("_document")
        places = rows.frame.join(numbered, on=keys, how="left", maintain_order="left")["_document"]
        if places.null_count():
            raise NothingToScoreError(
                f"{places.null_count()} of the searched samples are not in the lexical corpus",
                "search sources of stage `finetune` or `pretrain`; queries are not in the corpus",
            )
        scores: NDArray[np.float32] = self.scores(texts)[:, places.to_numpy()]
        return scores


def texts_of(db: Database, source: str, ids: Sequence[str]) -> list[str]:
    """Return samples' texts in the order of `ids`. Joins a prompt and its response."""
    columns = ["sample_id", *CONTENT]
    samples = db.vectors.read("samples", columns, where(source=source, sample_id=list(ids)))
    by_id = dict(samples.select("sample_id", search_text()).iter_rows())
    return [by_id[name] for name in ids]


def open_lexical(db: Database, engine: str) -> Lexical:
    """Open the index of the current samples; builds it if missing."""
    state = (db.vectors.table("samples").version, _sources(db))
    return db.remember(f"lexical {engine}", state, lambda: _open(db, engine, *state))


def _open(db: Database, engine: str, version: int, sources: tuple[str, ...]) -> Lexical:
    folder = db.location.cache / "lexical" / f"samples-{_identity(db, version, sources)}"
    if engine == "bm25" and (folder / _KEYS).is_file():
        import bm25s

        return Lexical(engine, pl.read_parquet(folder / _KEYS), bm25s.BM25.load(str(folder), mmap=True))
    documents, texts = _corpus(db, sources)
    if documents.is_empty():
        raise NothingToScoreError(
            "the store has no samples except queries", "add a source with `lark-store source add`"
        )
    index = METHODS[engine].index(words(texts))
    if engine == "bm25" and len(documents) >= _KEPT_FROM:
        _keep(index, documents, folder)
    return Lexical(engine, documents, index)


def _identity(db: Database, version: int, sources: tuple[str, ...]) -> str:
    """Identify a corpus by its sources and the table's files, whose random names differ between stores of one name.

    The transaction would do as well, but pylance 14 can't read one that rewrote indices, as compaction does.
    """
    fragments = db.vectors.table("samples").to_lance().get_fragments()
    files = [json.dumps(fragment.metadata.to_json(), sort_keys=True) for fragment in fragments]
    return f"{version}-{hashlib.sha256(''.join([*sources, *files]).encode()).hexdigest()[:32]}"


def corpus_sha256(db: Database) -> str:
    """Return the hash of the corpus, which determines the scores."""
    samples = db.vectors.read("samples", ["source", "sample_id", "content_sha256"])
    documents = samples.filter(pl.col("source").is_in(_sources(db))).sort(samples.columns)
    return hashlib.sha256(documents.write_csv().encode()).hexdigest()


def _sources(db: Database) -> tuple[str, ...]:
    """Return the sources of the corpus."""
    with db.session() as session:
        return tuple(session.scalars(select(Source.name).where(Source.stage != "query").order_by(Source.id)))


def _corpus(db: Database, sources: tuple[str, ...]) -> tuple[pl.DataFrame, list[str]]:
    columns = ["source", "sample_id", *CONTENT]
    samples = db.vectors.read("samples", columns).filter(pl.col("source").is_in(sources))
    return samples.select("source", "sample_id"), samples.select(search_text()).to_series().to_list()


def _keep(index: Any, documents: pl.DataFrame, place: Path) -> None:
    """Write an index to the store's folder, all or nothing; deletes older ones."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=place.parent))
    except OSError:  # a read-only store: the index is rebuilt each time
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
