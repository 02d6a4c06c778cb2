"""`db backup` and `db restore`: the store at one moment as a folder of its own, each file with its hash.

A backup is a store in a folder, wherever the store itself is: its catalog as a SQLite file, of each Lance table the
files that its version needs, and those of the snapshots.
The catalog is copied and the versions are read while the catalog is locked, as for a snapshot, so an ingest may go on.
Files of a version never change, and `maintenance` keeps them from being cleaned up while they are copied.

All is written to a draft beside the target, flushed, opened, counted and then renamed; `backup.json`, written last,
has each file's SHA-256. What has another name than the target, or no such record, is no backup.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import os
import shutil
import sqlite3
import tempfile
from contextlib import closing, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from uuid import uuid4

from sqlalchemy import insert

from lark_store.errors import InputError, StoreError, StoreExistsError
from lark_store.schema.catalog import SnapshotCopy, now
from lark_store.schema.corrections import factor_files
from lark_store.schema.faults import fault_of
from lark_store.schema.hashes import file_hash
from lark_store.schema.location import Location
from lark_store.schema.locks import maintenance
from lark_store.schema.paths import exists, is_file
from lark_store.schema.records import BackupInfo, Progress
from lark_store.schema.vectors import VectorStore
from lark_store.upkeep.moment import FAULTS, first_line
from lark_store.upkeep.snapshots import TAG

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Connection

    from lark_store.schema.database import Database
    from lark_store.schema.records import OnProgress

RECORD = "backup.json"
CATALOG = "catalog.sqlite"
_VECTORS = "vectors/"
_CHUNK = 1 << 22
Hashes = dict[str, list[Any]]  # path below the folder, to size and SHA-256


class Schema(Protocol):
    """What the migrations do for a restored catalog."""

    def build(self, connection: Connection) -> None:
        """Make the tables of a fresh one."""

    def upgrade(self, location: Location) -> object:
        """Bring an older one up to date."""


def backup(db: Database, target: Path, schema: str, on_progress: OnProgress | None) -> BackupInfo:
    """Copy the store as it is now to `target`; see `Store.db_backup`."""
    root = db.location.root
    if exists(target):
        raise StoreExistsError(f"there is something at `{target}` already", "name a path that is not there yet")
    if root is not None and target.resolve().is_relative_to(root.resolve()):
        raise InputError(f"`{target}` is inside of the store", "name a path outside, best on another disk")
    with maintenance(db.location), _draft(target) as draft:
        tables, files = _moment(db, draft)
        hashes: Hashes = {}
        total = sum(len(names) for names in files.values())
        for table, names in files.items():
            for name in sorted(names):
                if on_progress:
                    on_progress(Progress(f"copying {table}", len(hashes), total))
                below = f"{_VECTORS}{table}.lance/{name}"
                hashes[below] = _fetch(db.vectors, f"{table}.lance/{name}", draft / below)
        for name in factor_files(db.vectors):
            hashes[f"{_VECTORS}{name}"] = _fetch(db.vectors, name, draft / f"{_VECTORS}{name}")
        place = Location.of(draft)
        _tag_again(place)
        n_rows = _counted(VectorStore(place.vectors), tables)
        for path in sorted(draft.rglob("*")):
            if path.is_file() and str(path.relative_to(draft)) not in hashes:
                hashes[str(path.relative_to(draft))] = _hash(path)
                _flush_folder(path.parent)
        facts = {
            "store_uuid": _uuid(draft),
            "schema": schema,
            "created_at": now().isoformat(),
            "lark_store": version("lark-store"),
            "rows": n_rows,
            "tables": tables,
            "files": hashes,
        }
        _flush(draft / RECORD, json.dumps(facts, indent=1))
        _put(draft, target)
    return _info(target, facts)


def restore(source: Path, target: Path, on_progress: OnProgress | None) -> BackupInfo:
    """Make a store in a folder of a backup; see `Store.db_restore`."""
    facts = read_record(source)
    if exists(target):
        raise StoreExistsError(f"there is something at `{target}` already", "move it away, or name another path")
    _check_all(source, facts["files"], on_progress)
    with _draft(target) as draft:
        _copy_all(source, draft, facts["files"], on_progress)
        _counted(VectorStore(Location.of(draft).vectors), facts["tables"])
        _put(draft, target)
    return _info(target, facts)


def restore_apart(
    source: Path, target: Location, vectors: str, schema: Schema, on_progress: OnProgress | None
) -> BackupInfo:
    """Make a store whose vectors are not in its folder of a backup; see `Store.db_restore`.

    The vectors first, then the catalog, in one rename or transaction: before that there is no store.
    """
    facts = read_record(source)
    _check_all(source, facts["files"], on_progress)
    tables = VectorStore(vectors)
    with uploading(tables):
        names = [name for name in facts["files"] if name.startswith(_VECTORS)]
        for number, name in enumerate(names):
            if on_progress:
                on_progress(Progress("copying", number, len(names)))
            tables.files.upload_file(str(source / name), name.removeprefix(_VECTORS))
        _counted(tables, facts["tables"])
        others = {name: said for name, said in facts["files"].items() if not name.startswith(_VECTORS)}
        with _draft(target.root or Path(tempfile.gettempdir()) / "lark-restore") as draft:
            _copy_all(source, draft, others, None)
            (draft / "vectors").mkdir()
            schema.upgrade(Location.of(draft))
            (draft / "vectors").rmdir()
            _point(draft, vectors)
            if target.root is not None:
                _put(draft, target.root)
            else:
                _fill(target, Location.of(draft), schema)
    return _info(target.label, facts)


def _fill(target: Location, source: Location, schema: Schema) -> None:
    """Fill a catalog in PostgreSQL with one in a folder, snapshots included."""
    from lark_store.schema.copies import copy_rows, read_file

    with target.catalog.migrating() as connection, tempfile.TemporaryDirectory(prefix="lark-") as folder:
        schema.build(connection)
        file = Path(folder) / "catalog.sqlite"
        source.catalog.copy(file)
        with read_file(file) as rows:
            copy_rows(rows, connection)
        for name in source.snapshots.names():
            with source.snapshots.catalog(name) as catalog:
                catalog.copy(file)
            row = {"name": name, "record": source.snapshots.record(name), "catalog": file.read_bytes()}
            connection.execute(insert(SnapshotCopy).values(**row))


@contextmanager
def uploading(vectors: VectorStore) -> Iterator[None]:
    """Make sure that nothing is where vectors are to be, and remove what was put there if the work fails.

    Raises
    ------
    StoreExistsError
    """
    if vectors.files.list():
        raise StoreExistsError(f"there is something at `{vectors.uri}` already", "name another place with `--vectors`")
    try:
        yield
    except BaseException:
        for path in vectors.files.list():
            vectors.files.delete_file(path)
        raise


def read_record(source: Path) -> dict[str, Any]:
    """Return what a backup says of itself.

    Raises
    ------
    StoreError
        There is no backup, or its record is none of ours.
    """
    if not is_file(source / RECORD):
        raise StoreError(f"there is no backup at `{source}`: it has no `{RECORD}`", "`lark-store db backup` makes one")
    try:
        facts: dict[str, Any] = json.loads((source / RECORD).read_text(encoding="utf-8"))
        names = list(facts["files"])
        sound = {"store_uuid", "schema", "created_at", "rows", "tables"} <= facts.keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"`{source / RECORD}` can't be read: {error}", "take another backup") from error
    inside = source.resolve()
    if not sound or not all((inside / name).resolve().is_relative_to(inside) for name in names):
        raise StoreError(f"`{source / RECORD}` is no record of a backup", "take another backup")
    return facts


def _check_all(source: Path, files: Hashes, on_progress: OnProgress | None) -> None:
    """Compare each file with its hash, before anything is written."""
    for number, (name, (size, sha256)) in enumerate(files.items()):
        if on_progress:
            on_progress(Progress("checking the backup", number, len(files)))
        path = source / name
        if not is_file(path):
            raise StoreError(f"the backup is not whole: `{path}` is missing", "take another backup")
        if _hash(path) != [size, sha256]:
            raise StoreError(f"the backup is damaged: `{path}` is not what was written", "take another backup")


# --- the moment ----------------------------------------------------------------------------------------------------


def _moment(db: Database, draft: Path) -> tuple[dict[str, Any], dict[str, set[str]]]:
    """Copy the catalogs; return each table's version and rows at that moment, and the files to copy, by table."""
    (draft / "vectors").mkdir()
    place = Location.of(draft)
    tables: dict[str, Any] = {}
    with db.location.catalog.frozen():
        db.location.catalog.copy(draft / CATALOG)
        for name in sorted(db.vectors.table_names()):
            if db.vectors.has(name):  # else it is being made: no committed run has rows in it
                table = db.vectors.table(name)
                tables[name] = {"version": int(table.version), "rows": int(table.count_rows())}
    wanted = {name: {facts["version"]} for name, facts in tables.items()}
    for name in db.location.snapshots.names():
        record = db.location.snapshots.record(name)
        with db.location.snapshots.catalog(name) as catalog, place.snapshots.making(name) as copy:
            catalog.copy(copy)
            place.snapshots.keep(name, copy, record)
        for table, number in record["tables"].items():
            wanted.setdefault(table, set()).add(number)
    _point(draft, None)
    return tables, {table: _files(db, table, versions) for table, versions in wanted.items()}


