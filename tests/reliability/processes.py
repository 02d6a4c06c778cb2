"""Commands as killable processes: forked by `runner.py`, or started afresh."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from places import Place

_START_S = 600.0  # of a machine that is very busy
PATIENCE_S = 600.0


class Process:
    """One command that runs. `begun` and `done` are when its work on the store began, and when it was over."""

    def __init__(self, server: Path, folder: Path, place: Place, arguments: list[str]) -> None:
        self.arguments = arguments
        self._out, self._err = folder / "out", folder / "err"
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(str(server))
        request = {
            "arguments": [*arguments, "--store", place.store],
            "env": place.env,
            "out": str(self._out),
            "err": str(self._err),
        }
        self._connection.sendall(json.dumps(request).encode() + b"\n")
        self._lines = b""
        self.code: int | None = None
        self.begun: float | None = None
        self.done: float | None = None
        self.conflicts = 0
        pid = self._line(time.monotonic() + PATIENCE_S)
        assert pid is not None
        self._handle = os.pidfd_open(int(pid))

    def _line(self, until: float) -> str | None:
        """Return the next thing that the server says, None if it says nothing until then."""
        while b"\n" not in self._lines:
            left = until - time.monotonic()
            if left <= 0:
                return None
            self._connection.settimeout(left)
            try:
                read = self._connection.recv(64)
            except TimeoutError:
                return None
            if not read:
                raise RuntimeError("the server of processes is gone")
            self._lines += read
        line, _, self._lines = self._lines.partition(b"\n")
        return line.decode()

    def _hear(self, until: float) -> bool:
        line = self._line(until)
        if line == "work":
            self.begun = self.begun or time.monotonic()
        elif line == "done":
            self.done = time.monotonic()
        elif line == "conflict":
            self.conflicts += 1
        elif line is not None:
            self.code = int(line)
            self._connection.close()
            os.close(self._handle)
        return line is not None

    def wait_for_work(self) -> None:
        """Wait until it works on the store, or has ended."""
        while self.begun is None and self.code is None:
            assert self._hear(time.monotonic() + PATIENCE_S), self.arguments

    def wait(self, seconds: float = PATIENCE_S) -> int | None:
        """Wait for its end, at most so long; returns its exit status, or None."""
        until = time.monotonic() + seconds
        while self.code is None and self._hear(until):
            pass
        return self.code

    def kill(self) -> None:
        """Send SIGKILL and wait."""
        if self.code is None:
            with suppress(ProcessLookupError):  # it has just ended
                signal.pidfd_send_signal(self._handle, signal.SIGKILL)
            assert self.wait() is not None

    @property
    def out(self) -> str:
        """Its standard output."""
        return self._out.read_text(encoding="utf-8")

    @property
    def err(self) -> str:
        """Its standard error."""
        return self._err.read_text(encoding="utf-8")


class Runner:
    """The server, as a context manager; `start` makes a process, `run` waits for its end.

    Its ingests commit `rows_per_commit` rows at a time, by default as many as a user's.
    """

    def __init__(self, folder: Path, rows_per_commit: int | None = None) -> None:
        self._folder, self._socket = folder, folder / "s"
        self._options = [] if rows_per_commit is None else [str(rows_per_commit)]
        self._numbers = itertools.count()

    def __enter__(self) -> Self:
        script = Path(__file__).with_name("runner.py")
        self._server = subprocess.Popen([sys.executable, script, self._socket, *self._options])
        until = time.monotonic() + _START_S
        while not self._socket.exists():
            assert self._server.poll() is None
            assert time.monotonic() < until
            time.sleep(0.05)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.terminate()
        self._server.wait()

    def start(self, place: Place, *arguments: str) -> Process:
        """Start a command on the store at a place."""
        folder = self._folder / str(next(self._numbers))
        folder.mkdir()
        return Process(self._socket, folder, place, list(arguments))

    def run(self, place: Place, *arguments: str, codes: tuple[int, ...] = (0,)) -> Process:
        """Run a command to its end, which must be one of these."""
        process = self.start(place, *arguments)
        code = process.wait()
        assert code in codes, f"{arguments}: {code}\n{process.err}"
        return process
