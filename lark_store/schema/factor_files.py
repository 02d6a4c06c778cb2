"""Files of correction factors, stored next to the Lance tables and named by their hash."""

from __future__ import annotations

import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import select

from lark_store.core.hashing import file_hash
from lark_store.schema.catalog import Correction

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lark_store.schema.database import Database
    from lark_store.schema.vectors import VectorStore

FOLDER = "corrections"


def file_name(sha256: str) -> str:
    """Return the path of a factor file, relative to the vectors.

    >>> file_name("0123456789abcdef0123")
    'corrections/0123456789abcdef.safetensors'
    """
    return f"{FOLDER}/{sha256[:16]}.safetensors"


def factor_files(vectors: VectorStore) -> list[str]:
    """Return the paths of all factor files, relative to the vectors."""
    return sorted(name for name in vectors.files.list(FOLDER) if name.endswith(".safetensors"))


@contextmanager
def fetched(vectors: VectorStore, sha256: str) -> Iterator[Path]:
    """Yield a temporary local copy of a factor file.

    Raises
    ------
    OSError
        The file can't be read.
    """
    with tempfile.TemporaryDirectory(prefix="lark-") as folder:
        copy = Path(folder) / "factors.safetensors"
        vectors.files.download_file(file_name(sha256), str(copy))
        yield copy


def is_intact(vectors: VectorStore, sha256: str) -> bool:
    """Tell whether a factor file's content matches its hash."""
    with fetched(vectors, sha256) as copy:
        return file_hash(copy) == sha256


def discard(db: Database, sha256: str, row_id: int) -> None:
    """Delete the factor file of a removed row, unless another row or a snapshot may need it."""
    with db.session() as session:
        other_row = session.scalar(select(Correction.id).where(Correction.sha256 == sha256, Correction.id != row_id))
    if other_row is None and not db.location.snapshots.names() and file_name(sha256) in factor_files(db.vectors):
        db.vectors.files.delete_file(file_name(sha256))


def draft_name(checkpoint_id: int, kind: str, number: int) -> str:
    """Return the path of a draft of a running fit, relative to the vectors.

    >>> draft_name(3, "kfac", 12)
    'corrections/3-kfac.00000012.draft'
    """
    return f"{FOLDER}/{checkpoint_id}-{kind}.{number:08}.draft"


def drafts(vectors: VectorStore, checkpoint_id: int, kind: str | None = None) -> list[str]:
    """Return the paths of a checkpoint's drafts, of one kind or all, oldest first."""
    prefix = f"{FOLDER}/{checkpoint_id}-" + (f"{kind}." if kind else "")
    return sorted(n for n in vectors.files.list(FOLDER) if n.startswith(prefix) and n.endswith(".draft"))
