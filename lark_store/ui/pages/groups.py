"""The map: influence by source, or by any key of the samples' metadata, at each checkpoint."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import polars as pl
from starlette.routing import Route

from lark_store.display.values import numbers
from lark_store.query.select.keys import metadata_text
from lark_store.ui.equivalent import lines
from lark_store.ui.explorer import explorer_of, page
from lark_store.ui.pages.query import metadata_keys
from lark_store.ui.parameters import Parameters
from lark_store.ui.scope import choose
from lark_store.ui.tables import table

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import HTMLResponse

    from lark_store.store import Store
    from lark_store.ui.scope import Scope

_OWN = ("source", "stage", "domain", "variant", "label")
_HOWS = {
    "mean": "The mean of the samples' scores, over all queries",
    "max": "The highest score of a sample, on average over the queries",
    "sum": "The sum of the samples' scores, on average over the queries",
}
_OF_SAMPLES = "SELECT source, sample_id, label, meta FROM samples WHERE list_contains($sources, source)"
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
    """A row of the map: a group, its number of sketches, and a cell per checkpoint, None where it has no scores."""

    name: str
    n: str
    cells: list[Square | None]


def show(request: Request) -> HTMLResponse:
    """Show the map."""
    explorer, parameters = explorer_of(request), Parameters(request.query_params)
    choices = choose(explorer.store, parameters)
    scope = choices.scope
    keys = _keys(explorer.store)
    by, how = parameters.one_of("by", keys, "source"), parameters.one_of("how", _HOWS, "mean")
    options = _options(scope) | {"by": [by], "how": how}
    checkpoints = scope.at if scope.over_checkpoints else choices.checkpoints
    frame = explorer.store.groups(checkpoint=checkpoints, **options)
    columns = {checkpoints[-1]: scope.place} if scope.over_checkpoints else {name: name for name in checkpoints}
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
        meaning=f"{_HOWS[how]}. Below each value: its 95% interval over the queries. "
        "A sample in two format variants counts twice.",
        checkpoints=list(columns.values()),
        rows=_rows(frame, names[:_SHOWN], list(columns), scope, {"by": by, "how": how}),
        notes=[*dict.fromkeys(frame["note"].drop_nulls()), *_cut(len(names))],
        lines=lines(explorer, "groups", checkpoint=checkpoints, **options),
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
        href = scope.url("/map/samples", **kept, group=name, at=checkpoint)  # a null group is left out
        return Square(_minus(texts[row["value"]]), _interval(row), _shade(row["value"], largest), href)

    return [
        Line(
            _named(name),
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


def _keys(store: Store) -> list[str]:
    """Return all keys to group by; a key of the metadata named like one of our own can't be reached."""
    return list(dict.fromkeys([*_OWN, *metadata_keys(store)]))


def samples(request: Request) -> HTMLResponse:
    """Show the samples behind a cell, those with the highest mean score over the queries first."""
    explorer, parameters = explorer_of(request), Parameters(request.query_params)
    choices = choose(explorer.store, parameters)
    by = parameters.one_of("by", _keys(explorer.store), "source")
    group = parameters.exact("group")
    at = parameters.one_of("at", choices.checkpoints, choices.checkpoints[-1])
    scope = choices.scope if choices.scope.over_checkpoints else replace(choices.scope, checkpoint=at)
    scores = explorer.store.scores(**scope.search)
    frame = scores.samples.select(
        pl.Series("mean_score", scores.matrix.mean(axis=0)),
        pl.Series("highest_score", scores.matrix.max(axis=0)),
        pl.Series("on_query", [scores.query_ids[i] for i in scores.matrix.argmax(axis=0)]),
        "source",
        "variant",
        "sample_id",
    )
    members = frame.filter(_is_member(explorer.store, scores.samples, by, group)).sort("mean_score", descending=True)
    links = {
        "on_query": lambda row: scope.query_url(row["on_query"]),
        "sample_id": lambda row: scope.sample_url(row["source"], row["sample_id"]),
    }
    return page(
        request,
        "group",
        f"{by} {_named(group)} at {scope.place}",
        back=scope.url("/map", by=by),
        n=len(members),
        samples=table(members, links, most=_SHOWN),
        lines=lines(explorer, "groups", by=[by], **scope.search),
    )


def _named(group: str | None) -> str:
    """Return a group's name for people."""
    return "(none)" if group is None else group or '""'


def _is_member(store: Store, samples: pl.DataFrame, key: str, group: str | None) -> pl.Series:
    """Tell which rows of `samples` belong to a group, as `Store.groups` divides them."""
    if key in ("source", "variant"):
        return samples[key] == group
    if key in ("stage", "domain"):
        of_source = dict(store.sql(f"SELECT name, {key} FROM sources").iter_rows())  # noqa: S608  # one of our own names
        return pl.Series([of_source[source] == group for source in samples["source"]])
    rows = store.sql(_OF_SAMPLES, {"sources": samples["source"].unique().to_list()}).iter_rows()
    is_label = key == "label"
    values = {
        (source, sample_id): label if is_label else metadata_text(json.loads(meta).get(key) if meta else None)
        for source, sample_id, label, meta in rows
    }
    names = samples.select("source", "sample_id").iter_rows()
    return pl.Series([values.get(name) == group for name in names], dtype=pl.Boolean)


ROUTES = [Route("/map", show), Route("/map/samples", samples)]
