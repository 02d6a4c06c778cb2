"""Charts of facts over epochs: Kaplan–Meier curves with numbers at risk, hazard ratios, and recall."""

from __future__ import annotations

from typing import TYPE_CHECKING

import altair as alt
import polars as pl

from lark_store.charts.marks import lines_with_bands
from lark_store.charts.style import HEIGHT, OTHERS, QUIET, WIDTH, colours_of, data, styled, tips, titled

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lark_store.charts.style import Figure

_ROW = 22  # pixels of a group's numbers at risk, or of a hazard ratio


def survival_curves(curves: pl.DataFrame, at_risk: pl.DataFrame, event: str, *subtitle: str) -> Figure:
    """Draw the share of facts with the event over epochs, a step line per group with its 95% band.

    Columns of `curves`: group, time, survival, low, high, n_risk, n_events; of `at_risk`: group, time, n.
    """
    groups = curves["group"].unique(maintain_order=True).to_list()
    colours = colours_of(groups)
    colour = alt.Color("group:N", scale=alt.Scale(domain=groups, range=list(colours.values())), title=None)
    shown = curves.with_columns(share=1 - pl.col("survival"), above=1 - pl.col("low"), below=1 - pl.col("high"))
    last = float(curves["time"].max() or 1)  # type: ignore[arg-type]
    x = alt.X("time:Q", title="epochs since the baseline", scale=alt.Scale(domain=[0, last]))
    y = alt.Y("share:Q", title=f"share with {event}", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(format="%"))
    tooltip = tips(group="group", time=("epochs", ".4g"), share=("share", ".1%"), n_risk="at risk", n_events="events")
    base = alt.Chart(data(shown))
    band = base.mark_area(opacity=0.15, interpolate="step-after", aria=False)
    layers = alt.layer(
        band.encode(x=x, y=alt.Y("below:Q", title=y["title"]), y2="above:Q", color=colour),
        base.mark_line(strokeWidth=2, interpolate="step-after", aria=False).encode(x=x, y=y, color=colour),
        base.mark_point(size=30, filled=True, opacity=1).encode(x=x, y=y, color=colour, tooltip=tooltip),
    ).properties(width=WIDTH, height=HEIGHT)
    numbers = (
        alt.Chart(data(at_risk))
        .mark_text(fontSize=12)
        .encode(
            x=alt.X("time:Q", title=None, scale=alt.Scale(domain=[0, last]), axis=None),
            y=alt.Y(
                "group:N",
                title="at risk",
                sort=groups,
                axis=alt.Axis(ticks=False, domain=False, grid=False, labelPadding=16),
            ),
            text="n:Q",
            color=colour,
        )
        .properties(width=WIDTH, height=_ROW * len(groups))
    )
    return styled(alt.vconcat(layers, numbers, spacing=6).properties(title=titled(f"Facts with {event}", *subtitle)))


def hazard_ratios(effects: pl.DataFrame, event: str, *subtitle: str) -> Figure:
    """Draw the hazard ratio of each covariate with its 95% interval, on a logarithmic scale: a forest plot.

    Columns: covariate, hazard_ratio, low, high, p_value, and the same in discrete time as `discrete_…`.
    """
    models = {"Cox": "", "discrete time": "discrete_"}
    rows = pl.concat(
        effects.select(
            "covariate",
            model=pl.lit(model),
            ratio=f"{prefix}hazard_ratio",
            low=f"{prefix}low",
            high=f"{prefix}high",
            p=f"{prefix}p_value",
        )
        for model, prefix in models.items()
    ).drop_nulls(["ratio", "low", "high"])
    names = effects["covariate"].to_list()
    x = alt.X("ratio:Q", title=f"hazard ratio of {event}", scale=alt.Scale(type="log"))
    y = alt.Y("covariate:N", title=None, sort=names)
    offset = alt.YOffset("model:N", sort=list(models))
    colour = alt.Color("model:N", scale=alt.Scale(domain=list(models), range=list(OTHERS[:2])), title=None)
    tooltip = tips(
        covariate="covariate",
        model="model",
        ratio=("hazard ratio", ".3f"),
        low=("95% from", ".3f"),
        high=("to", ".3f"),
        p=("p-value", ".2g"),
    )
    base = alt.Chart(data(rows))
    none = alt.Chart(alt.InlineData(values=[{"one": 1}])).mark_rule(color=QUIET, strokeDash=[2, 3]).encode(x="one:Q")
    layers = alt.layer(
        none,
        base.mark_rule(strokeWidth=2).encode(
            x=alt.X("low:Q", title=x["title"]), x2="high:Q", y=y, yOffset=offset, color=colour
        ),
        base.mark_point(size=70, filled=True, opacity=1).encode(
            x=x, y=y, yOffset=offset, color=colour, tooltip=tooltip
        ),
    )
    size = {"width": WIDTH, "height": 2 * _ROW * max(1, len(names))}
    return styled(layers.properties(**size, title=titled(f"What predicts {event}", *subtitle)))


def recall(frame: pl.DataFrame, *subtitle: str) -> Figure:
    """Draw the share of facts with a correct greedy answer at each epoch, for seen and withheld facts.

    Columns: group, epoch, recall, low, high (95%), n, n_correct.
    """
    frame = frame.with_columns(series="group")
    colours = colours_of(_in_order(frame["series"], ("seen", "withheld")), ["seen"])
    x = alt.X("epoch:Q", title="epoch")
    y = alt.Y("recall:Q", title="greedy recall", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(format="%"))
    tooltip = tips(
        series="facts", epoch=("epoch", ".4g"), recall=("recall", ".1%"), n_correct="correct", n="of",
        low=("95% from", ".1%"), high=("to", ".1%"),
    )  # fmt: skip
    layers = alt.layer(*lines_with_bands(frame, x, y, colours, tooltip))
    return styled(layers.properties(width=WIDTH, height=HEIGHT, title=titled("Recall of facts over epochs", *subtitle)))


def _in_order(values: pl.Series, order: Sequence[str]) -> list[str]:
    present = values.unique(maintain_order=True).to_list()
    return [*(name for name in order if name in present), *(name for name in present if name not in order)]
