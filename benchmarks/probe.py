"""What a process that answers queries takes: seconds by step, CPU, and its memory at its peak. Linux, standard library.

    probe = Probe()
    with probe.step("open"): …
    probe.report(top=…)          # one JSON object, the last line on stdout

Imported by scripts that run in environments of their own, so it needs nothing but Python.
"""

from __future__ import annotations

import json
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

POLL = 0.005


def status(name: str) -> int:
    """Return a figure of /proc/self/status in bytes: `VmHWM` (peak of all resident memory), `RssAnon` and the like."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


class Probe:
    """Takes the time of steps and watches the memory.

    Two peaks are reported, as neither is fair alone. `rss` counts mapped files too, which the kernel may drop again;
    `anon` is what the process itself holds, looked at every 5 ms. `imported` is `anon` when the step `imports` ended.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self.cpu: dict[str, list[float]] = {}
        self.anon = self.imported = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(POLL):
            self.anon = max(self.anon, status("RssAnon"))

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time what is inside; a step may come many times."""
        start, cpu = time.perf_counter(), time.process_time()
        yield
        self.seconds.setdefault(name, []).append(time.perf_counter() - start)
        self.cpu.setdefault(name, []).append(time.process_time() - cpu)
        if name == "imports":
            self.imported = status("RssAnon")

    def peaks(self) -> dict[str, int]:
        """Return the peaks so far, in bytes."""
        return {"rss": status("VmHWM"), "anon": max(self.anon, status("RssAnon")), "imported": self.imported}

    def report(self, **more: Any) -> None:
        """Print everything as one line of JSON."""
        self._over.set()
        self._thread.join()
        print("\n" + json.dumps({"seconds": self.seconds, "cpu": self.cpu} | self.peaks() | more), flush=True)


def read_all(folder: Path) -> int:
    """Read a folder's files from beginning to end; returns how many bytes. They are in the page cache then."""
    buffer = bytearray(16 << 20)
    total = 0
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb", buffering=0) as file:
            while n := file.readinto(buffer):
                total += n
    return total


def size_of(folder: Path) -> int:
    """Return how many bytes a folder's files hold."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
