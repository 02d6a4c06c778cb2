"""The style of charts: colours, fonts, tooltips and titles."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import altair as alt
import polars as pl

from lark_store.charts.readable import readable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

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
Figure = alt.Chart | alt.LayerChart | alt.FacetChart | alt.ConcatChart | alt.HConcatChart | alt.VConcatChart

INK, QUIET, LINES = "#1f2328", "#57606a", "#d9dee3"
FONT = "Liberation Sans, Arial, Helvetica, sans-serif"
WIDTH, HEIGHT = 640, 300
_COLUMNS, _LABEL = 4, 260  # of a legend; pixels
_LETTER, _SYMBOL = 7, 40  # pixels of a label's letter on average, and of its symbol with its distance
DIGITS = 6  # significant digits in a chart's data


def data(frame: pl.DataFrame) -> alt.InlineData:
    """Return a frame as a chart's data: rounded numbers, null for non-finite ones, and readable texts."""
    frame = readable(frame)
    floats = [pl.col(name) for name, kind in frame.schema.items() if kind.is_float()]
    finite = [pl.when(c.is_finite()).then(c.cast(pl.Float64).round_sig_figs(DIGITS)) for c in floats]
    rounded = frame.with_columns(value.alias(c.meta.output_name()) for value, c in zip(finite, floats, strict=True))
    return alt.InlineData(values=rounded.to_dicts())


def colours_of(names: Sequence[str], tuning: Sequence[str] = ()) -> dict[str, str]:
    """Return a colour for each name; the first of the `tuning` names has the one of fine-tuning."""
    first = next((name for name in names if name in tuning), None)
    others = [name for name in names if name != first]
    own = {} if first is None else {first: TUNING}
    return own | {name: OTHERS[i % len(OTHERS)] for i, name in enumerate(others)}


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


def titled(text: str, *subtitle: str) -> alt.TitleParams:
    """Return a title with an optional subtitle."""
    return alt.TitleParams(text=text, subtitle=list(subtitle)) if subtitle else alt.TitleParams(text=text)


def legend_of(names: Sequence[str]) -> dict[str, int]:
    """Return the settings of a legend at the top: as many columns as these names leave room for."""
    longest = max(map(len, names), default=0)
    columns = max(1, min(_COLUMNS, WIDTH // (_LETTER * longest + _SYMBOL)))
    return {"columns": columns, "labelLimit": max(_LABEL, WIDTH // columns - _SYMBOL)}


def styled(chart: Figure, legend: Mapping[str, int] = MappingProxyType({})) -> Figure:
    """Return a chart in the common style: fonts, lines and spacing; `legend` has own settings of its legend."""
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
            "orient": "top", "labelFontSize": 12.5, "labelColor": INK, "labelLimit": _LABEL, "titleFontSize": 12.5,
            "titleFontWeight": "normal", "titleColor": QUIET, "columnPadding": 18, "columns": _COLUMNS,
            "symbolSize": 80, "symbolOpacity": 1, "offset": 10, **legend,
        },
        "text": {"color": INK},
    }  # fmt: skip
    return chart.properties(config=config)
