"""The open database: the SQLAlchemy engine of the catalog and the connection to the vectors."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from sqlalchemy import event, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from lark_store.errors import NameTakenError, NameUnknownError, StoreBusyError, StoreError
from lark_store.schema.catalog import (
    Checkpoint,
    Evaluation,
    FormatVariant,
    Named,
    Sketcher,
    Source,
    StoreMeta,
    Study,
)
from lark_store.schema.names import check_name
from lark_store.schema.vectors import VectorStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy import Engine

    from lark_store.schema.location import Location
    from lark_store.schema.records import SnapshotInfo

N = TypeVar("N", bound=Named)
V = TypeVar("V")

_KINDS: dict[type[Named], tuple[str, str]] = {
    Study: ("study", "make one with `lark-store study run`"),
    Evaluation: ("evaluation", "make one with `lark-store evaluate`"),
    Checkpoint: ("checkpoint", "add it with `lark-store checkpoint add`"),
    Source: ("source", "add it with `lark-store source add`"),
    FormatVariant: ("variant", "add it with `lark-store variant add`"),
    Sketcher: ("sketcher", "add it with `lark-store sketcher add`"),
}


def read_only(what: str | None, *_: object) -> NoReturn:
    """Refuse to write through a snapshot."""
    raise StoreError(
        f"a snapshot is read-only{f': `{what}`' if what else ''}", "open the store itself to change it: no `--snapshot`"
    )


class Database:
    """A store that is open: `session()` for the catalog, `vectors` for the Lance tables.

    With `snapshot`, its tables are read at that snapshot's versions; nothing can be written then.
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

    @property
    def is_snapshot(self) -> bool:
        """Whether this is a snapshot."""
        return self.snapshot is not None

    @property
    def default_sketcher(self) -> str:
        """The name of the sketcher that is used where none is named."""
        with self.session() as session:
            return session.scalars(select(StoreMeta.sketcher)).one()

    def remember(self, what: str, state: object, make: Callable[[], V]) -> V:
        """Return `what` as it was made for this state of the store, or make it; one state of it is kept."""
        held = self._memory.get(what)
        if held is None or held[0] != state:
            self._memory[what] = held = (state, make())
        found: V = held[1]
        return found

    def close(self) -> None:
        """Let go of the catalog and of what is remembered."""
        self._memory.clear()
        self.engine.dispose()

    @contextmanager
    def session(self) -> Iterator[Session]:
        """Open a transaction on the catalog: committed at the end, rolled back on an error."""
        try:
            with Session(self.engine, expire_on_commit=False) as session, session.begin():
                if self.snapshot is not None:
                    event.listen(session, "before_flush", partial(read_only, self.snapshot.name))
                yield session
        except IntegrityError as error:  # what was looked up first is there since
            raise StoreBusyError(
                "another process changed the same in the catalog at the same time", "run the command again"
            ) from error


def find(session: Session, kind: type[N], name: str) -> N:
    """Return the row with this name.

    Raises
    ------
    NameUnknownError
        With the nearest name as its hint.
    """
    may_be = "\0" not in name  # which PostgreSQL takes in no text
    row = session.scalar(select(kind).where(kind.name == name)) if may_be else None
    if row is None:
        label, how = _KINDS[kind]
        raise NameUnknownError.of(label, name, session.scalars(select(kind.name)), how)
    return row


def still_there(db: Database, *rows: Named) -> None:
    """Make sure that rows read before are in the catalog yet, not removed and not others of the same name.

    Raises
    ------
    NameUnknownError
    """
    with db.session() as session:
        for row in rows:
            found = find(session, type(row), row.name)
            if (found.id, found.created_at) != (row.id, row.created_at):
                label, _ = _KINDS[type(row)]
                raise NameUnknownError(f"{label} `{row.name}` was removed and added again", "run the command again")


def known_as(session: Session, row: N, same: tuple[str, ...]) -> N | None:
    """Return the stored row of this name, or None; its columns in `same` must hold what `row` says.

    Raises
    ------
    NameInvalidError, NameTakenError
    """
    check_name(row.name)
    kind = type(row)
    known = session.scalar(select(kind).where(kind.name == row.name))
    if known is None:
        return None
    differs = [c for c in same if getattr(known, c) != getattr(row, c)]
    if differs:
        label, _ = _KINDS[kind]
        facts = ", ".join(f"{c} `{getattr(known, c)}`, not `{getattr(row, c)}`" for c in differs)
        raise NameTakenError(
            f"{label} `{row.name}` is in the store already with {facts}",
            "a name never changes its meaning; choose another name",
        )
    return known


def add_named(session: Session, row: N, same: tuple[str, ...]) -> N:
    """Add a row, or return the stored one that says the same: adding is idempotent."""
    known = known_as(session, row, same)
    if known is None:
        session.add(row)
        session.flush()
    return known or row
