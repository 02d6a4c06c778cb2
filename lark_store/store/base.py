"""Base class of the parts of `Store`: the open database, argument checks and error translation."""

from __future__ import annotations

import inspect
import logging
import os
from functools import wraps
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from lark_store import specs
from lark_store.display.progress import shows_progress
from lark_store.errors import InputError
from lark_store.schema.backends.open import location_at
from lark_store.schema.database import read_only
from lark_store.schema.faults import fault_of, is_panic
from lark_store.schema.locks import working
from lark_store.store.arguments import check_arguments
from lark_store.store.spelling import in_python, register

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from lark_store.schema.backends.base import Location
    from lark_store.schema.database import Database

P = ParamSpec("P")
R = TypeVar("R")
DEFAULT_PATH = "lark.store"
ENVIRONMENT = "LARK_STORE"
_LOG = logging.getLogger(__name__)


def clear(method: Callable[P, R]) -> Callable[P, R]:
    """Wrap a method: system errors become lark-store errors, all in Python spelling, and it shows its progress."""
    watched = shows_progress(method)

    @wraps(method)
    def cleared(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return watched(*args, **kwargs)
        except BaseException as error:
            translated = fault_of(error) if isinstance(error, Exception) or is_panic(error) else None
            if translated is None:
                raise
            translated.respell(lambda text: in_python(text, method.__name__))
            if translated is error:
                raise
            raise translated from error

    return cleared


def keywords(*declared: type) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function: list the keywords of its `**options` in its signature, as the specs declare them.

    `**options: Unpack[D]` takes the keys of the TypedDict D of `lark_store.specs`.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        *own, options = signature.parameters.values()
        names = getattr(specs, options.annotation.removeprefix("Unpack[").removesuffix("]")).__annotations__
        listed = [
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
            for f in specs.fields_named(names, declared)
        ]
        function.__signature__ = signature.replace(parameters=[*own, *listed])  # type: ignore[attr-defined]
        known = {parameter.name for parameter in [*own, *listed]}

        @wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            for name in kwargs.keys() - known:
                raise TypeError(f"{function.__name__}() got an unexpected keyword argument '{name}'")
            return function(*args, **kwargs)

        return checked

    return decorate


def public(method: Callable[P, R]) -> Callable[P, R]:
    """Wrap a public method: check the store and the arguments first, then call it as `clear` does."""

    @clear
    @wraps(method)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        if args and isinstance(args[0], Part) and method.__name__ != "close":
            args[0]._db.check_usable()  # noqa: SLF001  # a Part's own database
        checked, keywords = check_arguments(method, args, kwargs)
        return method(*checked, **keywords)

    return called


class Part:
    """A part of `Store`: its methods share the open database. Public methods are wrapped by `public`."""

    _db: Database

    def __init_subclass__(cls) -> None:
        for name, member in list(vars(cls).items()):
            if name.startswith("_") or isinstance(member, property):
                continue
            if isinstance(member, staticmethod | classmethod):
                register(member.__func__)
                setattr(cls, name, type(member)(public(member.__func__)))
            elif callable(member):
                register(member)
                setattr(cls, name, public(member))

    def _sketcher(self, name: str | None, checkpoints: Sequence[str] = ()) -> str:
        """Return the given sketcher, else the store's default, or the only one with sketches there."""
        from lark_store.query.select.sketchers import sketcher_with_sketches

        used, notes = sketcher_with_sketches(self._db, name, checkpoints)
        for note in notes:
            _LOG.warning(note)
        return used

    @property
    def _writable(self) -> Database:
        """The open database, for methods that write. Refuses snapshots."""
        if self._db.is_snapshot:
            assert self._db.snapshot is not None
            read_only(self._db.snapshot.name)
        return self._db


def named(names: str | Sequence[str], kind: str = "checkpoint") -> list[str]:
    """Return the given names as a list.

    Raises
    ------
    InputError
        There are none.
    """
    listed = [names] if isinstance(names, str) else list(names)
    if not listed:
        raise InputError(f"no {kind} is given", f"add `--{kind} NAME`")
    return listed


def locked(path: str | Path, key: str, doing: str) -> AbstractContextManager[None]:
    """Hold a lock of the store at `path` under a name; others are told what is being done.

    Raises
    ------
    StoreBusyError
        Another process holds it.
    """
    return working(location_at(path), key, doing)


def location_of(path: str | Path | None) -> Location:
    """Return the location of the store at `path` (default: `LARK_STORE` or `./lark.store`)."""
    return location_at(path or os.environ.get(ENVIRONMENT) or DEFAULT_PATH)
