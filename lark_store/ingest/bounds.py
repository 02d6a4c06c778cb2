"""Templates come with checkpoints, from anywhere: what one may take in time and memory while it runs.

They run in Jinja's sandbox, which keeps them from Python and from files, but not from going on forever. A timer looks
at them 20 times a second, between two steps of theirs: one single expression that takes all memory isn't stopped by it,
nor is a template in another thread than the main one, or on Windows.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lark_store.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

SECONDS, BYTES = 10.0, 1 << 30
_TICK_S = 0.05


def _peak() -> int:
    """Return the most memory that this process had so far, in bytes."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextmanager
def bounded() -> Iterator[None]:
    """End a template that runs too long, or takes too much memory, with an error.

    Raises
    ------
    InputError
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return
    until, most, inside = time.monotonic() + SECONDS, _peak() + BYTES, True

    def look(_number: int, _frame: Any) -> None:
        if inside and time.monotonic() > until:
            raise InputError(f"the template runs longer than {SECONDS:g} s for one sample", "use another template")
        if inside and _peak() > most:
            raise InputError(f"the template takes more than {BYTES >> 20} MiB for one sample", "use another template")

    before = signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, _TICK_S, _TICK_S)
    try:
        yield
    finally:
        inside = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
