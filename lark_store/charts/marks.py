"""Layers which several charts have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import altair as alt

from lark_store.charts.style import QUIET, SHAPES, data

if TYPE_CHECKING:
    from collections.abc import Sequence

    import polars as pl


def lines_with_bands(
    frame: pl.DataFrame,
    x: alt.X,
    y: alt.Y,
    colours: dict[str, str],
    tooltip: Sequence[alt.Tooltip],
    *,
    dashed: Sequence[str] = (),
) -> list[alt.Chart]:
    """Return the layers of a line chart: 95% band, line, points. Columns: series, low, high, and those of x and y."""
    names = [name for name in colours if name in set(frame["series"])]
    scale = alt.Scale(domain=names, range=[colours[name] for name in names])
    places = list(dict.fromkeys(colours.values()))  # one colour, one shape
    shapes = alt.Scale(domain=names, range=[SHAPES[places.index(colours[name]) % len(SHAPES)] for name in names])
    dashes = alt.Scale(domain=names, range=[[5, 4] if name in dashed else [1, 0] for name in names])
    colour = alt.Color("series:N", scale=scale, title=None)
    base = alt.Chart(data(frame))
    field, _, _ = str(x["shorthand"]).partition(":")
    is_line = frame[field].n_unique() > 1
    band = base.mark_area(opacity=0.15, aria=False) if is_line else base.mark_rule(strokeWidth=2)
    lines = base.mark_line(strokeWidth=2, aria=False)
    title: Any = y["title"]
    points = base.mark_point(size=56, filled=True, opacity=1)
    return [
        band.encode(x=x, y=alt.Y("low:Q", title=title), y2="high:Q", color=colour),
        lines.encode(x=x, y=y, color=colour, strokeDash=alt.StrokeDash("series:N", scale=dashes, title=None)),
        points.encode(
            x=x, y=y, color=colour, shape=alt.Shape("series:N", scale=shapes, title=None), tooltip=list(tooltip)
        ),
    ]


def zero() -> alt.Chart:
    """Return the line at 0."""
    rule: alt.Chart = alt.Chart(alt.InlineData(values=[{"y": 0}])).mark_rule(color=QUIET, strokeDash=[2, 3])
    drawn: alt.Chart = rule.encode(y="y:Q")
    return drawn
