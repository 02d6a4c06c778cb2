"""One query: its prompt and response, its proponents and opponents, and the same at all checkpoints."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from starlette.routing import Route

from lark_store.errors import NameUnknownError
from lark_store.ui.equivalent import lines
from lark_store.ui.explorer import explorer_of, page
from lark_store.ui.hits import EXPLAINED, cards, finding_of, largest_of, rankings_of, summary
from lark_store.ui.parameters import Parameters
from lark_store.ui.scope import choose, id_of, segment
from lark_store.ui.tables import parts_of, table, words_of

if TYPE_CHECKING:
    import polars as pl
    from starlette.requests import Request
    from starlette.responses import HTMLResponse

    from lark_store.store import Store
    from lark_store.ui.scope import Choices, Scope
    from lark_store.ui.tables import Table

_MOST = 50
_OF_SAMPLES = [
    "source",
    "stage",
    "domain",
    "variant",
    "sample_id",
    "n_tokens",
    "n_loss_tokens",
    "loss",
    "grad_norm",
    "prompt",
    "response",
    "text",
    "label",
]
_KEYS = """
SELECT DISTINCT unnest(json_keys(meta)) AS name FROM (SELECT meta FROM samples WHERE meta IS NOT NULL LIMIT 1000)
ORDER BY name"""
_SAMPLE = "SELECT * FROM samples WHERE source = ? AND sample_id = ?"
_MEASURED = """
SELECT source, sample_id, variant, value, mode, optimizer, learning_rate FROM eif
WHERE checkpoint = ? AND queries = ? AND query_id = ? AND query_variant = ?
ORDER BY abs(value) DESC, source, sample_id, eif_run LIMIT ?"""
_LOSSES = """
SELECT c.name AS checkpoint, c.epoch, x.loss, p.answer AS predicted_answer
FROM checkpoints c
LEFT JOIN (
    SELECT checkpoint, CASE WHEN isnan(loss) THEN NULL ELSE loss END AS loss
    FROM sketches WHERE sketcher = $sketcher AND source = $queries AND sample_id = $query
    AND variant = $query_variant) x ON x.checkpoint = c.name
LEFT JOIN (
    SELECT checkpoint, any_value(answer) AS answer FROM predictions
    WHERE sketcher = $sketcher AND source = $queries AND sample_id = $query AND variant = $query_variant
    GROUP BY ALL) p ON p.checkpoint = c.name
WHERE list_contains($checkpoints, c.name) ORDER BY list_position($checkpoints, c.name)"""


def show(request: Request) -> HTMLResponse:
    """Show a query at one checkpoint."""
    explorer, parameters = explorer_of(request), Parameters(request.query_params)
    query_id = id_of(request.path_params["query"])
    choices = choose(explorer.store, parameters)
    scope = choices.scope
    row = sample_row(explorer.store, scope.queries, query_id)
    parts = parts_of(row)
    k, where = parameters.whole("k", 5, 1, _MOST), parameters.text("where")
    ranked = scope.search | {"k": k, "where": where}
    proponents = explorer.store.top(query_id, **ranked)
    opponents = explorer.store.top(query_id, **ranked, opponents=True)
    marked = words_of(parts)
    return page(
        request,
        "query",
        query_id,
        choices=choices,
        query_id=query_id,
        parts=parts,
        losses=table(_losses(explorer.store, choices, query_id)),
        measured=_measured(explorer.store, scope, query_id, 2 * k),
        k=k,
        where=where or "",
        columns=_columns(explorer.store),
        rankings=rankings_of(proponents, opponents, marked, scope),
        summary=summary(proponents),
        is_explained=scope.method in EXPLAINED and scope.is_plain,
        at_all=scope.url(f"/checkpoints/{segment(query_id)}", k=k, where=where),
        histogram=scope.url("/plot/histogram.svg", query=query_id, k=k, where=where),
        lines=lines(explorer, "top", query_id, **ranked),
    )


def at_all_checkpoints(request: Request) -> HTMLResponse:
    """Show a query's hits at all checkpoints side by side, and their trajectories."""
    explorer, parameters = explorer_of(request), Parameters(request.query_params)
    query_id = id_of(request.path_params["query"])
    choices = choose(explorer.store, parameters)
    scope = choices.scope.at_each(choices.scope.checkpoint)
    parts = parts_of(sample_row(explorer.store, scope.queries, query_id))
    k, where = parameters.whole("k", 5, 1, _MOST), parameters.text("where")
    options = scope.search | {"k": k, "where": where}
    del options["checkpoint"]
    rankings = explorer.store.top(query_id, checkpoints=choices.checkpoints, **options)
    beside = rankings.side_by_side[query_id].drop("text")
    links = {"sample_id": lambda row: scope.sample_url(row["source"], row["sample_id"])}
    marked, scale = words_of(parts), largest_of(*rankings)
    return page(
        request,
        "query_checkpoints",
        f"{query_id} at all checkpoints",
        choices=replace(choices, scope=scope, sums=()),
        query_id=query_id,
        parts=parts,
        losses=table(_losses(explorer.store, choices, query_id)),
        k=k,
        where=where or "",
        columns=_columns(explorer.store),
        beside=table(beside, links),
        rankings=[
            (
                hits.checkpoint,
                finding_of(hits),
                cards(hits, marked, scope.at_each(hits.checkpoint), scale),
            )
            for hits in rankings
        ],
        at_one=scope.url(f"/query/{segment(query_id)}", k=k, where=where),
        trajectory=scope.url("/plot/trajectory.svg", query=query_id, k=k, where=where),
        lines=lines(explorer, "top", query_id, checkpoints=choices.checkpoints, **options),
    )


def sample_row(store: Store, source: str, sample_id: str) -> dict[str, Any]:
    """Return a sample's row of the view `samples`.

    Raises
    ------
    NameUnknownError
    """
    rows = store.sql(_SAMPLE, [source, sample_id])
    if rows.is_empty():
        raise NameUnknownError(f"`{source}` has no sample `{sample_id}`", "search for it on the page Queries or Store")
    return rows.row(0, named=True)


def _losses(store: Store, choices: Choices, query_id: str) -> pl.DataFrame:
    """Return the query's loss and its predicted answer at each checkpoint; without the answers if there are none."""
    scope: Scope = choices.scope
    keys = {"sketcher": scope.sketcher, "queries": scope.queries, "query_variant": scope.query_variant}
    frame = store.sql(_LOSSES, keys | {"query": query_id, "checkpoints": choices.checkpoints})
    return frame.drop("predicted_answer") if frame["predicted_answer"].count() == 0 else frame


def _measured(store: Store, scope: Scope, query_id: str, n: int) -> Table | None:
    """Return the samples with the largest measured influence on the query, if any was measured there."""
    names = [scope.checkpoint, scope.queries, query_id, scope.query_variant]
    frame = store.sql(_MEASURED, [*names, n])
    links = {"sample_id": lambda row: scope.sample_url(row["source"], row["sample_id"])}
    return None if frame.is_empty() else table(frame, links)


def metadata_keys(store: Store) -> list[str]:
    """Return the keys of the first thousand samples' metadata."""
    return store.sql(_KEYS)["name"].to_list()


def _columns(store: Store) -> list[str]:
    """Return the columns that a condition on samples may name: those of sketches, of samples, and of metadata."""
    return [*_OF_SAMPLES, *metadata_keys(store)]


ROUTES = [Route("/checkpoints/{query:any}", at_all_checkpoints), Route("/query/{query:any}", show)]
