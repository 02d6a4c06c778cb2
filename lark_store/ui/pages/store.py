"""The store: its checkpoints and sources, what is sketched, its runs and its warnings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import polars as pl
from starlette.routing import Route

from lark_store.ui.equivalent import lines
from lark_store.ui.explorer import explorer_of, page
from lark_store.ui.scope import sample_path
from lark_store.ui.tables import table

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import HTMLResponse

    from lark_store.store import Store

_RUNS = """
SELECT 'ingest' AS work, ingest_run AS run, status, checkpoint, source, variant, sketcher, NULL AS queries,
       n_sketched AS n, n_failed, finished_at, error
FROM ingest_runs
UNION ALL
SELECT 'attribute', score_run, status, checkpoint, source, variant, sketcher, queries, n_samples, 0, finished_at, error
FROM score_runs ORDER BY finished_at DESC NULLS FIRST LIMIT 20"""
_IS_SCORED = "SELECT count(*) > 0 FROM score_runs WHERE status = 'done'"
_FAILURES = """
SELECT source, checkpoint, variant, reason, count(*) AS samples, min(sample_id) AS first
FROM failures GROUP BY ALL ORDER BY samples DESC LIMIT 10"""


def show(request: Request) -> HTMLResponse:
    """Show the store."""
    explorer = explorer_of(request)
    store = explorer.store
    contents, coverage = store.show(), store.coverage()
    failures = store.sql(_FAILURES)
    return page(
        request,
        "store",
        "Store",
        checkpoints=table(contents.checkpoints.drop("path")),
        sources=table(contents.sources.drop("uri"), {"name": lambda row: f"/samples/{quote(row['name'])}"}),
        grids=_grids(coverage),
        sketchers=table(contents.sketchers),
        runs=table(store.sql(_RUNS)),
        failures=table(failures, {"first": _sample}),
        warnings=_warnings(store, contents, coverage),
        lines=lines(explorer, "show"),
    )


def _sample(row: dict[str, Any]) -> str:
    return sample_path(row["source"], row["first"])


def _grids(coverage: pl.DataFrame) -> dict[str, Any]:
    """Return for each sketcher a grid of sources and variants by checkpoints: the number of sketched samples."""
    grids = {}
    for (sketcher,), part in coverage.group_by("sketcher", maintain_order=True):
        counts = pl.format("{} of {}", "n_searched", "n_samples")
        cells = part.with_columns(count=pl.when(pl.col("n_searched") > 0).then(counts))
        grid = cells.pivot("checkpoint", index=["source", "variant"], values="count")
        grids[str(sketcher)] = table(grid)
    return grids


def _warnings(store: Store, contents: Any, coverage: pl.DataFrame) -> list[str]:
    """Return what a user should know before anything else."""
    found = []
    if contents.checkpoints.is_empty():
        found.append("There are no checkpoints yet: add one with `lark-store checkpoint add`.")
    if contents.sources.is_empty():
        found.append("There are no samples yet: add a source with `lark-store source add`.")
    elif coverage.is_empty():
        found.append("Nothing is sketched yet: run `lark-store ingest`.")
    elif not store.sql(_IS_SCORED).item():
        found.append(
            "Nothing is scored yet: the page Dominance, and ft and pt on the page Queries, need `lark-store attribute`."
        )
    return found + list(dict.fromkeys(coverage["note"].drop_nulls()))


ROUTES = [Route("/", show)]
