"""A study's charts: pure functions of its frames. The first five are the reference experiment's figures 2 to 6.

Figures without data are omitted. The base checkpoint is epoch 0.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import altair as alt
import polars as pl

from lark_store.charts import files
from lark_store.charts.files import HOVER
from lark_store.charts.marks import lines_with_bands, zero
from lark_store.charts.numbers import bytes_text, points_text, rate_text, times_text
from lark_store.charts.style import (
    HEIGHT,
    INK,
    METHOD_NAMES,
    OTHERS,
    QUIET,
    TUNING,
    WIDTH,
    data,
    method_colours,
    styled,
    tips,
    titled,
)
from lark_store.study.chart_style import EPOCH, EPOCHS, epoch_axis, source_colours
from lark_store.study.results import PLAIN

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lark_store.charts.style import Figure
    from lark_store.study.results import Results

TWO_LINES = "split(datum.label, ' · ')"
_INTERVAL: dict[str, str | tuple[str, str]] = {"low": ("95% from", ".3f"), "high": ("to", ".3f")}


def figures(results: Results) -> dict[str, Figure]:
    """Return the charts by name, in reading order."""
    drawn = {name: draw(results) for name, draw in _FIGURES.items()}
    return {name: styled(chart) for name, chart in drawn.items() if chart is not None}


def save(charts: dict[str, Figure], folder: Path) -> list[Path]:
    """Write each chart as NAME.png (at double size) and NAME.svg, remove outdated charts, and return the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in _FIGURES.keys() - charts.keys():
        for kind in ("png", "svg"):
            (folder / f"{name}.{kind}").unlink(missing_ok=True)
    return [path for name, chart in charts.items() for path in files.save(chart, folder, name, ("png", "svg"))]


def _influence(results: Results, *, plain: bool) -> Figure | None:
    """Draw mean max influence by epoch: a line per source, fine-tuning included, as `raw` or in its main variant."""
    tuning = results.recipe.tuning.name
    is_own = pl.col("variant") == PLAIN if plain else _in_main_variant(results)
    frame = results.influence.filter(is_own).with_columns(series="source")
    kinds = ", ".join(frame["variant"].unique().sort())
    if frame.is_empty() or (plain and set(frame["source"]) == {tuning}):
        return None
    colours, dashed = source_colours(results), []
    if tuning not in set(frame["source"]):
        dashed = [f"{tuning} ({results.recipe.tuning.variant}, for reference)"]
        rest = results.influence.filter(source=tuning, variant=results.recipe.tuning.variant)
        frame = pl.concat([frame, rest.with_columns(series=pl.lit(dashed[0]))])
        colours = colours | {dashed[0]: colours[tuning]}
    y = alt.Y("mean_max_influence:Q", title="mean max influence (cosine)", scale=alt.Scale(zero=False))
    tooltip = tips(
        source="source", variant="format", checkpoint="checkpoint", mean_max_influence=("mean max influence", ".4f"),
        low=("95% from", ".4f"), high=("to", ".4f"), n_queries="queries",
    )  # fmt: skip
    layers = lines_with_bands(frame, epoch_axis(results), y, colours, tooltip, dashed=dashed)
    heading = f"Influence of {'raw ' if plain else ''}sources"
    subtitle = f"{kinds}: mean over queries of the highest cosine in a source; bands are 95% intervals"
    return alt.layer(*layers).properties(width=WIDTH, height=HEIGHT, title=titled(heading, subtitle))


def _in_main_variant(results: Results) -> pl.Expr:
    """Select rows in the main variant of their source."""
    return pl.col("variant") == pl.col("source").replace_strict(results.recipe.shown_as)


