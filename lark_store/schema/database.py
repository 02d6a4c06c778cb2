"""The open database: the catalog's SQLAlchemy engine and the connection to the vectors."""

from __future__ import annotations

import os
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from sqlalchemy import event, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from lark_store.core.fork import check_owner
from lark_store.core.names import check_name
from lark_store.core.paths import is_folder
from lark_store.errors import NameTakenError, NameUnknownError, StoreBusyError, StoreError
from lark_store.schema.catalog import Checkpoint, Evaluation, FormatVariant, Sketcher, Source, StoreMeta, Study
from lark_store.schema.catalog_base import Named
from lark_store.schema.column_types import UnreadableValueError
from lark_store.schema.faults import CHECK_HINT
from lark_store.schema.vectors import VectorStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy import Engine

    from lark_store.results import SnapshotInfo
    from lark_store.schema.backends.base import Location

N = TypeVar("N", bound=Named)
V = TypeVar("V")

_KINDS: dict[type[Named], tuple[str, str]] = {
    Study: ("study", "create one with `lark-store study run`"),
    Evaluation: ("evaluation", "create one with `lark-store evaluate`"),
    Checkpoint: ("checkpoint", "add it with `lark-store checkpoint add`"),
    Source: ("source", "add it with `lark-store source add`"),
    FormatVariant: ("variant", "add it with `lark-store variant add`"),
    Sketcher: ("sketcher", "add it with `lark-store sketcher add`"),
}


def read_only(snapshot: str | None, *_: object) -> NoReturn:
    """Refuse to write through a snapshot."""
    name = f": `{snapshot}`" if snapshot else ""
    raise StoreError(f"a snapshot is read-only{name}", "to change the store, open it without `--snapshot`")


class Database:
    """An open store: `session()` for the catalog, `vectors` for the Lance tables.

    With `snapshot`, tables are read at the snapshot's versions and can't be written.
    """

    def __init__(self, location: Location, snapshot: SnapshotInfo | None = None) -> None:
        self.location = location
        self.snapshot = snapshot
        if snapshot is None:
            self.engine: Engine = location.catalog.engine()
            self.vectors = VectorStore(location.vectors)
        else:
            self.engine = location.snapshots.engine(snapshot.name)
            self.vectors = VectorStore(location.vectors, snapshot.tables)
        self._memory: dict[str, tuple[object, Any]] = {}
        self._pid = os.getpid()
        self._is_closed = False

    def check_usable(self) -> None:
        """Check that this process can use the store.

        Raises
        ------
        StoreError
            The store is closed, was opened before a fork, or its folder is missing.
        """
        label, root = self.location.label, self.location.root
        if self._is_closed:
            raise StoreError(f"the store `{label}` is closed", "open it again with `Store.open`")
        check_owner(self._pid, label)
        if root is not None and not is_folder(root):
            raise StoreError(f"the open store `{label}` was moved or removed", "open it at its new path")

    @property
    def is_snapshot(self) -> bool:
        """Whether this is a snapshot."""
        return self.snapshot is not None

    @property
    def default_sketcher(self) -> str:
        """The name of the default sketcher."""
        with self.session() as session:
            return _default_sketcher(session)

    def remember(self, key: str, state: object, make: Callable[[], V]) -> V:
        """Return the cached value of `key` for this state of the store, or make it. Only one state is cached."""
        entry = self._memory.get(key)
        if entry is None or entry[0] != state:
            self._memory[key] = entry = (state, make())
        value: V = entry[1]
        return value

    def close(self) -> None:
        """Close the catalog's connections and clear the cache."""
        self._is_closed = True
        self._memory.clear()
        self.engine.dispose(close=self._pid == os.getpid())  # in a fork, the connections belong to the parent

    @contextmanager
    def session(self) -> Iterator[Session]:
        """Open a transaction on the catalog: committed at the end, rolled back on an error."""
        try:
            with Session(self.engine, expire_on_commit=False) as session, session.begin():
                if self.snapshot is not None:
                    event.listen(session, "before_flush", partial(read_only, self.snapshot.name))
                yield session
        except UnreadableValueError as error:
            raise self._unreadable(error) from error
        except IntegrityError as error:  # the row was added after the lookup
            raise StoreBusyError("another process changed the same catalog row", "run the command again") from error

    def _unreadable(self, error: UnreadableValueError) -> UnreadableValueError:
        """Add the row and column to the error of an undecodable value."""
        from lark_store.schema.catalog_values import wrong_values

        with self.engine.connect() as connection:
            first = next((value for value in wrong_values(connection) if value.is_unreadable), None)
        return error if first is None else UnreadableValueError(f"the catalog is damaged: {first}", CHECK_HINT)


