"""Commits of two writers to one Lance table may meet; what lost is tried again, a few times."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeVar

from lark_store.errors import StoreBusyError

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")
ATTEMPTS = 6
_FIRST_WAIT_S = 0.1


def retried(work: Callable[[], T], what: str) -> T:
    """Do `work`, which opens its table anew, until its commit meets no other.

    Raises
    ------
    StoreBusyError
        After `ATTEMPTS` conflicts.
    """
    for attempt in range(ATTEMPTS):
        try:
            return work()
        except (OSError, RuntimeError, ValueError) as error:
            if "conflict" not in str(error).lower():
                raise
            last = error
            time.sleep(_FIRST_WAIT_S * 2**attempt)
    raise StoreBusyError(
        f"{what}: other processes wrote to the table all the while, {ATTEMPTS} attempts met them",
        "run the command again when less is written; what was done stays done",
    ) from last
