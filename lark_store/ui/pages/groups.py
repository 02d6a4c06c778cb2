"""The map: influence by source, or by any key of the samples' metadata, at each checkpoint."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import polars as pl
from starlette.routing import Route

from lark_store.display.values import numbers
from lark_store.ui.equivalent import lines
from lark_store.ui.explorer import explorer_of, page
from lark_store.ui.pages.query import metadata_keys
from lark_store.ui.parameters import Parameters
from lark_store.ui.scope import choose
from lark_store.ui.tables import table

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import HTMLResponse

    from lark_store.ui.scope import Scope

_OWN = ("source", "stage", "domain", "variant", "label")
_HOWS = {
    "mean": "The mean of the samples' scores, over all queries",
    "max": "The highest score of a sample, on average over the queries",
    "sum": "The sum of the samples' scores, on average over the queries",
}
_SHADES = 5
_SHOWN = 100  # groups


@dataclass(frozen=True)
class Square:
    """A cell of the map: its value, its interval and sketch error as text, its shade, and where a click leads."""

    text: str
    interval: str
    shade: str
    href: str


@dataclass(frozen=True)
class Line:
    """A row of the map: a group, its number of samples, and a cell per checkpoint, None where it has no scores."""

    name: str | None
    n: str
    cells: list[Square | None]


def show(request: Request) -> HTMLResponse:
    """Show the map."""
    explorer, parameters = explorer_of(request), Parameters(request.query_params)
    choices = choose(explorer.store, parameters, scored=False)
    scope = choices.scope
    keys = [*_OWN, *metadata_keys(explorer.store)]
    by, how = parameters.one_of("by", keys, "source"), parameters.one_of("how", _HOWS, "mean")
    options = _options(scope) | {"by": [by], "how": how}
    frame = explorer.store.groups(checkpoint=choices.checkpoints, **options)
    names = frame["group_name"].unique(maintain_order=True).to_list()
    return page(
        request,
        "map",
        "Map",
        choices=choices,
        keys=keys,
        by=by,
        how=how,
        hows=list(_HOWS),
        meaning=f"{_HOWS[how]}. Below each value: its 95% interval over the queries.",
        checkpoints=choices.checkpoints,
        rows=_rows(frame, names[:_SHOWN], choices.checkpoints, scope, {"by": by, "how": how}),
        notes=[*dict.fromkeys(frame["note"].drop_nulls()), *_cut(len(names))],
        lines=lines(explorer, "groups", checkpoint=choices.checkpoints, **options),
    )


def _options(scope: Scope) -> dict[str, Any]:
    """Return the keywords of `Store.groups` but the checkpoint."""
    return {name: value for name, value in scope.search.items() if name != "checkpoint"}


def _cut(n: int) -> list[str]:
    return [f"The first {_SHOWN} of {n:,} groups are shown."] if n > _SHOWN else []


def _rows(
    frame: pl.DataFrame, names: list[str | None], checkpoints: list[str], scope: Scope, kept: dict[str, str]
) -> list[Line]:
    """Return the rows of the map, in the order of `names`."""
    frame = frame.filter(pl.col("group_name").is_in(names, nulls_equal=True))
    largest = max((abs(value) for value in frame["value"] if value is not None and math.isfinite(value)), default=0.0)
    texts = dict(zip(frame["value"], numbers(frame["value"].to_list()), strict=True))
    found = {(row["group_name"], row["checkpoint"]): row for row in frame.iter_rows(named=True)}

    def square(name: str | None, checkpoint: str) -> Square | None:
        row = found.get((name, checkpoint))
        if row is None:
            return None
        href = scope.url("/map/samples", **kept, group=name, at=checkpoint)
        return Square(_minus(texts[row["value"]]), _interval(row), _shade(row["value"], largest), href)

    return [
        Line(
            name,
            f"{max(row['n_samples'] for (group, _), row in found.items() if group == name):,}",
            [square(name, checkpoint) for checkpoint in checkpoints],
        )
        for name in names
    ]


def _interval(row: dict[str, Any]) -> str:
    if row["low"] is None:
        return ""
    low, high = numbers([row["low"], row["high"]], 3)
    return _minus(f"[{low}, {high}]")


def _minus(text: str) -> str:
    return text.replace("-", "−")


def _shade(value: float | None, largest: float) -> str:
    """Return the class of a cell: `p1` to `p5` above 0, `n1` to `n5` below."""
    if not value or not largest or not math.isfinite(value):
        return ""
    return f"{'p' if value > 0 else 'n'}{max(1, math.ceil(abs(value) / largest * _SHADES))}"


def samples(request: Request) -> HTMLResponse:
    """Show the samples behind a cell, those with the highest mean score over the queries first."""
    explorer, parameters = explorer_of(request), Parameters(request.query_params)
    choices = choose(explorer.store, parameters, scored=False)
    by = parameters.one_of("by", [*_OWN, *metadata_keys(explorer.store)], "source")
    group = parameters.text("group")
    at = parameters.one_of("at", choices.checkpoints, choices.checkpoints[-1])
    scope = replace(choices.scope, checkpoint=at)
    options = scope.search | {"where": _condition(by, group)}
    scores = explorer.store.scores(**options)
    frame = scores.samples.select(
        pl.Series("mean_score", scores.matrix.mean(axis=0)),
        pl.Series("highest_score", scores.matrix.max(axis=0)),
        pl.Series("on_query", [scores.query_ids[i] for i in scores.matrix.argmax(axis=0)]),
        "source",
        "variant",
        "sample_id",
    ).sort("mean_score", descending=True)
    links = {
        "on_query": lambda row: scope.url(f"/query/{quote(row['on_query'], safe='')}"),
        "sample_id": lambda row: f"/sample/{quote(row['source'])}/{quote(row['sample_id'], safe='')}",
    }
    return page(
        request,
        "group",
        f"{by} {'(none)' if group is None else group} at {at}",
        back=scope.url("/map", by=by),
        n=len(frame),
        samples=table(frame, links, most=_SHOWN),
        lines=lines(explorer, "scores", **options),
    )


def _condition(key: str, value: str | None) -> str:
    """Return the SQL condition of a group's samples."""
    column = '"' + key.replace('"', '""') + '"'
    if value is None:
        return f"{column} IS NULL"
    text = value.replace("'", "''")
    return f"CAST({column} AS VARCHAR) = '{text}'"


ROUTES = [Route("/map", show), Route("/map/samples", samples)]
