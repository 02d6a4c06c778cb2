"""Create a store, all or nothing: the catalog by migrations, empty tables, built-in variants and sketchers."""

from __future__ import annotations

import shutil
import tempfile
import uuid
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy.orm import Session

from lark_store import migrations
from lark_store.core.paths import is_file, is_taken
from lark_store.errors import NameUnknownError, StoreError, StoreExistsError
from lark_store.schema.backends.base import VERSION_TABLE, Location
from lark_store.schema.backends.open import location_at
from lark_store.schema.catalog import METADATA, StoreMeta
from lark_store.schema.vectors import VectorStore

if TYPE_CHECKING:
    from contextlib import AbstractContextManager


def make(location: Location, vectors: str | None, sketcher: str | None) -> None:
    """Create a store; see `Store.create`."""
    from lark_store.gradients.sketch import layout

    if sketcher is not None and sketcher not in layout.BUILT_IN:
        raise NameUnknownError.of("built-in sketcher", sketcher, layout.BUILT_IN, "add others later")
    vacant(location, vectors)
    if location.root is None:
        _build(location, vectors, sketcher)
        return
    root = location.root
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{root.name}.", dir=root.parent))
    except OSError as error:
        raise StoreError(
            f"can't create a store at `{root}`: {error.strerror}", "choose another path with `--store PATH`"
        ) from error
    try:
        _build(location_at(draft), vectors, sketcher)
        draft.chmod(0o755)
        draft.rename(root)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def vacant(location: Location, vectors: str | None) -> None:
    """Check that the location is free for a new store.

    Raises
    ------
    StoreExistsError, StoreError
    """
    if location.root is not None:
        if is_taken(location.root):
            is_store = is_file(location.root / "catalog.sqlite")
            raise _taken(location, "a store" if is_store else "something")
        return
    if vectors is None:
        raise StoreError(
            "a store in PostgreSQL needs a separate location for its vectors",
            "add `--vectors s3://BUCKET/PATH`, or a folder that all machines can reach",
        )
    from lark_store.schema.backends.postgres import CatalogServer

    assert isinstance(location.catalog, CatalogServer)
    tables = location.catalog.tables()
    if {VERSION_TABLE, StoreMeta.__tablename__} <= tables:
        raise _taken(location, "a store")
    clash = sorted(tables & {*METADATA.tables, VERSION_TABLE})
    if clash:
        raise _taken(location, f"a table `{clash[0]}` of another program")


def _taken(location: Location, occupant: str) -> StoreExistsError:
    hint = "choose another path with `--store PATH`" if location.root else "use a separate schema for the store"
    return StoreExistsError(
        f"there is {occupant} at `{location.label}` already", "use it as it is" if occupant == "a store" else hint
    )


def _build(location: Location, vectors: str | None, sketcher: str | None) -> None:
    """Create the vector tables, then the catalog in one transaction."""
    from lark_store.gradients.sketch import layout
    from lark_store.modeling.rendering import BUILT_IN, DEFAULT_MAX_LENGTH, make_variant

    tables = VectorStore(vectors or str(location.root and location.root / "vectors"))
    meta = StoreMeta(id=1, store_uuid=str(uuid.uuid4()), created_with=version("lark-store"), vectors=vectors)
    if sketcher:
        meta.sketcher = sketcher
    variants = [make_variant(name, name, "auto", DEFAULT_MAX_LENGTH) for name in BUILT_IN]
    with _uploading(tables) if vectors else nullcontext():
        tables.create()
        with location.catalog.migrating() as connection:
            migrations.build(connection)
            with Session(connection) as session:
                session.add_all([meta, *variants])
                session.add_all(layout.make_sketcher(name, **settings) for name, settings in layout.BUILT_IN.items())
                session.commit()  # within the connection's transaction
    engine = location.catalog.engine()
    engine.connect().close()  # the first connection sets SQLite's journal mode, which persists
    engine.dispose()


def _uploading(tables: VectorStore) -> AbstractContextManager[None]:
    from lark_store.maintenance.restore import uploading

    return uploading(tables)
