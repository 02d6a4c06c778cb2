"""What every part of `Store` stands on: the open database."""

from __future__ import annotations

import os
from functools import wraps
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from lark_store.errors import LarkStoreError
from lark_store.schema.database import read_only
from lark_store.schema.faults import fault_of
from lark_store.schema.location import Location

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lark_store.schema.database import Database

P = ParamSpec("P")
R = TypeVar("R")
DEFAULT_PATH = "lark.store"
ENVIRONMENT = "LARK_STORE"


def clear(method: Callable[P, R]) -> Callable[P, R]:
    """Return a method that raises the machine's faults as errors of ours."""

    @wraps(method)
    def cleared(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return method(*args, **kwargs)
        except LarkStoreError:
            raise
        except Exception as error:
            known = fault_of(error)
            if known is None:
                raise
            raise known from error

    return cleared


class Part:
    """A part of `Store`: its methods share the open database, and raise the machine's faults as errors of ours."""

    _db: Database

    def __init_subclass__(cls) -> None:
        for name, member in list(vars(cls).items()):
            if name.startswith("_") or isinstance(member, property):
                continue
            if isinstance(member, staticmethod | classmethod):
                setattr(cls, name, type(member)(clear(member.__func__)))
            elif callable(member):
                setattr(cls, name, clear(member))

    def _sketcher(self, name: str | None) -> str:
        """Return the sketcher that is asked for, or the store's own."""
        return self._db.default_sketcher if name is None else name

    @property
    def _writable(self) -> Database:
        """The open database, for a method that writes; a snapshot is refused."""
        if self._db.is_snapshot:
            assert self._db.snapshot is not None
            read_only(self._db.snapshot.name)
        return self._db


def location_of(path: str | Path | None) -> Location:
    """Return where the store at `path` (default: `LARK_STORE` or `./lark.store`) has its parts."""
    return Location.of(path or os.environ.get(ENVIRONMENT) or DEFAULT_PATH)
