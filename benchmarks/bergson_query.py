"""Time bergson's queries over the same vectors; runs in bergson's own environment and prints one JSON object last.

    PYTHON benchmarks/bergson_query.py '{"way": "bergson-make", "flat": FOLDER, "home": FOLDER}'
    PYTHON benchmarks/bergson_query.py '{"way": "bergson", "flat": FOLDER, "home": FOLDER, "queries": 64}'

`bergson-make` writes an index as `bergson build` leaves it (info.json and gradients.bin by its own `create_index`, the
processor's files by its own `save`), with our vectors as the gradients of one module. `bergson` opens it with
`Attributor`, what `bergson query` does after it has loaded the model, and calls `Attributor.search` with the queries'
vectors: the query's own forward and backward, which `bergson query` runs as well, are not timed, as ours are not.

It imports nothing of lark-store; README.md beside this file says how to make the environment.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched

import numpy as np
from probe import Probe, size_of

HITS = 10
MODULE = "sketch"


def make(given: dict[str, Any]) -> None:
    """Write the index."""
    probe = Probe()
    with contextlib.redirect_stdout(sys.stderr), probe.step("imports"):
        from bergson.data import create_index
        from bergson.gradients import GradientProcessor
    rows = np.load(Path(given["flat"]) / "rows.npy", mmap_mode="r")
    home = Path(given["home"])
    with contextlib.redirect_stdout(sys.stderr), probe.step("build"):
        index = create_index(home, len(rows), {MODULE: rows.shape[1]}, rows.dtype)
        for start in range(0, len(rows), 1024):
            index[start : start + 1024] = rows[start : start + 1024]
        index.flush()
        GradientProcessor().save(home)
    probe.report(bytes=size_of(home))


def query(given: dict[str, Any]) -> None:
    """Open the index and search; all queries in one call."""
    probe = Probe()
    with contextlib.redirect_stdout(sys.stderr), probe.step("imports"):
        import torch
        from bergson import Attributor
    queries = torch.from_numpy(np.load(Path(given["flat"]) / "queries.npy")[: given["queries"]]).float()
    with contextlib.redirect_stdout(sys.stderr), probe.step("open"):
        attributor = Attributor(given["home"], device="cpu")
    with probe.step("first"):
        attributor.search({MODULE: queries[:1]}, HITS)
    for _ in range(given.get("repeats", 1)):
        with probe.step("answer"):
            found = attributor.search({MODULE: queries}, HITS)
    probe.report(per_call=len(queries), top=found.indices.tolist())


if __name__ == "__main__":
    spec = json.loads(sys.argv[1])
    {"bergson-make": make, "bergson": query}[spec["way"]](spec)
