"""Two columns of any table against each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import altair as alt
import polars as pl

from lark_store.charts.readable import visible
from lark_store.charts.style import HEIGHT, OTHERS, WIDTH, data, styled, tips, titled
from lark_store.errors import InputError

if TYPE_CHECKING:
    from lark_store.charts.style import Figure

MOST = 5_000  # points
_BARS = 60  # texts on the axis, at most


def columns_chart(frame: pl.DataFrame, x: str, y: str) -> Figure:
    """Draw column `y`, of numbers, over column `x`: points over numbers, bars over texts.

    Raises
    ------
    InputError
        A column is missing, `y` has no numbers, or the table is too long for a chart.
    """
    for name in (x, y):
        if name not in frame.columns:
            raise InputError(
                f"the result has no column `{name}`", f"it has {', '.join(f'`{c}`' for c in frame.columns)}"
            )
    if not frame[y].dtype.is_numeric():
        raise InputError(f"the column `{y}` has no numbers", "choose another one for the vertical axis")
    is_number = frame[x].dtype.is_numeric()
    points = frame.select(x=pl.col(x) if is_number else pl.col(x).cast(pl.String), y=pl.col(y).cast(pl.Float64))
    if len(points) > MOST or not (is_number or points["x"].n_unique() <= _BARS):
        most = f"{MOST:,} rows" if is_number or len(points) > MOST else f"{_BARS} texts"
        raise InputError(f"a chart shows at most {most}", "select fewer with LIMIT, or group them with GROUP BY")
    names = {"x": visible(x), "y": visible(y)}
    tooltip = tips(x=names["x"], y=(names["y"], ".6g"))
    base = alt.Chart(data(points))
    vertical = alt.Y("y:Q", title=names["y"])
    if is_number:
        drawn = base.mark_circle(size=50, color=OTHERS[0]).encode(
            x=alt.X("x:Q", title=names["x"], scale=alt.Scale(zero=False)), y=vertical, tooltip=tooltip
        )
    else:
        order = points["x"].unique(maintain_order=True).to_list()
        drawn = base.mark_bar(color=OTHERS[0]).encode(
            x=alt.X("x:N", title=names["x"], sort=order), y=vertical, tooltip=tooltip
        )
    return styled(drawn.properties(width=WIDTH, height=HEIGHT, title=titled(f"{names['y']} by {names['x']}")))
