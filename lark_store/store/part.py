"""What every part of `Store` stands on: the open database."""

from __future__ import annotations

import os
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lark_store.errors import LarkStoreError, StoreError
from lark_store.schema.database import Database, Location, read_only
from lark_store.schema.faults import fault_of

if TYPE_CHECKING:
    from collections.abc import Callable

DEFAULT_SKETCHER = "lark"
DEFAULT_PATH = "lark.store"
ENVIRONMENT = "LARK_STORE"


def _clear(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method that raises the machine's faults as errors of ours."""

    @wraps(method)
    def clear(*args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except LarkStoreError:
            raise
        except Exception as error:
            known = fault_of(error)
            if known is None:
                raise
            raise known from error

    return clear


class Part:
    """A part of `Store`: its methods share the open database, and raise the machine's faults as errors of ours."""

    _db: Database

    def __init_subclass__(cls) -> None:
        for name, member in list(vars(cls).items()):
            if name.startswith("_") or isinstance(member, property):
                continue
            if isinstance(member, staticmethod | classmethod):
                setattr(cls, name, type(member)(_clear(member.__func__)))
            elif callable(member):
                setattr(cls, name, _clear(member))

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
