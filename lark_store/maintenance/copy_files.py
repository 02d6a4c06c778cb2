"""File operations of backups: copy, hash and flush files in a draft folder, and rename it at the end."""

from __future__ import annotations

import datetime as dt
import hashlib
import os
import shutil
import sqlite3
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from lark_store.core.hashing import file_hash
from lark_store.errors import StoreError
from lark_store.results import BackupInfo, Progress
from lark_store.schema.faults import FAULTS, first_line

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lark_store.maintenance.damaged import Hashes
    from lark_store.results import OnProgress
    from lark_store.schema.vectors import VectorStore

RECORD = "backup.json"
CATALOG = "catalog.sqlite"
VECTORS = "vectors/"
DAMAGED = "damaged"  # key of the record: the store's errors, maybe empty; missing in older backups
_CHUNK = 1 << 22


@contextmanager
def draft_folder(target: Path) -> Iterator[Path]:
    """Yield a draft folder next to the target; it is removed unless published."""
    draft = target.parent / f".{target.name}.{uuid4().hex[:8]}"
    try:
        draft.mkdir(parents=True, mode=0o700)
        yield draft
    except OSError as error:
        raise StoreError(
            f"`{target}` can't be written: {error.strerror or error}", "check free disk space, or choose another path"
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def publish(draft: Path, target: Path) -> None:
    """Rename a draft folder to its final name."""
    draft.chmod(0o755)
    draft.rename(target)
    flush_folder(target.parent)


def copy_all(source: Path, target: Path, files: Hashes, on_progress: OnProgress | None) -> None:
    """Copy the files of a backup and verify their hashes."""
    for number, name in enumerate(files):
        if on_progress:
            on_progress(Progress("copying", number, len(files)))
        if copy(source / name, target / name) != files[name]:
            raise StoreError(f"`{source / name}` changed while it was read", "run the command again")
    for folder in {Path(name).parent for name in files}:
        flush_folder(target / folder)


def copy(source: Path, target: Path) -> list[Any]:
    """Copy a file and flush it to disk; returns the size and hash of the data read."""
    target.parent.mkdir(parents=True, exist_ok=True)
    digest, size = hashlib.sha256(), 0
    with source.open("rb") as reader, target.open("xb") as writer:
        while chunk := reader.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
            writer.write(chunk)
        writer.flush()
        os.fsync(writer.fileno())
    return [size, digest.hexdigest()]


def size_and_hash(path: Path) -> list[Any]:
    """Return a file's size and SHA-256."""
    return [path.stat().st_size, file_hash(path)]


def flush(path: Path, text: str) -> None:
    """Write a new file and flush it to disk."""
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    flush_folder(path.parent)


def flush_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, if the system supports it."""
    if os.name == "posix":
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def backup_info(path: Path | str, facts: dict[str, Any]) -> BackupInfo:
    """Return the record of a backup, or of the store restored from it."""
    return BackupInfo(
        path=path,
        store_uuid=facts["store_uuid"],
        schema=facts["schema"],
        created_at=dt.datetime.fromisoformat(facts["created_at"]),
        n_files=len(facts["files"]),
        n_bytes=sum(size for size, _ in facts["files"].values()),
        n_rows=facts["rows"],
        damaged=tuple(facts.get(DAMAGED, ())),
    )


def set_vectors(folder: Path, vectors: str | None) -> None:
    """Set the location of the vectors in a folder's catalogs, snapshots included; None: the folder itself."""
    for path in [folder / CATALOG, *(folder / "snapshots").glob("*.sqlite")]:
        with closing(sqlite3.connect(path)) as db, db:
            if "vectors" in {row[1] for row in db.execute("PRAGMA table_info(store_meta)")}:
                db.execute("UPDATE store_meta SET vectors = ?", [vectors])


def count_rows(vectors: VectorStore, tables: dict[str, Any]) -> int:
    """Verify the row count of each table of a copy; returns the total."""
    for name, facts in tables.items():
        try:
            n_rows = int(vectors.table(name).count_rows())
        except FAULTS as error:
            raise StoreError(
                f"the copy of `{name}` can't be read: {first_line(error)}", "run the command again"
            ) from error
        if n_rows != facts["rows"]:
            raise StoreError(f"the copy of `{name}` has {n_rows} rows, not {facts['rows']}", "run the command again")
    return sum(facts["rows"] for facts in tables.values())
