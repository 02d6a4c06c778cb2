"""The style of a study's charts: colours, fonts, axes, and shared marks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import altair as alt
import polars as pl

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lark_store.study.results import Results

# Okabe and Ito's palette, safe for colour-blind readers. Fine-tuning has the first colour, pretraining the others.
TUNING, OTHERS = "#D55E00", ("#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F6A00")
METHODS = {
    "LARK (cosine)": "#0072B2",
    "BM25": "#E69F00",
    "hybrid": "#009E73",
    "dot": "#CC79A7",
    "BM25 Okapi": "#7F6A00",
    "BM25+": "#D55E00",
    "whitened": "#56B4E9",
    "centred": "#1f2328",
}
METHOD_NAMES = {"cosine": "LARK (cosine)", "bm25": "BM25", "bm25-okapi": "BM25 Okapi", "bm25plus": "BM25+"}
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "stroke")
Figure = (
    alt.Chart | alt.LayerChart | alt.FacetChart | alt.HConcatChart | alt.VConcatChart
)  # `alt.layer` may return a facet

INK, QUIET, LINES = "#1f2328", "#57606a", "#d9dee3"
FONT = "Liberation Sans, Arial, Helvetica, sans-serif"
WIDTH, HEIGHT = 640, 300
DIGITS = 6  # significant digits in a chart's data

EPOCHS = "epoch of fine-tuning"
EPOCH = "isValid(datum.value) && datum.value === 0 ? 'base' : format(datum.value, '~g')"


def data(frame: pl.DataFrame) -> alt.InlineData:
    """Return a frame as a chart's data: numbers are rounded, non-finite ones are null."""
    floats = [pl.col(name) for name, kind in frame.schema.items() if kind.is_float()]
    finite = [pl.when(c.is_finite()).then(c.cast(pl.Float64).round_sig_figs(DIGITS)) for c in floats]
    rounded = frame.with_columns(value.alias(c.meta.output_name()) for value, c in zip(finite, floats, strict=True))
    return alt.InlineData(values=rounded.to_dicts())


def source_colours(results: Results) -> dict[str, str]:
    """Return each source's colour, the same in all charts."""
    names = [source.name for source in results.recipe.pretraining]
    colours = {name: OTHERS[i % len(OTHERS)] for i, name in enumerate(names)}
    return {results.recipe.tuning.name: TUNING} | colours


def method_colours(methods: Sequence[str]) -> dict[str, str]:
    """Return each method's colour by display name."""
    return {name: METHODS.get(name, QUIET) for name in dict.fromkeys(METHOD_NAMES.get(m, m) for m in methods)}


def tips(**titles: str | tuple[str, str]) -> list[alt.Tooltip]:
    """Return tooltips: field = title, or (title, number format)."""
    pairs = {field: (title, "") if isinstance(title, str) else title for field, title in titles.items()}
    return [
        alt.Tooltip(field=field, type="quantitative", title=title, format=form)
        if form
        else alt.Tooltip(field=field, type="nominal", title=title)
        for field, (title, form) in pairs.items()
    ]


def epoch_axis(results: Results) -> alt.X:
    """Return the axis of epochs: one tick per checkpoint, 0 for the base."""
    epochs = [float(e) for e in results.checkpoints["epoch"].unique().sort().drop_nulls()]
    domain = [min(epochs, default=0) - 0.4, max(epochs, default=0) + 0.4]
    scale = alt.Scale(domain=domain, nice=False, zero=False)
    axis = alt.Axis(values=epochs, labelExpr=EPOCH, grid=False)
    return alt.X("epoch:Q", title=EPOCHS, scale=scale, axis=axis)


def by_epoch(
    frame: pl.DataFrame,
    x: alt.X,
    y: alt.Y,
    colours: dict[str, str],
    tooltip: Sequence[alt.Tooltip],
    *,
    dashed: Sequence[str] = (),
) -> list[alt.Chart]:
    """Return the layers of a line chart over epochs: 95% band, line, points. Columns: series, epoch, y, low, high."""
    names = [name for name in colours if name in set(frame["series"])]
    scale = alt.Scale(domain=names, range=[colours[name] for name in names])
    places = list(dict.fromkeys(colours.values()))  # one colour, one shape
    shapes = alt.Scale(domain=names, range=[SHAPES[places.index(colours[name]) % len(SHAPES)] for name in names])
    dashes = alt.Scale(domain=names, range=[[5, 4] if name in dashed else [1, 0] for name in names])
    colour = alt.Color("series:N", scale=scale, title=None)
    base = alt.Chart(data(frame))
    is_line = frame["epoch"].n_unique() > 1
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


def rate_text(rate: float) -> str:
    """Format a learning rate: 2e-5."""
    mantissa, _, power = f"{rate:.1e}".partition("e")
    return f"{mantissa.removesuffix('.0')}e{int(power)}"


def bytes_text(n: float) -> str:
    """Format a number of bytes."""
    units = ("B", "kB", "MB", "GB", "TB", "PB")
    step = 0 if n < 1 else min(int(math.log10(n) // 3), len(units) - 1)
    return f"{n / 1000**step:.3g} {units[step]}"


def times_text(times: float) -> str:
    """Format a factor: 2,030×."""
    return f"{float(f'{times:.3g}'):,.10g}×"


def points_text(share: float, digits: int = 1) -> str:
    """Format a difference of shares in percentage points, with its sign."""
    number = f"{100 * share:+.{digits}f}"
    return number[1:] if float(number) == 0 else number.replace("-", "−")


def titled(text: str, *subtitle: str) -> alt.TitleParams:
    """Return a title with an optional subtitle."""
    return alt.TitleParams(text=text, subtitle=list(subtitle)) if subtitle else alt.TitleParams(text=text)


def styled(chart: Figure) -> Figure:
    """Return a chart in the common style: fonts, lines and spacing."""
    config: dict[str, Any] = {
        "font": FONT,
        "background": "white",
        "padding": 8,
        "view": {"stroke": None},
        "title": {
            "anchor": "start", "frame": "group", "fontSize": 15, "fontWeight": 600, "color": INK, "offset": 12,
            "subtitleFontSize": 12.5, "subtitleColor": QUIET, "subtitlePadding": 5, "subtitleLineHeight": 16,
        },
        "axis": {
            "labelFontSize": 12, "titleFontSize": 12.5, "titleFontWeight": "normal", "labelColor": INK,
            "titleColor": QUIET, "gridColor": LINES, "domainColor": LINES, "tickColor": LINES, "titlePadding": 8,
            "labelLimit": 240,
        },
        "legend": {
            "orient": "top", "labelFontSize": 12.5, "labelColor": INK, "labelLimit": 260, "titleFontSize": 12.5,
            "titleFontWeight": "normal", "titleColor": QUIET, "columnPadding": 18, "columns": 4, "symbolSize": 80,
            "symbolOpacity": 1, "offset": 10,
        },
        "text": {"color": INK},
    }  # fmt: skip
    return chart.properties(config=config)
