"""What every part of `Store` stands on: the open database."""

from __future__ import annotations

import os
from pathlib import Path

from lark_store.errors import StoreError
from lark_store.schema.database import Database, Location, read_only

DEFAULT_SKETCHER = "lark"
DEFAULT_PATH = "lark.store"
ENVIRONMENT = "LARK_STORE"


class Part:
    """A part of `Store`: its methods share the open database."""

    _db: Database

    @property
    def _writable(self) -> Database:
        """The open database, for a method that writes; a snapshot is refused."""
        if self._db.is_snapshot:
            read_only(self._db.location.snapshot)
        return self._db


def location_of(path: str | Path | None, snapshot: str | None = None) -> Location:
    """Return where the store at `path` (default: `LARK_STORE` or `./lark.store`) has its parts."""
    root = Path(path or os.environ.get(ENVIRONMENT) or DEFAULT_PATH)
    if "?" in str(root.absolute()):
        raise StoreError(f"a store can't be at `{root}`: LanceDB reads `?` as part of a URL", "name another path")
    return Location(root, snapshot)
