"""A query's influence or loss over checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

import altair as alt
import polars as pl

from lark_store.charts.marks import lines_with_bands
from lark_store.charts.readable import readable
from lark_store.charts.style import HEIGHT, WIDTH, colours_of, legend_of, styled, tips, titled

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lark_store.charts.style import Figure

_PANEL = 300  # pixels of a query's panel among others


def checkpoint_axis(checkpoints: Sequence[str]) -> alt.X:
    """Return the axis of checkpoints, in this order."""
    return alt.X("checkpoint:O", sort=list(checkpoints), title="checkpoint", axis=alt.Axis(labelAngle=0))


def influence_trajectory(frame: pl.DataFrame, colours: Mapping[str, str], title: str, *subtitle: str) -> Figure:
    """Draw a panel per query, with a line per group: its value at each checkpoint, in the order of the rows.

    Columns: query_id, checkpoint, series, value, noise (standard deviation from sketching, or null), n_samples.
    `colours` are those of some groups; the others get their own.
    """
    frame = readable(frame).with_columns(low=pl.col("value") - pl.col("noise"), high=pl.col("value") + pl.col("noise"))
    x = checkpoint_axis(frame["checkpoint"].unique(maintain_order=True).to_list())
    names = frame["series"].unique(maintain_order=True).to_list()
    own = colours_of([name for name in names if name not in colours])
    colours = {name: (own | dict(colours))[name] for name in names}
    y = alt.Y("value:Q", title="influence", scale=alt.Scale(zero=False))
    tooltip = tips(
        series="group", checkpoint="checkpoint", value=("influence", ".4f"), noise=("noise", ".4f"), n_samples="samples"
    )
    queries = frame["query_id"].unique(maintain_order=True).to_list()
    panels = []
    for query in queries:
        rows = frame.filter(query_id=query)
        layers = alt.layer(*lines_with_bands(rows, x, y, colours, tooltip))
        size = {"width": WIDTH, "height": HEIGHT} if len(queries) == 1 else {"width": _PANEL, "height": _PANEL * 2 // 3}
        panels.append(layers.properties(**size, title=alt.TitleParams(text=f"query {query}", fontSize=12.5, offset=4)))
    chart = panels[0] if len(panels) == 1 else alt.concat(*panels, columns=2).resolve_scale(color="shared")
    return styled(chart.properties(title=titled(title, *subtitle)), legend=legend_of(names))


def loss_trajectory(frame: pl.DataFrame, *subtitle: str) -> Figure:
    """Draw a line per query: its loss at each checkpoint. Columns: query_id, checkpoint, loss."""
    frame = readable(frame).with_columns(series="query_id", low="loss", high="loss")
    x = checkpoint_axis(frame["checkpoint"].unique(maintain_order=True).to_list())
    colours = colours_of(frame["series"].unique(maintain_order=True).to_list())
    y = alt.Y("loss:Q", title="loss (nats per target token)", scale=alt.Scale(zero=False))
    tooltip = tips(query_id="query", checkpoint="checkpoint", loss=("loss", ".4f"))
    layers = alt.layer(*lines_with_bands(frame, x, y, colours, tooltip))
    title = "Loss of queries over checkpoints"
    return styled(layers.properties(width=WIDTH, height=HEIGHT, title=titled(title, *subtitle)))