def _slow_spans(results: Results) -> pl.DataFrame:
    """Return the spans of epochs with a learning rate below the first epoch's: start, end, label."""
    rates = results.checkpoints.filter(pl.col("epoch") > 0, pl.col("learning_rate").is_not_null()).sort("epoch")
    schema = {"start": pl.Float64, "end": pl.Float64, "label": pl.String}
    if not len(rates):
        return pl.DataFrame(schema=schema)
    first = rates["learning_rate"][0]
    runs = rates.with_columns(slow=pl.col("learning_rate") < first).with_columns(run=pl.col("slow").rle_id())
    spans = []
    for _, run in runs.filter("slow").group_by("run", maintain_order=True):
        ends = max(run["epoch"]) + (0.4 if max(run["epoch"]) == max(rates["epoch"]) else 0.5)
        rates_text = " to ".join(dict.fromkeys(rate_text(rate) for rate in run["learning_rate"]))
        spans.append({"start": min(run["epoch"]) - 0.5, "end": ends, "label": f"learning rate {rates_text}"})
    return pl.DataFrame(spans, schema=schema)


def _pt_wins(results: Results) -> Figure | None:
    """Draw the share of queries closer to pretraining, and mark the epochs of a lower learning rate."""
    frame = results.dominance.filter(_in_main_variant(results)).with_columns(
        series="source", low="pt_wins_low", high="pt_wins_high"
    )
    if not len(frame):
        return None
    x = epoch_axis(results)
    axis = alt.Axis(format="%", values=[0, 0.25, 0.5, 0.75, 1])
    scale = alt.Scale(domain=[0, 1.12], nice=False)
    y = alt.Y("pt_wins:Q", title="PT wins (share of queries)", scale=scale, axis=axis)
    spans = alt.Chart(data(_slow_spans(results)))
    start = alt.X("start:Q", title=EPOCHS)
    band = spans.mark_rect(color="#8a8f98", opacity=0.16).encode(x=start, x2="end:Q", tooltip=tips(label="span"))
    words = spans.mark_text(align="right", baseline="top", dx=-6, dy=5, fontSize=12, color=QUIET)
    label = words.encode(x=alt.X("end:Q", title=EPOCHS), y=alt.value(0), text="label:N")
    tooltip = tips(
        source="pretraining source", checkpoint="checkpoint", pt_wins=("PT wins", ".1%"), low=("95% from", ".1%"),
        high=("to", ".1%"), learning_rate=("learning rate", "~g"), n_queries="queries",
    )  # fmt: skip
    half = alt.Chart(alt.InlineData(values=[{"y": 0.5}])).mark_rule(color=QUIET, strokeDash=[2, 3]).encode(y="y:Q")
    layers = lines_with_bands(frame, x, y, source_colours(results), tooltip)
    title = titled(
        "How often pretraining is closer than fine-tuning",
        f"share of queries with Φ(pt) > Φ(ft); {', '.join(frame['variant'].unique().sort())}",
    )
    return alt.layer(band, half, *layers, label).properties(width=WIDTH, height=HEIGHT, title=title)


