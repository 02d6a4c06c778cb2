"""The journal of a long evaluation: a line per finished piece, on disk before the next piece begins.

The file name holds the hash of everything that determines the values, so any run that would compute the same values
resumes from it. An incomplete last line, left by a killed process, is cut off.
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
    """Return the SHA-256 of a JSON-serialisable value."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


class Journal:
    """Finished pieces by key; `add` returns once the piece is on disk."""

    def __init__(self, file: BufferedRandom) -> None:
        self._file = file
        content = file.read()
        content = content[: content.rfind(b"\n") + 1]
        file.truncate(len(content))
        file.seek(len(content))
        self.done: dict[str, list[float]] = {}
        for line in content.splitlines()[1:]:
            row = json.loads(line)
            self.done[row["piece"]] = row["values"]
        self.is_new = not content

    def write(self, row: dict[str, Any]) -> None:
        """Write a line and sync it to disk."""
        self._file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def add(self, piece: str, values: list[float]) -> None:
        """Store a piece's values."""
        self.write({"piece": piece, "values": values})
        self.done[piece] = values


@contextmanager
def journal(folder: Path, kind: str, identity: dict[str, Any]) -> Iterator[Journal]:
    """Open or create the journal of this identity; one process at a time holds it.

    Raises
    ------
    StoreBusyError
    """
    path = folder / f"{kind}-{digest(identity)[:12]}.jsonl"
    path.touch()
    try:
        with FileLock(path.with_suffix(".lock"), timeout=0), path.open("r+b") as file:
            opened = Journal(file)
            if opened.is_new:
                opened.write({"kind": kind, "identity": identity})
            yield opened
    except Timeout as error:
        raise StoreBusyError(
            f"another process is writing to `{path}`", "wait for it, or choose another `--out`"
        ) from error
