"""`Store`, the public face: make, open and close a store, and one method for each command, in parts by kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from lark_store import migrations
from lark_store.errors import StoreError
from lark_store.schema.database import Database
from lark_store.schema.location import check_vectors
from lark_store.store.ask import Ask
from lark_store.store.care import Care
from lark_store.store.doors import Doors
from lark_store.store.fresh import make
from lark_store.store.manage import Manage
from lark_store.store.part import location_of
from lark_store.store.trust import Trust
from lark_store.store.work import Work

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType


class Store(Manage, Work, Ask, Doors, Care, Trust):
    """An open store. Make one with `Store.create`, open one with `Store.open`; use it as a context manager.

    Names are slugs (`a-z`, `0-9`, `.`, `_`, `-`). Every method raises a `LarkStoreError` with a hint for a foreseeable
    fault; a name or an input that is wrong changes nothing.
    """

    def __init__(self, database: Database) -> None:
        self._db = database

    @classmethod
    def create(cls, path: str | Path | None = None, *, vectors: str | None = None, sketcher: str | None = None) -> Self:
        """Make a fresh store with the variants `raw` and `chatml` and the sketchers `lark` and `adam`, and open it.

        `path` is a folder that does not exist yet (default: `LARK_STORE` or `./lark.store`), or `postgresql://…`, a
        database in which there is no store yet. `vectors` is where the vectors go: a folder or a URL `s3://…`, `gs://…`
        or `az://…`; beside the catalog by default, always to be named where that is in PostgreSQL. `sketcher` is the
        built-in one that is used where none is named (default: `lark`, the paper's); see `sketcher_default`.

        Raises
        ------
        StoreExistsError
            There is something at `path` or `vectors` already.
        NameUnknownError, StoreError
        """
        location = location_of(path)
        make(location, None if vectors is None else check_vectors(vectors), sketcher)
        return cls.open(path)

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

        info = read(location, snapshot)
        migrations.check(location, snapshot)
        return cls(Database(location, info))

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
        return f"Store({self.place!r})"

    @property
    def place(self) -> str:
        """Where the store is, as it was named, without a password."""
        return self._db.location.label

    @property
    def path(self) -> Path:
        """The store's folder.

        Raises
        ------
        StoreError
            Its catalog is in PostgreSQL.
        """
        if self._db.location.root is None:
            raise StoreError(f"the store `{self.place}` has no folder", "`Store.place` says where it is")
        return self._db.location.root
