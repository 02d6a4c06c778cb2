"""Guard against forks: Lance's threads don't survive a fork, and reads in the child would hang."""

from __future__ import annotations

import os

from lark_store.core.arrow import skip_pandas
from lark_store.errors import StoreError

_HINT = (
    'use `multiprocessing.get_context("spawn")` or `"forkserver"` (a DataLoader: '
    '`multiprocessing_context="spawn"`), and open the store in the child'
)
_first_user: int | None = None


def use_lance() -> None:
    """Record that this process uses Lance; call this before importing it.

    Raises
    ------
    StoreError
        The process was forked from one that used Lance.
    """
    global _first_user  # noqa: PLW0603  # Lance's threads belong to the process
    if _first_user is None:
        _first_user = os.getpid()
        skip_pandas()
    if _first_user != os.getpid():
        raise StoreError("Lance can't be used in a process forked after Lance was used", _HINT)


def check_owner(pid: int, store: str) -> None:
    """Check that this process, not its parent, opened the store.

    Raises
    ------
    StoreError
    """
    if pid != os.getpid():
        raise StoreError(f"the store `{store}` was opened before this process was forked", _HINT)
