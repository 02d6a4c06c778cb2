"""Drafts of a fit that is under way: its sums in a file beside the vectors, so that a killed fit can go on.

A draft is named by what it is of and by its number. A new one is written whole before the last goes, so there is
always one that can be read; one that was cut off is passed over. Writing takes a small share of the time at most.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lark_store.schema.corrections import draft_name, drafts

if TYPE_CHECKING:
    import torch

    from lark_store.schema.catalog import Checkpoint
    from lark_store.schema.database import Database

SECONDS = 60.0  # between two drafts, at least
_SHARE = 20.0  # and so many times as long as writing one takes
_FACTS = ("number", "done", "n")


@dataclass(frozen=True)
class Begun:
    """How far a fit had come: in pass `number`, `done` samples had been taken, of which `n` count."""

    number: int
    done: int
    n: int
    sums: dict[str, torch.Tensor]


class Draft:
    """The drafts of one fit; `identity` is all that its result depends on."""

    def __init__(self, db: Database, checkpoint: Checkpoint, kind: str, identity: list[Any]) -> None:
        self.files = db.vectors.files
        self._vectors, self._of = db.vectors, (checkpoint.id, kind)
        self._identity = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self._written, self._wait, self._last = 0, SECONDS, time.monotonic()

    def read(self) -> Begun | None:
        """Return the newest draft of this very fit, None if there is none; those of others of its kind go."""
        found = None
        for name in reversed(drafts(self._vectors, *self._of)):
            found = found or self._read(name)
            if found is None:
                self.files.delete_file(name)
            else:
                self._written = max(self._written, int(name.split(".")[-2]))
        return found

    def _read(self, name: str) -> Begun | None:
        with tempfile.TemporaryDirectory(prefix="lark-") as folder:
            copy = Path(folder) / "draft.safetensors"
            self.files.download_file(name, str(copy))
            try:
                with safe_open(copy, "pt") as content:
                    facts = content.metadata() or {}
                    if facts.get("identity") != self._identity:
                        return None
                    sums = {key: content.get_tensor(key) for key in content.keys()}  # noqa: SIM118 - no mapping
            except SafetensorError:  # cut off
                return None
        number, done, n = (int(facts[key]) for key in _FACTS)
        return Begun(number, done, n, sums)

    def keep(self, number: int, done: int, n: int, of: Any) -> None:
        """Write a draft of a pass's `sums`, if it is time; the one before goes."""
        started = time.monotonic()
        if started - self._last < self._wait:
            return
        facts = dict(zip(_FACTS, map(str, (number, done, n)), strict=True))
        before = drafts(self._vectors, *self._of)
        self._written += 1
        with tempfile.TemporaryDirectory(prefix="lark-") as folder:
            file = Path(folder) / "draft.safetensors"
            tensors = {name: each.cpu().contiguous() for name, each in of.sums.items()}
            save_file(tensors, file, facts | {"identity": self._identity})
            self.files.upload_file(str(file), draft_name(*self._of, self._written))
        for name in before:
            self.files.delete_file(name)
        self._last = time.monotonic()
        self._wait = max(SECONDS, _SHARE * (self._last - started))

    def discard(self) -> None:
        """Delete the drafts: the fit is over."""
        for name in drafts(self._vectors, *self._of):
            self.files.delete_file(name)
