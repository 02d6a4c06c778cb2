"""The influence of groups at checkpoints, as colours."""

from __future__ import annotations

from typing import TYPE_CHECKING

import altair as alt

from lark_store.charts.readable import readable
from lark_store.charts.style import INK, OTHERS, TUNING, WIDTH, data, styled, tips, titled
from lark_store.charts.trajectory import checkpoint_axis

if TYPE_CHECKING:
    import polars as pl

    from lark_store.charts.style import Figure

_ROW = 30  # pixels


def heatmap(frame: pl.DataFrame, title: str, *subtitle: str) -> Figure:
    """Draw a row per group and a column per checkpoint, both in the order of the rows; the palest colour is 0.

    Columns: group, checkpoint, value, low, high (or null), wins, n_samples, n_queries.
    """
    frame = readable(frame.select("group", "checkpoint", "value", "low", "high", "wins", "n_samples", "n_queries"))
    groups = frame["group"].unique(maintain_order=True).to_list()
    most = max((abs(value) for value in frame["value"]), default=0) or 1.0
    x = checkpoint_axis(frame["checkpoint"].unique(maintain_order=True).to_list())
    y = alt.Y("group:N", sort=groups, title=None, axis=alt.Axis(ticks=False))
    scale = alt.Scale(domain=[-most, 0, most], range=[OTHERS[0], "#f6f6f6", TUNING], interpolate="rgb")
    legend = alt.Legend(title="influence", format=".2~g", gradientLength=180, tickCount=3)
    tooltip = tips(
        group="group", checkpoint="checkpoint", value=("influence", ".4g"), low=("95% from", ".4g"),
        high=("to", ".4g"), wins=("wins", ".1%"), n_samples="samples", n_queries="queries",
    )  # fmt: skip
    base = alt.Chart(data(frame)).encode(x=x, y=y)
    cells = base.mark_rect(stroke="white", strokeWidth=2).encode(
        color=alt.Color("value:Q", scale=scale, legend=legend), tooltip=tooltip
    )
    is_dark = alt.when(f"abs(datum.value) > {0.75 * most:.6g}")
    ink = is_dark.then(alt.value("white")).otherwise(alt.value(INK))
    text = base.mark_text(fontSize=12).encode(text=alt.Text("value:Q", format=".3~g"), color=ink)
    return styled(
        alt.layer(cells, text).properties(width=WIDTH, height=_ROW * len(groups), title=titled(title, *subtitle))
    )