def _point(folder: Path, vectors: str | None) -> None:
    """Say in the catalogs of a folder, the snapshots' too, where the vectors are; None: beside them."""
    for path in [folder / CATALOG, *(folder / "snapshots").glob("*.sqlite")]:
        with closing(sqlite3.connect(path)) as db, db:
            if "vectors" in {row[1] for row in db.execute("PRAGMA table_info(store_meta)")}:
                db.execute("UPDATE store_meta SET vectors = ?", [vectors])


def _files(db: Database, table: str, versions: set[int]) -> set[str]:
    """Return the files that some versions of a table need, as paths below its folder."""
    names: set[str] = set()
    seen: set[int] = set()
    try:
        for batch in db.vectors.connection.open_table(table).to_lance().tracked_files(min_version=min(versions)):
            for number, path in zip(batch.column("version").to_pylist(), batch.column("path").to_pylist(), strict=True):
                if number in versions:
                    seen.add(number)
                    names.add(path)
    except FAULTS as error:
        raise StoreError(f"`{table}` can't be read: {first_line(error)}", "try `lark-store db check`") from error
    if seen != versions:
        raise StoreError(
            f"version {min(versions - seen)} of `{table}`, which a snapshot needs, is gone", "try `lark-store db check`"
        )
    return names


def _tag_again(place: Location) -> None:
    """Tag the versions of the snapshots in the copy, so that they are kept there too."""
    vectors = VectorStore(place.vectors)
    for name in place.snapshots.names():
        for table, number in place.snapshots.record(name)["tables"].items():
            vectors.table(table).to_lance().tags.create(f"{TAG}{name}", number)


