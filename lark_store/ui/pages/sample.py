"""One sample: its text and metadata, its sketches, near copies, and the queries that it drives or hinders."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import polars as pl
from starlette.routing import Route

from lark_store.errors import LarkStoreError
from lark_store.ui.equivalent import lines
from lark_store.ui.explorer import explorer_of, page
from lark_store.ui.pages.query import sample_row
from lark_store.ui.parameters import Parameters
from lark_store.ui.scope import choose, id_of, sample_path
from lark_store.ui.tables import parts_of, table, with_text

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import HTMLResponse

    from lark_store.ui.explorer import Explorer
    from lark_store.ui.scope import Choices
    from lark_store.ui.tables import Table

_SKETCHES = """
SELECT sketcher, checkpoint, variant, n_tokens, n_loss_tokens, n_cut, loss, grad_norm * grad_norm AS self_influence
FROM sketches WHERE source = ? AND sample_id = ? ORDER BY sketcher, ingest_run"""
_FAILURES = "SELECT checkpoint, variant, reason FROM failures WHERE source = ? AND sample_id = ? ORDER BY ingest_run"
_COPIES = 6
_SHOWN = 50


def show(request: Request) -> HTMLResponse:
    """Show a sample."""
    explorer, parameters = explorer_of(request), Parameters(request.query_params)
    source, sample_id = request.path_params["source"], id_of(request.path_params["sample"])
    store = explorer.store
    row = sample_row(store, source, sample_id)
    parts, name = parts_of(row), f"{source}/{sample_id}"
    text = "\n".join(piece for part in parts for piece, _ in part.pieces)
    copies, copies_note = _copies(explorer, text, name)
    choices, influence, note = _influence(explorer, parameters, source, sample_id)
    return page(
        request,
        "sample",
        name,
        parts=parts,
        name=name,
        label=row["label"],
        meta=json.loads(row["meta"]) if row["meta"] else {},
        sketches=table(store.sql(_SKETCHES, [source, sample_id])),
        failures=table(store.sql(_FAILURES, [source, sample_id])),
        copies=copies,
        copies_note=copies_note,
        choices=choices,
        influence=influence,
        note=note,
        remove=lines(explorer, "sample_remove", source, sample_id).command,
        lines=lines(explorer, "sample_show", name),
    )


def _copies(explorer: Explorer, text: str, name: str) -> tuple[Table | None, str | None]:
    """Return the samples with the most similar texts, or why there are none."""
    try:
        frame = explorer.store.similar_text(text=text, k=_COPIES)
    except LarkStoreError as error:
        return None, error.fact
    others = frame.filter(pl.concat_str(["source", "sample_id"], separator="/") != name, pl.col("score") > 0)
    links = {"sample_id": lambda row: sample_path(row["source"], row["sample_id"])}
    return table(others.drop("rank"), links), None


def _influence(
    explorer: Explorer, parameters: Parameters, source: str, sample_id: str
) -> tuple[Choices | None, Table | None, str | None]:
    """Return the queries by the sample's influence on them, or a note why there are none."""
    condition = f"sample_id = '{sample_id.replace(chr(39), chr(39) * 2)}'"
    choices = None
    try:
        choices = choose(explorer.store, parameters)
        scores = explorer.store.scores(sources=[source], where=condition, **choices.scope.search)
    except LarkStoreError as error:
        return choices, None, error.fact
    frame = scores.frame.select("score", "query_id", "variant").sort("score", descending=True)
    shown = frame if len(frame) <= _SHOWN else pl.concat([frame.head(_SHOWN // 2), frame.tail(_SHOWN // 2)])
    note = None if len(shown) == len(frame) else f"The {_SHOWN // 2} highest and lowest of {len(frame)} are shown."
    scope = choices.scope
    return choices, table(shown, {"query_id": lambda row: scope.query_url(row["query_id"])}), note


def listed(request: Request) -> HTMLResponse:
    """List the samples of a source."""
    explorer, parameters = explorer_of(request), Parameters(request.query_params)
    source, where = request.path_params["source"], parameters.text("where")
    start = parameters.whole("start", 0, 0, 999_999_999)
    options: dict[str, Any] = {"where": where, "limit": _SHOWN, "offset": start}
    frame = explorer.store.sample_list(source, **options)
    rows = with_text(frame).select("sample_id", "text", "label", "meta")
    kept = [name for name in rows.columns if rows[name].count() or name == "sample_id"]
    following = f"?start={start + _SHOWN}" + (f"&where={quote(where)}" if where else "")
    return page(
        request,
        "samples",
        source,
        source=source,
        where=where or "",
        samples=table(rows.select(kept), {"sample_id": lambda row: sample_path(source, row["sample_id"])}),
        start=start,
        following=following if len(frame) == _SHOWN else None,
        lines=lines(explorer, "sample_list", source, **options),
    )


ROUTES = [Route("/samples/{source}", listed), Route("/sample/{source}/{sample:any}", show)]
