"""Where the factors of corrections are: files beside the Lance tables, each named by the hash of its content."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import select

from lark_store.schema.catalog import Correction

if TYPE_CHECKING:
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


def content_of(vectors: VectorStore, sha256: str) -> bytes:
    """Return the content of a file of factors.

    Raises
    ------
    OSError
        It can't be read.
    """
    with tempfile.TemporaryDirectory(prefix="lark-") as folder:
        copy = Path(folder) / "factors.safetensors"
        vectors.files.download_file(file_name(sha256), str(copy))
        return copy.read_bytes()


def is_what_was_written(vectors: VectorStore, sha256: str) -> bool:
    """Tell whether a file of factors has the content that its name says."""
    return hashlib.sha256(content_of(vectors, sha256)).hexdigest() == sha256


def discard_file(vectors: VectorStore, name: str) -> None:
    """Delete a file of factors."""
    vectors.files.delete_file(name)


def discard(db: Database, sha256: str, row_id: int) -> None:
    """Delete the file of a row that goes, unless another row names it or a snapshot might."""
    with db.session() as session:
        others = session.scalar(select(Correction.id).where(Correction.sha256 == sha256, Correction.id != row_id))
    if others is None and not db.location.snapshots.names() and file_name(sha256) in factor_files(db.vectors):
        discard_file(db.vectors, file_name(sha256))
