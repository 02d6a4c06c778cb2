"""Damaged stores and backups: refuse them, or copy them as they are on request."""

from __future__ import annotations

import shutil
import sqlite3
from typing import TYPE_CHECKING

from lark_store.core.hashing import file_hash
from lark_store.core.paths import is_file
from lark_store.errors import StoreError
from lark_store.maintenance.check.run import check
from lark_store.schema.backends.open import location_at
from lark_store.schema.database import Database
from lark_store.schema.faults import FAULTS, first_line

if TYPE_CHECKING:
    from pathlib import Path

    from lark_store.results import OnProgress

Hashes = dict[str, list[int | str]]  # path below the folder, to size and SHA-256
_MAX_ERRORS = 20  # in a backup's record


def check_errors(db: Database, on_progress: OnProgress | None) -> list[str]:
    """Check a store and return descriptions of its errors."""
    findings = check(db, deep=False, on_progress=on_progress)
    return [f"{f.what}: {f.where}: {f.detail}" for f in findings if f.severity == "error"]


def check_folder(folder: Path, on_progress: OnProgress | None) -> list[str]:
    """Check the store in a folder and return descriptions of its errors."""
    db = Database(location_at(folder))
    try:
        return check_errors(db, on_progress)
    finally:
        db.close()
        shutil.rmtree(folder / "locks", ignore_errors=True)


def limited(errors: list[str]) -> list[str]:
    """Return the errors for a backup's record, limited in number."""
    return errors[:_MAX_ERRORS] + ([f"and {len(errors) - _MAX_ERRORS} more"] if len(errors) > _MAX_ERRORS else [])


def refuse(label: str, errors: list[str], hint: str) -> None:
    """Refuse a store or backup with errors.

    Raises
    ------
    StoreError
    """
    if errors:
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise StoreError(f"{label} is damaged: {errors[0]}{more}", hint)


def copy_catalog(db: Database, target: Path) -> None:
    """Copy the catalog to a file, byte for byte if SQLite can't copy it."""
    try:
        db.location.catalog.copy(target)
    except sqlite3.DatabaseError:
        if db.location.root is None:
            raise
        for path in db.location.root.glob("catalog.sqlite*"):
            shutil.copy(path, target.with_name(path.name))


def copy_snapshots(db: Database, draft: Path) -> None:
    """Copy the snapshots' records and catalogs; skip unreadable ones."""
    place = location_at(draft)
    for name in db.location.snapshots.names():
        try:
            record = db.location.snapshots.record(name)
            with db.location.snapshots.catalog(name) as catalog, place.snapshots.making(name) as copy:
                catalog.copy(copy)
                place.snapshots.keep(name, copy, record)
        except (*FAULTS, sqlite3.Error, KeyError):
            continue  # reported by the check and in the backup's record


def compare_files(source: Path, files: Hashes) -> tuple[Hashes, list[str]]:
    """Compare a backup's files with their hashes; returns the existing files as they are, and the problems."""
    present: Hashes = {}
    problems: list[str] = []
    for name, expected in files.items():
        path = source / name
        if not is_file(path):
            problems.append(f"`{path}` is missing")
            continue
        try:
            present[name] = [path.stat().st_size, file_hash(path)]
        except OSError as error:
            problems.append(f"`{path}` can't be read: {first_line(error)}")
            continue
        if present[name] != expected:
            problems.append(f"`{path}` changed after it was written")
    return present, problems
