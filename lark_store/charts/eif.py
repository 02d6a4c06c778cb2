"""Matrices of measured influence, and sweeps of learning rates."""

from __future__ import annotations

from typing import TYPE_CHECKING

import altair as alt

from lark_store.charts.readable import readable
from lark_store.charts.style import HEIGHT, OTHERS, TUNING, WIDTH, data, styled, tips, titled

if TYPE_CHECKING:
    from collections.abc import Sequence

    import polars as pl

    from lark_store.charts.style import Figure

_CELL, _WIDEST = 24, 420  # pixels


def matrices(frame: pl.DataFrame, order: Sequence[str], title: str, *subtitle: str) -> Figure:
    """Draw a matrix per panel: a row per sample, a column per query; the palest colour is 0.

    Columns: panel, sample, query, value. Panels stand side by side, each with its own scale of colours, since training
    and context differ in size. `order` is that of samples and queries.
    """
    frame = readable(frame.select("panel", "sample", "query", "value"))
    panels: list[alt.Chart] = []
    for (name,), part in frame.group_by("panel", maintain_order=True):
        most = max((abs(value) for value in part["value"]), default=0) or 1.0
        scale = alt.Scale(domain=[-most, 0, most], range=[OTHERS[0], "#f6f6f6", TUNING], interpolate="rgb")
        legend = alt.Legend(title="influence", format=".2~g", gradientLength=120, tickCount=3, orient="bottom")
        shown = [each for each in order if each in set(part["sample"]) | set(part["query"])]
        side = min(_WIDEST, _CELL * len(shown))
        chart = (
            alt.Chart(data(part))
            .mark_rect(stroke="white")
            .encode(
                x=alt.X("query:N", sort=shown, title="on the loss of", axis=alt.Axis(labelAngle=-45, ticks=False)),
                y=alt.Y(
                    "sample:N", sort=shown, title="influence of" if not panels else None, axis=alt.Axis(ticks=False)
                ),
                color=alt.Color("value:Q", scale=scale, legend=legend),
                tooltip=tips(sample="influence of", query="on", value=("influence", ".4g")),
            )
        )
        panels.append(chart.properties(width=side, height=side, title=alt.TitleParams(text=str(name), fontSize=12.5)))
    return styled(alt.hconcat(*panels).resolve_scale(color="independent").properties(title=titled(title, *subtitle)))


def sweep(frame: pl.DataFrame, title: str, *subtitle: str) -> Figure:
    """Draw the rank agreement of neighbouring learning rates, and the signal over the rounding error.

    Columns: optimizer, learning_rate, rank_agreement, signal_over_noise, is_plateau. Filled points are on the plateau.
    """
    x = alt.X("learning_rate:Q", scale=alt.Scale(type="log"), title="learning rate", axis=alt.Axis(format="~e"))
    names = frame["optimizer"].unique(maintain_order=True).to_list()
    colour = alt.Color("optimizer:N", scale=alt.Scale(domain=names, range=list(OTHERS[: len(names)])), title=None)
    filled = alt.Opacity("is_plateau:N", legend=None, scale=alt.Scale(domain=[True, False], range=[1, 0.35]))
    panels = []
    for column, name, scale in (
        ("rank_agreement", "rank agreement with the next rate", alt.Scale(domainMax=1)),
        ("signal_over_noise", "signal over rounding error", alt.Scale(type="log")),
    ):
        base = alt.Chart(data(frame.drop_nulls(column)))
        y = alt.Y(f"{column}:Q", scale=scale, title=None)
        tooltip = tips(learning_rate=("learning rate", ".3~e"), **{column: (name, ".3f")})
        panel = alt.layer(
            base.mark_line(opacity=0.5).encode(x=x, y=y, color=colour),
            base.mark_point(size=64, filled=True).encode(x=x, y=y, color=colour, opacity=filled, tooltip=tooltip),
        )
        text = alt.TitleParams(text=name, fontSize=12.5, offset=4)
        panels.append(panel.properties(width=WIDTH, height=HEIGHT // 2, title=text))
    return styled(alt.vconcat(*panels).resolve_scale(x="shared").properties(title=titled(title, *subtitle)))
