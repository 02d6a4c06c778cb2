"""An evaluation's chart: each method's mean with its 95% interval, a panel per measure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import altair as alt
import polars as pl

from lark_store.charts.style import OTHERS, QUIET, WIDTH, data, styled, tips, titled
from lark_store.evaluate.kinds import KINDS

if TYPE_CHECKING:
    from lark_store.charts.style import Figure

_ROW = 26  # pixels


def chart(kind: str, table: pl.DataFrame) -> Figure:
    """Draw an `Outcome` table: a point per method, a rule for its interval, a dashed line at no effect."""
    evaluation = KINDS[kind]
    x = alt.X("value:Q", title="mean over queries, 95% interval", scale=alt.Scale(zero=False))
    tooltip = tips(
        method="scores", value=("mean", ".3f"), low=("95% from", ".3f"), high=("to", ".3f"), n_queries="queries"
    )
    panels = []
    scores = table.filter(~pl.col("measure").str.ends_with("_seconds"))
    for (measure,), rows in scores.group_by("measure", maintain_order=True):
        base = alt.Chart(data(rows.with_columns(nothing=evaluation.no_effect)))
        y = alt.Y("method:N", sort=rows["method"].to_list(), title=None)
        panel = alt.layer(
            base.mark_rule(color=QUIET, strokeDash=[2, 3]).encode(x="nothing:Q"),
            base.mark_rule(strokeWidth=2, color=OTHERS[0]).encode(x="low:Q", x2="high:Q", y=y),
            base.mark_point(size=64, filled=True, opacity=1, color=OTHERS[0]).encode(x=x, y=y, tooltip=tooltip),
        )
        name = alt.TitleParams(text=str(measure), fontSize=12.5, offset=4)
        panels.append(panel.properties(width=WIDTH, height=_ROW * len(rows), title=name))
    return styled(
        alt.vconcat(*panels).resolve_scale(x="shared").properties(title=titled(evaluation.title, evaluation.meaning))
    )
