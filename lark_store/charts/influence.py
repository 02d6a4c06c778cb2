"""The influence of sources over checkpoints, with intervals."""

from __future__ import annotations

from typing import TYPE_CHECKING

import altair as alt
import polars as pl

from lark_store.charts.marks import lines_with_bands
from lark_store.charts.readable import readable
from lark_store.charts.style import HEIGHT, WIDTH, colours_of, styled, tips, titled
from lark_store.charts.trajectory import checkpoint_axis

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lark_store.charts.style import Figure


def source_influence(frame: pl.DataFrame, tuning: Sequence[str], subtitle: str) -> Figure:
    """Draw mean max influence at each checkpoint, a line per source and variant, and its 95% interval.

    Columns: those of `Store.metrics(view="influence")`. Sources in `tuning` have the colour of fine-tuning.
    """
    frame = readable(frame).with_columns(series=pl.format("{} · {}", "source", "variant"))
    of_tuning = frame.filter(pl.col("source").is_in(list(tuning)))["series"].to_list()
    colours = colours_of(frame["series"].unique(maintain_order=True).to_list(), of_tuning)
    x = checkpoint_axis(frame["checkpoint"].unique(maintain_order=True).to_list())
    y = alt.Y("mean_max_influence:Q", title="mean max influence", scale=alt.Scale(zero=False))
    tooltip = tips(
        series="source", checkpoint="checkpoint", mean_max_influence=("mean max influence", ".4f"),
        low=("95% from", ".4f"), high=("to", ".4f"), sketch_error=("sketch error", ".4f"), n_queries="queries",
    )  # fmt: skip
    layers = alt.layer(*lines_with_bands(frame, x, y, colours, tooltip))
    title = titled("Influence of sources", subtitle)
    return styled(layers.properties(width=WIDTH, height=HEIGHT, title=title))
