"""Time and memory limits for untrusted templates.

Checkpoints bring templates from anywhere. Jinja's sandbox keeps them from Python and from files, but not from running
forever. A timer checks them 20 times a second, between bytecode steps. It can't stop a single expression, a template
outside the main thread, or anything on Windows.
"""

from __future__ import annotations

import signal
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import psutil

from lark_store.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

SECONDS, BYTES = 10.0, 1 << 30
_TICK_S = 0.05


def _memory_in_use() -> int:
    """Return this process's resident memory in bytes: not its peak, under which a template could grow unseen."""
    return int(psutil.Process().memory_info().rss)


@contextmanager
def bounded() -> Iterator[None]:
    """Stop a template that runs too long or uses too much memory.

    Raises
    ------
    InputError
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return
    deadline, memory_limit, inside = time.monotonic() + SECONDS, _memory_in_use() + BYTES, True

    def check(_number: int, _frame: Any) -> None:
        if inside and time.monotonic() > deadline:
            raise InputError(f"the template ran longer than {SECONDS:g} s on one sample", "use another template")
        if inside and _memory_in_use() > memory_limit:
            raise InputError(f"the template used more than {BYTES >> 20} MiB on one sample", "use another template")

    previous_handler = signal.signal(signal.SIGALRM, check)
    signal.setitimer(signal.ITIMER_REAL, _TICK_S, _TICK_S)
    try:
        yield
    finally:
        inside = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous_handler)
