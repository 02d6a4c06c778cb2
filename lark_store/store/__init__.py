"""`Store`, the public face: make, open and close a store, and one method for each command, in parts by kind."""

from __future__ import annotations

import shutil
import tempfile
import uuid
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Self

from lark_store import migrations
from lark_store.errors import StoreError, StoreExistsError
from lark_store.schema.catalog import StoreMeta
from lark_store.schema.database import Database, Location, exists, is_file
from lark_store.store.ask import Ask
from lark_store.store.care import Care
from lark_store.store.doors import Doors
from lark_store.store.manage import Manage
from lark_store.store.part import DEFAULT_SKETCHER, location_of
from lark_store.store.trust import Trust
from lark_store.store.work import Work

if TYPE_CHECKING:
    from types import TracebackType


class Store(Manage, Work, Ask, Doors, Care, Trust):
    """An open store. Make one with `Store.create`, open one with `Store.open`; use it as a context manager.

    Names are slugs (`a-z`, `0-9`, `.`, `_`, `-`). Every method raises a `LarkStoreError` with a hint for a foreseeable
    fault; a name or an input that is wrong changes nothing.
    """

    def __init__(self, database: Database) -> None:
        self._db = database

    @classmethod
    def create(cls, path: str | Path | None = None) -> Self:
        """Make a fresh store with the variants `raw` and `chatml` and the sketcher `lark`, and open it.

        `path` is a folder that does not exist yet (default: `LARK_STORE` or `./lark.store`).

        Raises
        ------
        StoreExistsError
            There is something at `path` already.
        """
        location = location_of(path)
        if exists(location.root):
            is_store = is_file(location.catalog)
            raise StoreExistsError(
                f"there is {'a store' if is_store else 'something'} at `{location.root}` already",
                "use it as it is" if is_store else "name another path with `--store PATH`",
            )
        try:
            location.root.parent.mkdir(parents=True, exist_ok=True)
            draft = Location(Path(tempfile.mkdtemp(prefix=f".{location.root.name}.", dir=location.root.parent)))
        except OSError as error:
            raise StoreError(
                f"a store can't be made at `{location.root}`: {error.strerror}", "name another path with `--store PATH`"
            ) from error
        try:
            _build(draft)
            draft.root.chmod(0o755)
            draft.root.rename(location.root)
        finally:
            shutil.rmtree(draft.root, ignore_errors=True)
        return cls.open(location.root)

    @classmethod
    def open(cls, path: str | Path | None = None, *, snapshot: str | None = None) -> Self:
        """Open a store, or with `snapshot` the store as it was when that was made: to be read only.

        Never changes its schema.

        Raises
        ------
        NotAStoreError, OlderSchemaError, NewerSchemaError, NameUnknownError
        """
        location = location_of(path)
        migrations.check(location)
        if snapshot is None:
            return cls(Database(location))
        from lark_store.upkeep.snapshots import read

        versions = read(location, snapshot).tables
        location = location_of(path, snapshot)
        migrations.check(location)
        return cls(Database(location, versions))

    def close(self) -> None:
        """Let go of the store's files."""
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r})"

    @property
    def path(self) -> Path:
        """The store's folder."""
        return self._db.location.root


def _build(location: Location) -> None:
    """Build a fresh store: the catalog by the migrations, the empty tables, the built-in variants and sketcher."""
    from lark_store.ingest.sketchers import make_sketcher
    from lark_store.ingest.variants import BUILT_IN, DEFAULT_MAX_LENGTH, make_variant

    migrations.create(location)
    database = Database(location)
    database.vectors.create()
    with database.session() as session:
        session.add(StoreMeta(id=1, store_uuid=str(uuid.uuid4()), created_with=version("lark-store")))
        session.add_all(make_variant(name, name, "auto", DEFAULT_MAX_LENGTH) for name in BUILT_IN)
        session.add(make_sketcher(DEFAULT_SKETCHER))
    database.close()
