"""Drafts of running fits: sums in a file beside the vectors, so an interrupted fit can resume.

A draft's name has its checkpoint, kind and number. A new draft is complete before the previous one is deleted, so one
is always readable; truncated drafts are skipped. Writing takes a small share of the fit's time.
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

from lark_store.schema.factor_files import draft_name, drafts

if TYPE_CHECKING:
    import torch

    from lark_store.schema.catalog import Checkpoint
    from lark_store.schema.database import Database

SECONDS = 60.0  # minimum between two drafts
_SHARE = 20.0  # and this many times the duration of a write
_FACTS = ("number", "done", "n")


@dataclass(frozen=True)
class DraftState:
    """The state of a fit: in pass `number`, `n_done` samples were processed and `n` of them count."""

    number: int
    n_done: int
    n: int
    sums: dict[str, torch.Tensor]


class Draft:
    """The drafts of one fit. `identity` holds everything its result depends on."""

    def __init__(self, db: Database, checkpoint: Checkpoint, kind: str, identity: list[Any]) -> None:
        self.files = db.vectors.files
        self._vectors, self._key = db.vectors, (checkpoint.id, kind)
        self._identity = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self._written, self._wait, self._last = 0, SECONDS, time.monotonic()

    def read(self) -> DraftState | None:
        """Return this fit's newest draft, None without one; delete drafts of other fits of its kind."""
        newest = None
        for name in reversed(drafts(self._vectors, *self._key)):
            newest = newest or self._read(name)
            if newest is None:
                self.files.delete_file(name)
            else:
                self._written = max(self._written, int(name.split(".")[-2]))
        return newest

    def _read(self, name: str) -> DraftState | None:
        with tempfile.TemporaryDirectory(prefix="lark-") as folder:
            copy = Path(folder) / "draft.safetensors"
            self.files.download_file(name, str(copy))
            try:
                with safe_open(copy, "pt") as content:
                    facts = content.metadata() or {}
                    if facts.get("identity") != self._identity:
                        return None
                    sums = {key: content.get_tensor(key) for key in content.keys()}  # noqa: SIM118 - no mapping
            except SafetensorError:  # truncated
                return None
        number, n_done, n = (int(facts[key]) for key in _FACTS)
        return DraftState(number, n_done, n, sums)

    def save(self, number: int, n_done: int, n: int, fit_pass: Any) -> None:
        """Write a draft of the pass's `sums` if enough time has passed, and delete the previous one."""
        started = time.monotonic()
        if started - self._last < self._wait:
            return
        facts = dict(zip(_FACTS, map(str, (number, n_done, n)), strict=True))
        previous = drafts(self._vectors, *self._key)
        self._written += 1
        with tempfile.TemporaryDirectory(prefix="lark-") as folder:
            file = Path(folder) / "draft.safetensors"
            tensors = {name: tensor.cpu().contiguous() for name, tensor in fit_pass.sums.items()}
            save_file(tensors, file, facts | {"identity": self._identity})
            self.files.upload_file(str(file), draft_name(*self._key, self._written))
        for name in previous:
            self.files.delete_file(name)
        self._last = time.monotonic()
        self._wait = max(SECONDS, _SHARE * (self._last - started))

    def discard(self) -> None:
        """Delete the drafts of a finished fit."""
        for name in drafts(self._vectors, *self._key):
            self.files.delete_file(name)
