"""`Store`, the public API: create, open and close a store; one method per command, grouped in parts."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Self

from lark_store import migrations
from lark_store.errors import InputError, StoreError
from lark_store.schema.backends.open import check_vectors
from lark_store.schema.database import Database
from lark_store.store.answers import AnswerMethods
from lark_store.store.base import location_of
from lark_store.store.compute import ComputeMethods
from lark_store.store.create import make
from lark_store.store.eif import EifMethods
from lark_store.store.facts import FactMethods
from lark_store.store.integrity import IntegrityMethods
from lark_store.store.interchange import InterchangeMethods
from lark_store.store.lifecycle import LifecycleMethods
from lark_store.store.presentation import PresentationMethods
from lark_store.store.registry import RegistryMethods
from lark_store.store.samples import SampleMethods

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType


class Store(
    RegistryMethods,
    SampleMethods,
    ComputeMethods,
    EifMethods,
    AnswerMethods,
    FactMethods,
    PresentationMethods,
    InterchangeMethods,
    LifecycleMethods,
    IntegrityMethods,
):
    """An open store. Create one with `Store.create` or open one with `Store.open`, and use it as a context manager.

    Names are slugs (`a-z`, `0-9`, `.`, `_`, `-`). Foreseeable faults raise a `LarkStoreError` with a hint. A wrong name
    or input changes nothing.
    """

    def __init__(self, database: Database) -> None:
        if not isinstance(database, Database):
            raise InputError(
                "`Store(...)` takes no path: use `Store.open` to open a store or `Store.create` to create one",
                f"for example `Store.open({str(database)!r})`",
            )
        self._db = database

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the store's location; unpickling reopens it."""
        self._db.check_usable()
        location, snapshot = self._db.location, self._db.snapshot
        if location.has_password:
            raise StoreError(
                f"the store `{self.place}` can't be pickled: its URL holds a password",
                "set PGPASSWORD instead, or open the store in each process",
            )
        opened = partial(type(self).open, snapshot=None if snapshot is None else snapshot.name)
        return opened, (location.label if location.root is None else str(location.root),)

    @classmethod
    def create(cls, path: str | Path | None = None, *, vectors: str | None = None, sketcher: str | None = None) -> Self:
        """Create a store with the variants `raw` and `chatml` and the sketchers `lark` and `adam`, and open it.

        `path` is a folder that doesn't exist yet (default: `LARK_STORE` or `./lark.store`), or `postgresql://…`, a
        database without a store. `vectors` is the location of the vectors: a folder or a URL `s3://…`, `gs://…` or
        `az://…`. By default they lie beside the catalog; with PostgreSQL the location is required. `sketcher` is the
        default sketcher, one of the built-in ones (default: `lark`, the paper's); see `sketcher_default`.

        Raises
        ------
        StoreExistsError
            `path` or `vectors` is already in use.
        NameUnknownError, StoreError
        """
        location = location_of(path)
        make(location, None if vectors is None else check_vectors(vectors), sketcher)
        return cls.open(path)

    @classmethod
    def open(cls, path: str | Path | None = None, *, snapshot: str | None = None) -> Self:
        """Open a store, or with `snapshot` a read-only view of the store as it was at that snapshot.

        Never changes the schema.

        Raises
        ------
        NotAStoreError, OlderSchemaError, NewerSchemaError, NameUnknownError
        """
        location = location_of(path)
        migrations.check(location)
        if snapshot is None:
            return cls(Database(location))
        from lark_store.maintenance.snapshots import read

        info = read(location, snapshot)
        migrations.check(location, snapshot)
        return cls(Database(location, info))

    def close(self) -> None:
        """Release the store's files. The object can't be used afterwards."""
        self._db.close()

    def __enter__(self) -> Self:
        self._db.check_usable()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Store({self.place!r})"

    @property
    def place(self) -> str:
        """The store's location as it was given, without a password."""
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
            raise StoreError(f"the store `{self.place}` has no folder", "use `Store.place` for its location")
        return self._db.location.root
