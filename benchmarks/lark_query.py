"""Our own answers to queries, one way and one process a call; query.py starts it and prints the tables.

    python benchmarks/lark_query.py '{"way": "lark-top", "home": STORE, "source": "queries-64", "ids": […]}'

- `lark-top`, `lark-approximate`: the top 10 of one query after the other
- `lark-attribute`: all queries of a source, as often as `repeats` says
- `lark-index`: build what approximate search needs
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as the command line does

from probe import Probe, size_of

CHECKPOINT = "trained"
SKETCHER = "lark"
HITS = 10
Spec = dict[str, Any]
Key = tuple[str, str, str]  # source, variant, sample_id


def opened(probe: Probe, home: str) -> Any:
    """Load what a first answer would load, so that it is not counted as the opening of a store; then open it."""
    with probe.step("imports"):
        import lance  # noqa: F401 - only loaded, as the next
        import lancedb  # noqa: F401
        import polars as pl  # noqa: F401
        import torch  # noqa: F401

        import lark_store.query.attribute
        import lark_store.query.top  # noqa: F401
        from lark_store import Store
    with probe.step("open"):
        return Store.open(home)


def keys_of(frame: Any) -> list[Key]:
    """Return which rows an answer names."""
    return list(zip(frame["source"], frame["variant"], frame["sample_id"], strict=True))


def top(spec: Spec) -> None:
    """Ask for the top 10 of one query after the other, exact or approximate."""
    probe = Probe()
    store = opened(probe, spec["home"])
    more: Spec = {"approximate": True} if spec["way"] == "lark-approximate" else {}

    def ask(query: str) -> Any:
        return store.top(query, checkpoint=CHECKPOINT, k=HITS, queries=spec["source"], sketcher=SKETCHER, **more)

    with probe.step("first"):
        ask(spec["ids"][0])
    found = []
    for query in spec["ids"][: spec.get("calls")]:
        with probe.step("answer"):
            hits = ask(query)
        found.append(keys_of(hits.frame))
    probe.report(per_call=1, top=found, how=hits.how)


def attribute(spec: Spec) -> None:
    """Score all queries of a source. Another number of hits asks another question, so it is scored anew each time."""
    probe = Probe()
    store = opened(probe, spec["home"])
    for number in range(spec["repeats"]):
        with probe.step("answer"):
            store.attribute([CHECKPOINT], queries=spec["source"], sketcher=SKETCHER, hits=100 + number)
    peaks = probe.peaks()  # what follows is not the pass
    frame = store.sql(
        f"""SELECT query_id, source, variant, sample_id FROM influence WHERE queries = '{spec["source"]}'
            QUALIFY row_number() OVER (PARTITION BY query_id ORDER BY score DESC, source, variant, sample_id) <= {HITS}
            ORDER BY query_id, score DESC"""  # noqa: S608 - the name is query.py's
    )
    found = {str(query): keys_of(some) for (query,), some in frame.group_by("query_id", maintain_order=True)}
    probe.report(per_call=len(spec["ids"]), top=[found[query] for query in spec["ids"]], **peaks)


def index(spec: Spec) -> None:
    """Build what approximate search needs."""
    probe = Probe()
    home = Path(spec["home"])
    before = size_of(home)
    store = opened(probe, spec["home"])
    with probe.step("build"):
        store.index_build(sketcher=SKETCHER)
    probe.report(bytes=size_of(home) - before)


WAYS = {"lark-top": top, "lark-approximate": top, "lark-attribute": attribute, "lark-index": index}


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    WAYS[given["way"]](given)
