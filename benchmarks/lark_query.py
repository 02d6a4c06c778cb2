"""Queries of lark-store: one method and one process per call; query.py starts it and prints the tables.

    python benchmarks/lark_query.py '{"way": "lark-top", "home": STORE, "source": "queries-64", "ids": […]}'

- `lark-top`, `lark-approximate`: the top 10 of each query in turn
- `lark-attribute`: all queries of a source, `repeats` times
- `lark-index`: build the index of approximate search
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as in the command line

from probe import Probe, size_of

CHECKPOINT = "trained"
SKETCHER = "lark"
HITS = 10
Spec = dict[str, Any]
Key = tuple[str, str, str]  # source, variant, sample_id


def open_store(probe: Probe, home: str) -> Any:
    """Load all libraries, then open the store: imports are not part of the opening time."""
    with probe.step("imports"):
        import lance  # noqa: F401 - imported for timing only, like the next
        import lancedb  # noqa: F401
        import polars as pl  # noqa: F401
        import torch  # noqa: F401

        import lark_store.query.answers.attribute
        import lark_store.query.answers.top  # noqa: F401
        from lark_store import Store
    with probe.step("open"):
        return Store.open(home)


def keys_of(frame: Any) -> list[Key]:
    """Return the keys of an answer's rows."""
    return list(zip(frame["source"], frame["variant"], frame["sample_id"], strict=True))


def top(spec: Spec) -> None:
    """Ask for the top 10 of each query in turn, exact or approximate."""
    probe = Probe()
    store = open_store(probe, spec["home"])
    flags: Spec = {"approximate": True} if spec["way"] == "lark-approximate" else {}

    def ask(query: str) -> Any:
        return store.top(query, checkpoint=CHECKPOINT, k=HITS, queries=spec["source"], sketcher=SKETCHER, **flags)

    with probe.step("first"):
        ask(spec["ids"][0])
    answers = []
    for query in spec["ids"][: spec.get("calls")]:
        with probe.step("answer"):
            hits = ask(query)
        answers.append(keys_of(hits.frame))
    probe.report(per_call=1, top=answers, how=hits.how)


def attribute(spec: Spec) -> None:
    """Score all queries of a source. Each call asks for another number of hits, so nothing is reused."""
    probe = Probe()
    store = open_store(probe, spec["home"])
    for number in range(spec["repeats"]):
        with probe.step("answer"):
            store.attribute([CHECKPOINT], queries=spec["source"], sketcher=SKETCHER, hits=100 + number)
    peaks = probe.peaks()  # before the untimed SQL query
    frame = store.sql(
        f"""SELECT query_id, source, variant, sample_id FROM influence WHERE queries = '{spec["source"]}'
            QUALIFY row_number() OVER (PARTITION BY query_id ORDER BY score DESC, source, variant, sample_id) <= {HITS}
            ORDER BY query_id, score DESC"""  # noqa: S608 - query.py chose the name
    )
    answers = {str(query): keys_of(rows) for (query,), rows in frame.group_by("query_id", maintain_order=True)}
    probe.report(per_call=len(spec["ids"]), top=[answers[query] for query in spec["ids"]], **peaks)


def index(spec: Spec) -> None:
    """Build the index of approximate search."""
    probe = Probe()
    home = Path(spec["home"])
    before = size_of(home)
    store = open_store(probe, spec["home"])
    with probe.step("build"):
        store.index_build(sketcher=SKETCHER)
    probe.report(bytes=size_of(home) - before)


WAYS = {"lark-top": top, "lark-approximate": top, "lark-attribute": attribute, "lark-index": index}


if __name__ == "__main__":
    spec = json.loads(sys.argv[1])
    WAYS[spec["way"]](spec)
