"""Commands started by torchrun on two processes."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from dataclasses import dataclass

import psutil

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
TIMEOUT_S = 150  # seconds; nothing here may hang


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


def kill_launcher(process: subprocess.Popen) -> None:
    """End a launcher and all it started: its workers are in sessions of their own."""
    for child in [*psutil.Process(process.pid).children(recursive=True), process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    process.communicate(timeout=TIMEOUT_S)


@contextlib.contextmanager
def launched(*command: object):
    process = subprocess.Popen(
        [*TORCHRUN, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            kill_launcher(process)


def launch(*command: object) -> Result:
    with launched(*command) as process:
        out, err = process.communicate(timeout=TIMEOUT_S)
        return Result(process.returncode, out, err)
