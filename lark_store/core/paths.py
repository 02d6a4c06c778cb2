"""Path checks. A path that is impossible on this system does not exist; it raises no error."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from lark_store.errors import StoreError

if TYPE_CHECKING:
    from pathlib import Path

_MAX_NAME = 255
_MAX_DATABASE = 504  # bytes: SQLite's limit of 512 includes the suffix of the journal
_MAX_ROOT = _MAX_DATABASE - len("/catalog.sqlite")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def check_place(place: Path, content: str) -> Path:
    """Return a folder's absolute path if SQLite and LanceDB can store files in it.

    `content` names the planned content in errors, such as "a store".

    Raises
    ------
    StoreError
    """
    try:
        path = place.absolute()
        n_bytes = len(str(path).encode())
    except FileNotFoundError as error:
        raise StoreError(
            f"{content} can't be at `{place}`: the working folder does not exist", "use an absolute path"
        ) from error
    except UnicodeEncodeError as error:
        fact = f"{content} can't be at {str(place)!r}: the path is not UTF-8"
        raise StoreError(fact, "choose another path") from error
    reason = None
    if _CONTROL.search(str(path)):
        reason = "the path contains a control character, such as a newline"
    elif "?" in str(path):
        reason = "LanceDB treats `?` as part of a URL"
    elif any(len(part.encode()) > _MAX_NAME for part in path.parts):
        reason = f"a name in the path is longer than {_MAX_NAME} bytes"
    elif n_bytes > _MAX_ROOT:
        reason = f"the path has {n_bytes:,} bytes; SQLite allows at most {_MAX_ROOT}"
    if reason is not None:
        label = repr(str(place)) if _CONTROL.search(str(place)) else f"`{place}`"
        raise StoreError(f"{content} can't be at {label}: {reason}", "choose another path")
    return path


def check_database(path: Path) -> Path:
    """Return the path of a SQLite file if it is not too long.

    Raises
    ------
    StoreError
    """
    n_bytes = len(os.fsencode(path.absolute()))
    if n_bytes > _MAX_DATABASE:
        fact = f"the path of a SQLite file has {n_bytes:,} bytes; SQLite allows at most {_MAX_DATABASE}: `{path}`"
        raise StoreError(fact, "choose a shorter path, or move the store to one")
    return path


def is_taken(path: Path) -> bool:
    """Tell whether `path` exists, including as a dangling symbolic link."""
    try:
        return path.exists() or path.is_symlink()
    except OSError:
        return False


def exists(path: Path) -> bool:
    """Tell whether `path` exists; False for impossible paths."""
    try:
        return path.exists()
    except OSError:
        return False


def is_file(path: Path) -> bool:
    """Tell whether `path` is a file; False for impossible paths."""
    return exists(path) and path.is_file()


def is_folder(path: Path) -> bool:
    """Tell whether `path` is a folder; False for impossible paths."""
    return exists(path) and path.is_dir()
