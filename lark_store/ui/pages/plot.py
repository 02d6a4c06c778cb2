"""Charts as SVG images, by their addresses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import polars as pl
from starlette.responses import Response
from starlette.routing import Route

from lark_store.ui.explorer import explorer_of
from lark_store.ui.parameters import Parameters
from lark_store.ui.scope import choose

if TYPE_CHECKING:
    from starlette.requests import Request

    from lark_store.charts.style import Figure
    from lark_store.ui.explorer import Explorer
    from lark_store.ui.scope import Scope

_KEYS = ["source", "variant", "sample_id"]
_MOST = 50
_LONGEST = 61  # characters of a sample's name in a legend


def histogram(request: Request) -> Response:
    """Draw all scores of a query, its hits marked."""
    explorer, parameters = explorer_of(request), Parameters(request.query_params)
    scope = choose(explorer.store, parameters).scope
    query, where = parameters.required("query"), parameters.text("where")
    k = parameters.whole("k", 5, 1, _MOST)
    return _drawn(explorer.store.plot("histogram", query, where=where, k=k, **scope.search))


def dominance(request: Request) -> Response:
    """Draw fine-tuning against pretraining, a point per query."""
    explorer, parameters = explorer_of(request), Parameters(request.query_params)
    scope = choose(explorer.store, parameters).scope
    return _drawn(explorer.store.plot("dominance", **scope.search))


def trajectory(request: Request) -> Response:
    """Draw the scores of a query's hits at every checkpoint."""
    from lark_store.charts.trajectory import influence_trajectory

    explorer, parameters = explorer_of(request), Parameters(request.query_params)
    choices = choose(explorer.store, parameters)
    query, where = parameters.required("query"), parameters.text("where")
    k = parameters.whole("k", 5, 1, _MOST)
    scope = choices.scope.at_each(choices.scope.checkpoint)
    frame = _scores_of_hits(explorer, scope, choices.checkpoints, query, {"k": k, "where": where})
    title = f"The top {k} samples at {scope.checkpoint}, at every checkpoint"
    return _drawn(influence_trajectory(frame, {}, title))


def _scores_of_hits(
    explorer: Explorer, scope: Scope, checkpoints: list[str], query: str, ranked: dict[str, int | str | None]
) -> pl.DataFrame:
    """Return the score of each hit at each checkpoint, in the columns of `influence_trajectory`."""
    hits = explorer.store.top(query, **scope.search | ranked).frame.select("rank", *_KEYS)
    parts = []
    for checkpoint in checkpoints:
        scores = explorer.store.scores([query], **scope.search | {"checkpoint": checkpoint, "where": ranked["where"]})
        joined = hits.join(scores.frame.select(*_KEYS, "score"), on=_KEYS, how="inner", maintain_order="left")
        parts.append(joined.with_columns(checkpoint=pl.lit(checkpoint)))
    frame: pl.DataFrame = pl.concat(parts)
    return frame.select(
        query_id=pl.lit(query),
        checkpoint="checkpoint",
        series=pl.format("{}. {} as {}", "rank", _shortened(pl.col("source") + "/" + pl.col("sample_id")), "variant"),
        value="score",
        noise=pl.lit(None, pl.Float64),
        n_samples=pl.lit(1),
    )


def _shortened(name: pl.Expr) -> pl.Expr:
    """Return a name with its middle left out, if it is too long for a legend."""
    half = (_LONGEST - 1) // 2
    short = pl.concat_str(name.str.head(half), pl.lit("…"), name.str.tail(half))
    return pl.when(name.str.len_chars() > _LONGEST).then(short).otherwise(name)


def _drawn(chart: Figure) -> Response:
    from lark_store.charts.files import svg

    return Response(svg(chart.to_dict(), "chart"), media_type="image/svg+xml")


ROUTES = [
    Route("/plot/histogram.svg", histogram),
    Route("/plot/dominance.svg", dominance),
    Route("/plot/trajectory.svg", trajectory),
]
