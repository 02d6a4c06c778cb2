"""An evaluation's chart: each method's mean with its 95% interval, a panel per measure."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import altair as alt
import vl_convert

from lark_store.study.figures import still, svg
from lark_store.study.files import writing
from lark_store.study.style import OTHERS, QUIET, WIDTH, data, styled, tips, titled

if TYPE_CHECKING:
    from pathlib import Path

    import polars as pl

    from lark_store.study.style import Figure

_TITLES = {
    "lds": (
        "Retraining on half the samples",
        "rank correlation of summed scores with what retraining does to the loss",
    ),
    "facts": ("Finding a query's own samples", "mean over queries"),
    "causal": ("One real optimizer step", "agreement with the fall of each query's loss after a step on one sample"),
    "tail-patch": ("One step on the top samples", "change of the answer's log-probability, in nats"),
    "format": ("What a score tells apart", "AUC; for the format .5 is no effect"),
    "spearman": ("Agreement with the reference", "mean rank correlation over queries"),
}
_NOTHING = {"format": 0.5}
_ROW = 26  # pixels


def chart(kind: str, table: pl.DataFrame) -> Figure:
    """Draw a table of `Outcome`: a point per method, a rule for its interval, a dashed line where nothing is."""
    title, under = _TITLES[kind]
    x = alt.X("value:Q", title="mean over queries, 95% interval", scale=alt.Scale(zero=False))
    shown = tips(
        method="scores", value=("mean", ".3f"), low=("95% from", ".3f"), high=("to", ".3f"), n_queries="queries"
    )
    panels = []
    for (measure,), rows in table.group_by("measure", maintain_order=True):
        base = alt.Chart(data(rows.with_columns(nothing=_NOTHING.get(kind, 0.0))))
        y = alt.Y("method:N", sort=rows["method"].to_list(), title=None)
        panel = alt.layer(
            base.mark_rule(color=QUIET, strokeDash=[2, 3]).encode(x="nothing:Q"),
            base.mark_rule(strokeWidth=2, color=OTHERS[0]).encode(x="low:Q", x2="high:Q", y=y),
            base.mark_point(size=64, filled=True, opacity=1, color=OTHERS[0]).encode(x=x, y=y, tooltip=shown),
        )
        name = alt.TitleParams(text=str(measure), fontSize=12.5, offset=4)
        panels.append(panel.properties(width=WIDTH, height=_ROW * len(rows), title=name))
    return styled(alt.vconcat(*panels).resolve_scale(x="shared").properties(title=titled(title, under)))


def save(drawn: Figure, folder: Path, name: str) -> list[Path]:
    """Write a chart as NAME.svg, NAME.png (twice its size) and NAME.html, which needs nothing else."""
    spec: dict[str, Any] = drawn.to_dict()
    made = {
        "svg": svg(spec, name).encode(),
        "png": vl_convert.vegalite_to_png(still(spec), scale=2),
        "html": vl_convert.vegalite_to_html(json.dumps(spec), bundle=True).encode(),
    }
    written = []
    for kind, content in made.items():
        with writing(folder / f"{name}.{kind}") as draft:
            draft.write_bytes(content)
        written.append(folder / f"{name}.{kind}")
    return written
