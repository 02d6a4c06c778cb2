"""What a long evaluation has done so far: a line for each piece, on disk before the next one begins.

The file's name has the hash of everything that decides the pieces' values, so that what lies there may be taken up by
any run that would compute the same. A line that a killed process left half is cut off.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from lark_store.errors import StoreBusyError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from io import BufferedRandom
    from pathlib import Path


def digest(identity: Any) -> str:
    """Return the hash of what can be written as JSON."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


class Journal:
    """The pieces that are done, by key; what is added is on the disk when `add` returns."""

    def __init__(self, file: BufferedRandom) -> None:
        self._file = file
        whole = file.read()
        whole = whole[: whole.rfind(b"\n") + 1]
        file.truncate(len(whole))
        file.seek(len(whole))
        self.done: dict[str, list[float]] = {}
        for line in whole.splitlines()[1:]:
            row = json.loads(line)
            self.done[row["piece"]] = row["values"]
        self.is_new = not whole

    def write(self, row: dict[str, Any]) -> None:
        """Write a line, and wait for the disk."""
        self._file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def add(self, piece: str, values: list[float]) -> None:
        """Keep a piece's values."""
        self.write({"piece": piece, "values": values})
        self.done[piece] = values


@contextmanager
def journal(folder: Path, kind: str, identity: dict[str, Any]) -> Iterator[Journal]:
    """Open the journal of this identity, made if it is not there; one process at a time has it.

    Raises
    ------
    StoreBusyError
    """
    path = folder / f"{kind}-{digest(identity)[:12]}.jsonl"
    path.touch()
    try:
        with FileLock(path.with_suffix(".lock"), timeout=0), path.open("r+b") as file:
            made = Journal(file)
            if made.is_new:
                made.write({"kind": kind, "identity": identity})
            yield made
    except Timeout as error:
        raise StoreBusyError(
            f"another process is at work on `{path}`", "wait for it, or name another `--out`"
        ) from error
