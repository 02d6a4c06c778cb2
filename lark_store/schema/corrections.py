"""Where the factors of corrections are: files beside the Lance tables, each named by the hash of its content."""

from __future__ import annotations

import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import select

from lark_store.schema.catalog import Correction
from lark_store.schema.hashes import file_hash

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lark_store.schema.database import Database
    from lark_store.schema.vectors import VectorStore

FOLDER = "corrections"


def file_name(sha256: str) -> str:
    """Return where a file of factors is, below the vectors.

    >>> file_name("0123456789abcdef0123")
    'corrections/0123456789abcdef.safetensors'
    """
    return f"{FOLDER}/{sha256[:16]}.safetensors"


def factor_files(vectors: VectorStore) -> list[str]:
    """Return the names of all files of factors, below the vectors."""
    return sorted(name for name in vectors.files.list(FOLDER) if name.endswith(".safetensors"))


@contextmanager
def fetched(vectors: VectorStore, sha256: str) -> Iterator[Path]:
    """Give a copy of a file of factors on this machine; it goes at the end.

    Raises
    ------
    OSError
        It can't be read.
    """
    with tempfile.TemporaryDirectory(prefix="lark-") as folder:
        copy = Path(folder) / "factors.safetensors"
        vectors.files.download_file(file_name(sha256), str(copy))
        yield copy


def is_what_was_written(vectors: VectorStore, sha256: str) -> bool:
    """Tell whether a file of factors has the content that its name says."""
    with fetched(vectors, sha256) as copy:
        return file_hash(copy) == sha256


def discard(db: Database, sha256: str, row_id: int) -> None:
    """Delete the file of a row that goes, unless another row names it or a snapshot might."""
    with db.session() as session:
        others = session.scalar(select(Correction.id).where(Correction.sha256 == sha256, Correction.id != row_id))
    if others is None and not db.location.snapshots.names() and file_name(sha256) in factor_files(db.vectors):
        db.vectors.files.delete_file(file_name(sha256))


def draft_name(checkpoint_id: int, kind: str, number: int) -> str:
    """Return where a draft of a fit that is under way is, below the vectors.

    >>> draft_name(3, "kfac", 12)
    'corrections/3-kfac.00000012.draft'
    """
    return f"{FOLDER}/{checkpoint_id}-{kind}.{number:08}.draft"


def drafts(vectors: VectorStore, checkpoint_id: int, kind: str | None = None) -> list[str]:
    """Return the names of the drafts of a checkpoint's fits, of one kind or all, oldest first."""
    begin = f"{FOLDER}/{checkpoint_id}-" + (f"{kind}." if kind else "")
    return sorted(n for n in vectors.files.list(FOLDER) if n.startswith(begin) and n.endswith(".draft"))
