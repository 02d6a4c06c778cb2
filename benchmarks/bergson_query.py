"""Time bergson's queries over the same vectors; runs in bergson's environment and prints one JSON object last.

    PYTHON benchmarks/bergson_query.py '{"way": "bergson-make", "flat": FOLDER, "home": FOLDER}'
    PYTHON benchmarks/bergson_query.py '{"way": "bergson", "flat": FOLDER, "home": FOLDER, "queries": 64}'

`bergson-make` writes an index like that of `bergson build` (info.json and gradients.bin by its `create_index`, the
processor's files by its `save`), with our vectors as the gradients of one module. `bergson` opens it with `Attributor`,
as `bergson query` does after loading the model, and calls `Attributor.search` with the queries' vectors. The queries'
forward and backward are not timed, neither here nor for lark-store.

Imports nothing from lark-store; README.md explains how to create the environment.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no downloads

import numpy as np
from probe import Probe, size_of

HITS = 10
MODULE = "sketch"


def make(spec: dict[str, Any]) -> None:
    """Write the index."""
    probe = Probe()
    with contextlib.redirect_stdout(sys.stderr), probe.step("imports"):
        from bergson.data import create_index
        from bergson.gradients import GradientProcessor
    rows = np.load(Path(spec["flat"]) / "rows.npy", mmap_mode="r")
    home = Path(spec["home"])
    with contextlib.redirect_stdout(sys.stderr), probe.step("build"):
        index = create_index(home, len(rows), {MODULE: rows.shape[1]}, rows.dtype)
        for start in range(0, len(rows), 1024):
            index[start : start + 1024] = rows[start : start + 1024]
        index.flush()
        GradientProcessor().save(home)
    probe.report(bytes=size_of(home))


def query(spec: dict[str, Any]) -> None:
    """Open the index and search all queries in one call."""
    probe = Probe()
    with contextlib.redirect_stdout(sys.stderr), probe.step("imports"):
        import torch
        from bergson import Attributor
    queries = torch.from_numpy(np.load(Path(spec["flat"]) / "queries.npy")[: spec["queries"]]).float()
    with contextlib.redirect_stdout(sys.stderr), probe.step("open"):
        attributor = Attributor(spec["home"], device="cpu")
    with probe.step("first"):
        attributor.search({MODULE: queries[:1]}, HITS)
    for _ in range(spec.get("repeats", 1)):
        with probe.step("answer"):
            hits = attributor.search({MODULE: queries}, HITS)
    probe.report(per_call=len(queries), top=hits.indices.tolist())


if __name__ == "__main__":
    spec = json.loads(sys.argv[1])
    {"bergson-make": make, "bergson": query}[spec["way"]](spec)
