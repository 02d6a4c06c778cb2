"""A fresh store: the catalog by the migrations, the empty tables, the built-in variants and sketcher; whole or not."""

from __future__ import annotations

import shutil
import tempfile
import uuid
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path

from sqlalchemy.orm import Session

from lark_store import migrations
from lark_store.errors import NameUnknownError, StoreError, StoreExistsError
from lark_store.schema.catalog import Base, StoreMeta
from lark_store.schema.location import VERSION_TABLE, Location
from lark_store.schema.paths import exists, is_file
from lark_store.schema.vectors import VectorStore


def make(location: Location, vectors: str | None, sketcher: str | None) -> None:
    """Make a store; see `Store.create`."""
    from lark_store.ingest import sketchers

    if sketcher is not None and sketcher not in sketchers.BUILT_IN:
        raise NameUnknownError.of("built-in sketcher", sketcher, sketchers.BUILT_IN, "add others to the store later")
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
            f"a store can't be made at `{root}`: {error.strerror}", "name another path with `--store PATH`"
        ) from error
    try:
        _build(Location.of(draft), vectors, sketcher)
        draft.chmod(0o755)
        draft.rename(root)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def vacant(location: Location, vectors: str | None) -> None:
    """Make sure that there is room for a store.

    Raises
    ------
    StoreExistsError, StoreError
    """
    if location.root is not None:
        if exists(location.root):
            is_store = is_file(location.root / "catalog.sqlite")
            raise _taken(location, "a store" if is_store else "something")
        return
    if vectors is None:
        raise StoreError(
            "a store in PostgreSQL has its vectors elsewhere, and it is not said where",
            "add `--vectors s3://BUCKET/PATH`, or a folder that all machines see",
        )
    from lark_store.schema.postgres import CatalogServer

    assert isinstance(location.catalog, CatalogServer)
    there = location.catalog.tables()
    if {VERSION_TABLE, StoreMeta.__tablename__} <= there:
        raise _taken(location, "a store")
    clash = sorted(there & {*Base.metadata.tables, VERSION_TABLE})
    if clash:
        raise _taken(location, f"a table `{clash[0]}` of another program")


def _taken(location: Location, said: str) -> StoreExistsError:
    hint = "name another path with `--store PATH`" if location.root else "give the store a schema of its own"
    return StoreExistsError(
        f"there is {said} at `{location.label}` already", "use it as it is" if said == "a store" else hint
    )


def _build(location: Location, vectors: str | None, sketcher: str | None) -> None:
    """Build the vectors, then the catalog in one transaction."""
    from lark_store.ingest import sketchers
    from lark_store.ingest.variants import BUILT_IN, DEFAULT_MAX_LENGTH, make_variant
    from lark_store.upkeep.backup import uploading

    tables = VectorStore(vectors or str(location.root and location.root / "vectors"))
    meta = StoreMeta(id=1, store_uuid=str(uuid.uuid4()), created_with=version("lark-store"), vectors=vectors)
    if sketcher:
        meta.sketcher = sketcher
    variants = [make_variant(name, name, "auto", DEFAULT_MAX_LENGTH) for name in BUILT_IN]
    with uploading(tables) if vectors else nullcontext():
        tables.create()
        with location.catalog.migrating() as connection:
            migrations.build(connection)
            with Session(connection) as session:
                session.add_all([meta, *variants])
                session.add_all(sketchers.make_sketcher(name, **how) for name, how in sketchers.BUILT_IN.items())
                session.commit()  # into the connection's transaction
    engine = location.catalog.engine()
    engine.connect().close()  # SQLite keeps the way of its log from the first connection on
    engine.dispose()
