"""The samples with the most influence on a query, and its scores of all samples."""

from __future__ import annotations

from typing import TYPE_CHECKING

import altair as alt
import numpy as np
import polars as pl

from lark_store.charts.readable import readable
from lark_store.charts.style import HEIGHT, INK, QUIET, WIDTH, data, styled, tips, titled

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from lark_store.charts.style import Figure

_ROW = 22  # pixels
_BINS = 60
_LONGEST = 300  # characters of a text in a tooltip


def hits_chart(frame: pl.DataFrame, colours: Mapping[str, str], title: str, *subtitle: str) -> Figure:
    """Draw a bar per sample, the highest score first; whiskers are ± the noise, one standard deviation.

    Columns: score, noise (or null), source, variant, sample_id, text. `colours` are those of the
    sources.
    """
    frame = readable(_marked(frame)).sort("score", descending=True, maintain_order=True)
    frame = frame.with_columns(low=pl.col("score") - pl.col("noise"), high=pl.col("score") + pl.col("noise"))
    base = alt.Chart(data(frame))
    y = alt.Y("sample:N", sort=frame["sample"].to_list(), title=None)
    x = alt.X("score:Q", title="influence")
    scale = _source_scale(frame, colours)
    tooltip = tips(sample="sample", score=("score", ".4f"), noise=("noise", ".4f"), text="text")
    whiskers = base.transform_filter("isValid(datum.noise)").mark_rule(strokeWidth=1.5, color=INK)
    layers = alt.layer(
        base.mark_bar(height=_ROW - 8).encode(
            x=x, y=y, color=alt.Color("source:N", scale=scale, title=None), tooltip=tooltip
        ),
        whiskers.encode(x="low:Q", x2="high:Q", y=y),
    )
    return styled(layers.properties(width=WIDTH, height=_ROW * len(frame), title=titled(title, *subtitle)))


def _marked(frame: pl.DataFrame) -> pl.DataFrame:
    """Return hits with `sample`, a name of their own, and shortened texts."""
    is_twice = frame.select("source", "sample_id").is_duplicated()
    variant = pl.when(is_twice).then(pl.format(" · {}", "variant")).otherwise(pl.lit(""))
    return frame.select(
        "score",
        "noise",
        "source",
        sample=pl.format("{}/{}{}", "source", "sample_id", variant),
        text=pl.col("text").str.slice(0, _LONGEST),
    )


def _source_scale(frame: pl.DataFrame, colours: Mapping[str, str]) -> alt.Scale:
    names = [name for name in colours if name in set(frame["source"])]
    return alt.Scale(domain=names, range=[colours[name] for name in names])


def histogram(
    scores_N: NDArray[np.float32], top: pl.DataFrame, colours: Mapping[str, str], title: str, *subtitle: str
) -> Figure:
    """Draw the distribution of scores, and mark hits: columns score, source, variant, sample_id, text."""
    counts, edges = np.histogram(scores_N.astype(np.float64), bins=_BINS)
    bars = pl.DataFrame({"low": edges[:-1], "high": edges[1:], "n": counts, "none": 0}).filter(pl.col("n") > 0)
    base = alt.Chart(data(bars)).mark_rect(color=QUIET, opacity=0.55)
    count = alt.Y("n:Q", title="samples", scale=alt.Scale(type="symlog"))
    shape = base.encode(
        x=alt.X("low:Q", title="influence"),
        x2="high:Q",
        y=count,
        y2="none:Q",
        tooltip=tips(low=("from", ".4f"), high=("to", ".4f"), n="samples"),
    )
    marked = readable(_marked(top))
    marks = alt.Chart(data(marked)).mark_tick(thickness=2, height=28, yOffset=-14)
    colour = alt.Color("source:N", scale=_source_scale(marked, colours), title="hits:")
    tooltip = tips(sample="sample", score=("score", ".4f"), text="text")
    ticks = marks.encode(x="score:Q", y=alt.value(HEIGHT), color=colour, tooltip=tooltip)
    return styled(alt.layer(shape, ticks).properties(width=WIDTH, height=HEIGHT, title=titled(title, *subtitle)))