def _counted(vectors: VectorStore, tables: dict[str, Any]) -> int:
    """Open each table of a copy and count its rows; returns how many there are in all."""
    for name, facts in tables.items():
        try:
            found = int(vectors.table(name).count_rows())
        except FAULTS as error:
            raise StoreError(f"the copy of `{name}` can't be read: {first_line(error)}", "run it again") from error
        if found != facts["rows"]:
            raise StoreError(f"the copy of `{name}` has {found} rows, not {facts['rows']}", "run the command again")
    return sum(facts["rows"] for facts in tables.values())


def _uuid(folder: Path) -> str:
    with closing(sqlite3.connect(f"{(folder / CATALOG).resolve().as_uri()}?mode=ro", uri=True)) as db:
        return str(db.execute("SELECT store_uuid FROM store_meta").fetchone()[0])


# --- files ---------------------------------------------------------------------------------------------------------


@contextmanager
def _draft(target: Path) -> Iterator[Path]:
    """Make a folder beside the target, which goes again if the work ends with an error."""
    draft = target.parent / f".{target.name}.{uuid4().hex[:8]}"
    try:
        draft.mkdir(parents=True, mode=0o700)
        yield draft
    except OSError as error:
        raise StoreError(
            f"`{target}` can't be written: {error.strerror or error}", "is the disk full? name another path"
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _put(draft: Path, target: Path) -> None:
    """Give a folder its name."""
    draft.chmod(0o755)
    draft.rename(target)
    _flush_folder(target.parent)


def _fetch(vectors: VectorStore, name: str, target: Path) -> list[Any]:
    """Copy a file of the vectors to the disk itself, wherever it is; returns its size and hash."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        vectors.files.download_file(name, str(target))
    except FAULTS as error:
        raise fault_of(error) or StoreError(
            f"`{vectors.uri}/{name}` can't be copied: {first_line(error)}", "try `lark-store db check`"
        ) from error
    with target.open("rb") as file:
        os.fsync(file.fileno())
    return _hash(target)


def _copy_all(source: Path, target: Path, files: Hashes, on_progress: OnProgress | None) -> None:
    """Copy the files of a backup, each compared with its hash as it is read."""
    for number, name in enumerate(files):
        if on_progress:
            on_progress(Progress("copying", number, len(files)))
        if _copy(source / name, target / name) != files[name]:
            raise StoreError(f"`{source / name}` changed while it was read", "run the command again")
    for folder in {Path(name).parent for name in files}:
        _flush_folder(target / folder)


def _copy(source: Path, target: Path) -> list[Any]:
    """Copy a file to the disk itself; returns its size and hash as they were read."""
    target.parent.mkdir(parents=True, exist_ok=True)
    digest, size = hashlib.sha256(), 0
    with source.open("rb") as read, target.open("xb") as write:
        while chunk := read.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
            write.write(chunk)
        write.flush()
        os.fsync(write.fileno())
    return [size, digest.hexdigest()]


def _hash(path: Path) -> list[Any]:
    return [path.stat().st_size, file_hash(path)]


def _flush(path: Path, text: str) -> None:
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    _flush_folder(path.parent)


def _flush_folder(folder: Path) -> None:
    """Bring a folder's entries to the disk, where the system can."""
    if os.name == "posix":
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def _info(path: Path | str, facts: dict[str, Any]) -> BackupInfo:
    return BackupInfo(
        path=path,
        store_uuid=facts["store_uuid"],
        schema=facts["schema"],
        created_at=dt.datetime.fromisoformat(facts["created_at"]),
        n_files=len(facts["files"]),
        n_bytes=sum(size for size, _ in facts["files"].values()),
        n_rows=facts["rows"],
    )
