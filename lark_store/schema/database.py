"""The open database: the SQLAlchemy engine of the catalog and the connection to the vectors."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from sqlalchemy import URL, Engine, create_engine, event, select
from sqlalchemy.orm import Session

from lark_store.errors import NameTakenError, NameUnknownError, StoreError
from lark_store.schema.catalog import Checkpoint, FormatVariant, Named, Sketcher, Source, Study
from lark_store.schema.names import check_name
from lark_store.schema.vectors import VectorStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

APPLICATION_ID = 0x4C41524B  # "LARK" in the header of the SQLite file
BUSY_TIMEOUT_S = 30
N = TypeVar("N", bound=Named)
V = TypeVar("V")

_KINDS: dict[type[Named], tuple[str, str]] = {
    Study: ("study", "make one with `lark-store study run`"),
    Checkpoint: ("checkpoint", "add it with `lark-store checkpoint add`"),
    Source: ("source", "add it with `lark-store source add`"),
    FormatVariant: ("variant", "add it with `lark-store variant add`"),
    Sketcher: ("sketcher", "add it with `lark-store sketcher add`"),
}


def exists(path: Path) -> bool:
    """Tell whether there is something at `path`; a name that no file can have is nowhere."""
    try:
        return path.exists()
    except OSError:
        return False


def is_file(path: Path) -> bool:
    """Tell whether there is a file at `path`; a name that no file can have is none."""
    return exists(path) and path.is_file()


def is_folder(path: Path) -> bool:
    """Tell whether there is a folder at `path`; a name that no file can have is none."""
    return exists(path) and path.is_dir()


def to_read(catalog: Path) -> str:
    """Return the URI by which SQLite reads a catalog: read-only, unless a killed upgrade left what is to be undone."""
    mode = "rw" if is_file(catalog.with_name(f"{catalog.name}-journal")) else "ro"
    return f"{catalog.resolve().as_uri()}?mode={mode}"


@dataclass(frozen=True)
class Location:
    """Where a store's parts are: a folder that holds the catalog file, the vector tables and the locks.

    With `snapshot` it is the store as it was then: the catalog is the snapshot's copy.
    """

    root: Path
    snapshot: str | None = None

    @property
    def catalog(self) -> Path:
        """The SQLite file of the catalog."""
        return self.root / "catalog.sqlite" if self.snapshot is None else self.snapshots / f"{self.snapshot}.sqlite"

    @property
    def snapshots(self) -> Path:
        """The folder of the snapshots: a copy of the catalog each, and a record of the tables' versions."""
        return self.root / "snapshots"

    def snapshot_names(self) -> list[str]:
        """Return the names of the snapshots that are whole."""
        return sorted(path.name.removesuffix(".json") for path in self.snapshots.glob("*.json"))

    @property
    def vectors(self) -> Path:
        """The folder of the Lance tables."""
        return self.root / "vectors"

    @property
    def locks(self) -> Path:
        """The folder of the lock files of running work."""
        return self.root / "locks"


def _configure(connection: Any, _record: object) -> None:
    cursor = connection.cursor()
    for pragma in ("foreign_keys = ON", "journal_mode = WAL", f"busy_timeout = {BUSY_TIMEOUT_S * 1000}"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _configure_snapshot(connection: Any, _record: object) -> None:
    connection.execute("PRAGMA query_only = ON")


def read_only(what: str | None, *_: object) -> NoReturn:
    """Refuse to write through a snapshot."""
    raise StoreError(
        f"a snapshot is read-only{f': `{what}`' if what else ''}", "open the store itself to change it: no `--snapshot`"
    )


class Database:
    """A store that is open: `session()` for the catalog, `vectors` for the Lance tables.

    For a snapshot, `versions` has the tables' versions; nothing can be written then.
    """

    def __init__(self, location: Location, versions: dict[str, int] | None = None) -> None:
        self.location = location
        self.is_snapshot = versions is not None
        self.engine: Engine = create_engine(URL.create("sqlite", database=str(location.catalog)))
        event.listen(self.engine, "connect", _configure_snapshot if self.is_snapshot else _configure)
        self.vectors = VectorStore(str(location.vectors), versions)
        self._memory: dict[str, tuple[object, Any]] = {}

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
        with Session(self.engine, expire_on_commit=False) as session, session.begin():
            if self.is_snapshot:
                event.listen(session, "before_flush", partial(read_only, self.location.snapshot))
            yield session


def find(session: Session, kind: type[N], name: str) -> N:
    """Return the row with this name.

    Raises
    ------
    NameUnknownError
        With the nearest name as its hint.
    """
    row = session.scalar(select(kind).where(kind.name == name))
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