def _storage(results: Results) -> Figure | None:
    """Draw bytes per sample on a logarithmic axis, with each row's name above its dot."""
    frame = results.storage.filter(pl.col("bytes_per_sample") > 0)
    if not len(frame):
        return None
    sizes = frame["bytes_per_sample"].to_list()
    times = frame["times_smaller"].fill_null(1).to_list()
    factors = [f" ({times_text(t)})" if t > 1 else "" for t in times]
    frame = frame.with_columns(
        size=pl.Series([bytes_text(n) + words for n, words in zip(sizes, factors, strict=True)]),
        kind=pl.when("measured").then(pl.lit("measured on disk")).otherwise(pl.lit("computed")),
    ).with_columns(row=pl.format("{}, {}: {}", "what", "model", "size"))
    low, high = math.floor(math.log10(min(sizes)) - 0.3), math.ceil(math.log10(max(sizes)) + 0.1)
    ticks = [10.0**n for n in range(low, high + 1, 2)]
    scale = alt.Scale(type="log", domain=[10.0**low, 10.0**high], nice=False)
    axis = alt.Axis(values=ticks, labelExpr="format(datum.value, '~s') + 'B'")
    x = alt.X("bytes_per_sample:Q", title="bytes per sample (logarithmic)", scale=scale, axis=axis)
    y = alt.Y("row:N", sort=None, axis=None)
    tooltip = tips(
        what="what", model="model", size="per sample", kind="how", n_samples=("samples", ","), bytes=("bytes, all", ",")
    )
    base = alt.Chart(data(frame))
    colours = alt.Scale(domain=["measured on disk", "computed"], range=[OTHERS[0], QUIET])
    colour = alt.Color("kind:N", scale=colours, title=None)
    rows = base.mark_rule(color="#d9dee3", strokeWidth=2).encode(x=x, x2=alt.value(0), y=y)
    dots = base.mark_point(filled=True, size=110, opacity=1).encode(x=x, y=y, color=colour, tooltip=tooltip)
    name = base.mark_text(align="left", dy=-15, fontSize=12.5).encode(x=alt.value(2), y=y, text="row:N")
    title = titled("Storage per sample", "sketches against full gradients; × is how many times larger")
    return alt.layer(rows, dots, name).properties(width=WIDTH, height=46 * len(frame), title=title)


def _methods_long(results: Results) -> pl.DataFrame:
    """Return Table IV's rows as bars: group, method, wins; baselines also have the difference's text and interval."""
    table = results.methods
    rows_at_epoch = table.filter(epoch=results.recipe.epoch)
    rows_at_epoch = rows_at_epoch if len(rows_at_epoch) else table.filter(pl.col("epoch") == pl.col("epoch").max())
    rows_at_epoch = rows_at_epoch.with_columns(pl.format("{} · {}", "source", "variant").alias("group"))
    rows = []
    for key, rows_of in rows_at_epoch.group_by("group", maintain_order=True):
        first = rows_of.row(0, named=True)
        ours = {"group": key[0], "method": METHOD_NAMES["cosine"], "n": first["n_queries"]}
        rows.append(ours | {"wins": first["ft_wins"]})
        for row in rows_of.iter_rows(named=True):
            difference, low, high = (points_text(row[name]) for name in ("difference", "low", "high"))
            name = METHOD_NAMES.get(row["method"], row["method"])
            baseline = {"group": key[0], "method": name, "n": row["n_queries"]}
            edges = {"low": max(row["ft_wins"] - row["high"], 0), "high": min(row["ft_wins"] - row["low"], 1)}
            words = f"{difference} points\n[{low}, {high}]"
            rows.append(baseline | edges | {"wins": row["rival_ft_wins"], "words": words})
    floats = dict.fromkeys(("wins", "low", "high"), pl.Float64)
    return pl.DataFrame(
        rows, schema={"group": pl.String, "method": pl.String, **floats, "n": pl.Int64, "words": pl.String}
    )


def _methods(results: Results) -> Figure | None:
    """Draw FT wins by LARK's cosine and by each baseline, side by side per pretraining group."""
    frame = _methods_long(results) if len(results.methods) else results.methods
    if not len(frame):
        return None
    names = list(dict.fromkeys(frame["method"]))
    colours = method_colours(names)
    scale = alt.Scale(domain=names, range=list(colours.values()))
    domain = alt.Scale(domain=[0, 1.5], nice=False)
    axis = alt.Axis(values=[0, 0.25, 0.5, 0.75, 1], format="%")
    x = alt.X("wins:Q", title="FT wins (share of queries)", scale=domain, axis=axis)
    y = alt.Y(
        "group:N",
        sort=None,
        title=None,
        axis=alt.Axis(labelExpr=TWO_LINES, ticks=False, labelOffset=-6),
    )
    offset = alt.YOffset("method:N", sort=names)
    tooltip = tips(group="against", method="method", wins=("FT wins", ".1%"), words="LARK minus baseline", n="queries")
    base = alt.Chart(data(frame))
    bars = base.mark_bar(height=22).encode(
        x=x, y=y, yOffset=offset, color=alt.Color("method:N", scale=scale, title=None), tooltip=tooltip
    )
    edges = (
        base.mark_rule(strokeWidth=2, color=INK)
        .transform_filter("isValid(datum.words)")
        .encode(x=alt.X("low:Q"), x2="high:Q", y=y, yOffset=offset)
    )
    baselines = base.transform_filter("isValid(datum.words)")
    words = baselines.mark_text(align="left", lineBreak="\n", dy=-7, fontSize=11.5, lineHeight=13)
    text = words.encode(x=alt.XDatum(1.03), y=y, yOffset=offset, text="words:N")
    title = titled(
        "LARK's attribution against other methods",
        "right: LARK minus the baseline, percentage points [95%];",
        "the line on a baseline's bar is this interval, subtracted from LARK's share",
    )
    return alt.layer(bars, edges, text).properties(width=WIDTH, height=46 * len(frame), title=title)


