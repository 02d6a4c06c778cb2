"""The resources of a process answering queries: seconds by step, CPU time, peak memory. Linux, standard library.

    probe = Probe()
    with probe.step("open"): …
    probe.report(top=…)          # one JSON object, the last line on stdout

Scripts in other environments import it, so it needs only Python.
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
    """Return a figure of /proc/self/status in bytes: `VmHWM` (peak resident memory), `RssAnon` and the like."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


class Probe:
    """Times steps and monitors memory.

    Reports two peaks, since neither is fair alone: `rss` includes mapped files, which the kernel may drop; `anon` is
    the process's own memory, sampled every 5 ms. `imported` is `anon` at the end of the step `imports`.
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
        """Time the body; a step may repeat."""
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
    """Read a folder's files into the page cache; return the number of bytes."""
    buffer = bytearray(16 << 20)
    total = 0
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb", buffering=0) as file:
            while n := file.readinto(buffer):
                total += n
    return total


def size_of(folder: Path) -> int:
    """Return the size of a folder's files in bytes."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
