"""Retry on commit conflicts."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeVar

from lark_store.errors import StoreBusyError

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")
ATTEMPTS = 6
_FIRST_WAIT_S = 0.1


def retry(commit: Callable[[], T], problem: str) -> T:
    """Call `commit`, which reopens its table, until it succeeds without a conflict.

    Raises
    ------
    StoreBusyError
        After `ATTEMPTS` conflicts; the message starts with `problem`.
    """
    for attempt in range(ATTEMPTS):
        try:
            return commit()
        except (OSError, RuntimeError, ValueError) as error:
            if "conflict" not in str(error).lower():
                raise
            last = error
            time.sleep(_FIRST_WAIT_S * 2**attempt)
    raise StoreBusyError(
        f"{problem}: {ATTEMPTS} attempts conflicted with other processes that write to the table",
        "run the command again when fewer processes write; finished work is saved",
    ) from last