def _trajectories(results: Results) -> Figure | None:
    """Draw Φ(ft) − Φ(pt) of each query over epochs, and the median; unlike the ratio, it is always defined."""
    frame = results.queries.filter(pl.col("ft").is_not_null(), pl.col("pt").is_not_null())
    if not len(frame):
        return None
    frame = frame.select("query_id", "epoch", "ft", "pt", gap=pl.col("ft") - pl.col("pt"))
    last = frame.filter(pl.col("epoch") == pl.col("epoch").max()).select(
        "query_id", closer=pl.when(pl.col("gap") >= 0).then(pl.lit("fine-tuning")).otherwise(pl.lit("pretraining"))
    )
    frame = frame.join(last, on="query_id", how="left", maintain_order="left")
    median = frame.group_by("epoch").agg(pl.median("gap"), queries=pl.len()).sort("epoch")
    x, y = epoch_axis(results), alt.Y("gap:Q", title="Φ(ft) − Φ(pt) (cosine)")
    colours = alt.Scale(domain=["fine-tuning", "pretraining"], range=[TUNING, OTHERS[0]])
    hover = alt.selection_point(
        name="query", fields=["query_id"], on="pointerover", nearest=True, empty=False, clear="pointerout"
    )
    base = alt.Chart(data(frame)).encode(x=x, y=y, detail="query_id:N")
    thin = base.mark_line(aria=False).encode(
        color=alt.Color("closer:N", scale=colours, title="closer at the last epoch:"),
        opacity=alt.when(hover).then(alt.value(1)).otherwise(alt.value(min(max(20 / len(last), 0.12), 0.45))),
        strokeWidth=alt.when(hover).then(alt.value(3)).otherwise(alt.value(1)),
    )
    tooltip = tips(
        query_id="query", epoch=("epoch", "~g"), ft=("Φ(ft)", ".4f"), pt=("Φ(pt)", ".4f"), gap=("difference", "+.4f")
    )
    dots = (
        base.mark_point(opacity=0, size=30, aria=False).encode(tooltip=tooltip).properties(name=HOVER).add_params(hover)
    )
    middle = alt.Chart(data(median)).mark_line(color=INK, strokeWidth=3, point=alt.OverlayMarkDef(color=INK, size=60))
    line = middle.encode(x=x, y=y, tooltip=tips(epoch=("epoch", "~g"), gap=("median", "+.4f"), queries="queries"))
    source = results.recipe.against
    undefined = len(results.queries.filter(pl.col("pt") <= 0))
    pt = f"{source}, {results.recipe.shown_as[source]}"
    subtitle = f"pt is {pt}; above 0, fine-tuning is closer; the heavy line is the median;"
    reason = f"a difference, because the ratio is undefined where Φ(pt) ≤ 0 ({undefined:,} of {len(frame):,} points)"
    title = titled("Fine-tuning minus pretraining, query by query", subtitle, reason)
    return alt.layer(zero(), thin, line, dots).properties(width=WIDTH, height=HEIGHT + 40, title=title)