def lock_catalog(session: Session) -> None:
    """Take the catalog's write lock until the transaction ends, so that rows read from here on can't change.

    Transactions that start with this lock are serial. Call it before the first read: SQLite refuses to upgrade a
    transaction from reading to writing after another one has written.
    """
    session.execute(update(StoreMeta).values(id=StoreMeta.id))


def find(session: Session, kind: type[N], name: str) -> N:
    """Return the row with this name.

    Raises
    ------
    NameUnknownError
        Its hint is the nearest name.
    """
    is_valid = "\0" not in name  # PostgreSQL refuses NUL in text
    row = session.scalar(select(kind).where(kind.name == name)) if is_valid else None
    if row is None:
        label, how_to_add = _KINDS[kind]
        raise NameUnknownError.of(label, name, session.scalars(select(kind.name)), how_to_add)
    return row


def find_sketcher(session: Session, name: str | None) -> Sketcher:
    """Return the sketcher with this name, by default the store's."""
    return find(session, Sketcher, _default_sketcher(session) if name is None else name)


def _default_sketcher(session: Session) -> str:
    name = session.scalars(select(StoreMeta.sketcher)).one_or_none()
    if name is None:
        raise StoreError("the catalog is damaged: store_meta has no row", CHECK_HINT)
    return name


def check_unchanged(db: Database, *rows: Named) -> None:
    """Check that rows read earlier are still in the catalog, not removed or replaced under the same name.

    Raises
    ------
    NameUnknownError
    """
    with db.session() as session:
        for row in rows:
            current = find(session, type(row), row.name)
            if (current.id, current.created_at) != (row.id, row.created_at):
                label, _ = _KINDS[type(row)]
                raise NameUnknownError(f"{label} `{row.name}` was removed and added again", "run the command again")


def find_same(session: Session, row: N, same: tuple[str, ...]) -> N | None:
    """Return the stored row with the name of `row`, or None; the two must agree in the columns `same`.

    Raises
    ------
    NameInvalidError, NameTakenError
    """
    check_name(row.name)
    kind = type(row)
    stored = session.scalar(select(kind).where(kind.name == row.name))
    if stored is None:
        return None
    differs = [c for c in same if getattr(stored, c) != getattr(row, c)]
    if differs:
        label, _ = _KINDS[kind]
        facts = ", ".join(_difference(column, getattr(stored, column), getattr(row, column)) for column in differs)
        raise NameTakenError(
            f"{label} `{row.name}` already exists with {facts}",
            "names can't be redefined; choose another name",
        )
    return stored


def _difference(column: str, stored: object, new: object) -> str:
    """Describe two values of a column; recipes are too long to print."""
    if not isinstance(stored, dict):
        return f"{column} `{stored}`, not `{new}`"
    if column == "recipe" or not isinstance(new, dict):
        return f"another {column}"
    keys = [key for key in stored | new if stored.get(key) != new.get(key)]
    return ", ".join(_difference(key, stored.get(key), new.get(key)) for key in keys)


def add_named(session: Session, row: N, same: tuple[str, ...]) -> N:
    """Add a row, or return the stored row if it agrees in the columns `same`: adding is idempotent."""
    stored = find_same(session, row, same)
    if stored is None:
        session.add(row)
        session.flush()
    return stored or row