def _heatmap(results: Results) -> Figure | None:
    """Draw mean max influence of each source and variant at each epoch."""
    frame = results.influence.filter(pl.col("mean_max_influence").is_not_nan())
    if not len(frame):
        return None
    frame = frame.with_columns(group=pl.format("{} · {}", "source", "variant"))
    most = frame["mean_max_influence"].abs().max() or 1.0
    assert isinstance(most, float)
    order = [source.name for source in (results.recipe.tuning, *results.recipe.pretraining)]
    rows = sorted(set(frame.select("group", "source", "variant").iter_rows()), key=lambda r: (order.index(r[1]), r[2]))
    x = alt.X("epoch:O", title=EPOCHS, axis=alt.Axis(labelAngle=0, labelExpr=EPOCH, ticks=False))
    labels = alt.Axis(labelExpr=TWO_LINES, ticks=False, labelOffset=-6)
    y = alt.Y("group:N", sort=[row[0] for row in rows], title=None, axis=labels)
    scale = alt.Scale(domain=[-most, 0, most], range=[OTHERS[0], "#f6f6f6", TUNING], interpolate="rgb")
    legend = alt.Legend(title="mean max influence (cosine)", format=".2f", gradientLength=180, tickCount=3)
    tooltip = tips(
        source="source", variant="format", checkpoint="checkpoint", mean_max_influence=("mean max influence", ".4f"),
        **_INTERVAL, n_queries="queries",
    )  # fmt: skip
    base = alt.Chart(data(frame)).encode(x=x, y=y)
    cells = base.mark_rect(stroke="white", strokeWidth=2).encode(
        color=alt.Color("mean_max_influence:Q", scale=scale, legend=legend), tooltip=tooltip
    )
    ink = (
        alt.when(f"abs(datum.mean_max_influence) > {0.75 * most:.6g}")
        .then(alt.value("white"))
        .otherwise(alt.value(INK))
    )
    text = base.mark_text(fontSize=12).encode(text=alt.Text("mean_max_influence:Q", format=".3f"), color=ink)
    title = titled("Every source at every epoch", "mean max influence; the palest colour is 0")
    return alt.layer(cells, text).properties(width=WIDTH, height=38 * len(rows), title=title)


def _truth(results: Results) -> Figure | None:
    """Draw how well each method finds the samples stating the answer: reciprocal rank and recall, side by side."""
    if not len(results.truth):
        return None
    truth = results.truth.with_columns(series=pl.col("method").replace(METHOD_NAMES))
    colours = method_colours(results.truth["method"].to_list())
    panels = []
    for field, low, high, title in (
        ("mrr", "mrr_low", "mrr_high", "mean reciprocal rank"),
        ("recall_at_10", "recall_low", "recall_high", "recall@10"),
    ):
        frame = truth.with_columns(low=low, high=high)
        y = alt.Y(f"{field}:Q", title=title, scale=alt.Scale(domain=[0, 1]))
        titles: dict[str, str | tuple[str, str]] = {"method": "method", "checkpoint": "checkpoint"}
        tooltip = tips(**titles, **{field: (title, ".3f")}, **_INTERVAL, n_queries="queries", n_samples="samples")
        layers = lines_with_bands(frame, epoch_axis(results), y, colours, tooltip)
        panels.append(alt.layer(*layers).properties(width=270, height=260))
    heading: Any = titled(
        "Finding the samples stating the answer", "1 is perfect; bands are 95% intervals over queries"
    )
    return alt.hconcat(*panels).properties(title=heading)


_FIGURES: dict[str, Callable[[Results], Figure | None]] = {
    "influence": lambda results: _influence(results, plain=False),
    "influence-raw": lambda results: _influence(results, plain=True),
    "pt-wins": _pt_wins,
    "storage": _storage,
    "methods": _methods,
    "trajectories": _trajectories,
    "heatmap": _heatmap,
    "truth": _truth,
}
