"""Fine-tuning against pretraining, query by query."""

from __future__ import annotations

from typing import TYPE_CHECKING

import altair as alt

from lark_store.charts.readable import readable
from lark_store.charts.style import OTHERS, QUIET, TUNING, data, styled, tips, titled

if TYPE_CHECKING:
    import polars as pl

    from lark_store.charts.style import Figure

_SIDE = 300  # pixels
_WINNERS = {"finetune": TUNING, "pretrain": OTHERS[0], "tie": QUIET}


def dominance(frame: pl.DataFrame, subtitle: str) -> Figure:
    """Draw a point per query: Φ of pretraining and of fine-tuning; a panel per pair of groups, with its FT wins.

    Columns: those of `Store.ft_pt`.
    """
    frame = readable(frame)
    values = [*frame["ft"], *frame["pt"]]
    margin = 0.05 * (max(values) - min(values)) or 0.05
    ends = [min(values) - margin, max(values) + margin]
    scale = alt.Scale(domain=ends, nice=False, zero=False)
    colours = alt.Scale(domain=list(_WINNERS), range=list(_WINNERS.values()))
    tooltip = tips(query_id="query", ft=("Φ(ft)", ".4f"), pt=("Φ(pt)", ".4f"), ratio=("FT/PT", ".3f"), winner="closer")
    line = alt.Chart(alt.InlineData(values=[{"pt": end, "ft": end} for end in ends]))
    x, y = alt.X("pt:Q", title="Φ(pretraining)", scale=scale), alt.Y("ft:Q", title="Φ(fine-tuning)", scale=scale)
    panels = []
    keys = ["source", "variant", "against_source", "against_variant"]
    for key, rows in frame.group_by(keys, maintain_order=True):
        source, variant, against, against_variant = map(str, key)
        points = alt.Chart(data(rows)).mark_point(size=56, filled=True, opacity=0.75)
        colour = alt.Color("winner:N", scale=colours, title="closer:")
        panel = alt.layer(
            line.mark_line(color=QUIET, strokeDash=[2, 3]).encode(x=x, y=y),
            points.encode(x=x, y=y, color=colour, tooltip=tooltip),
        )
        wins = (rows["winner"] == "finetune").sum()
        share = f"FT wins {wins / len(rows):.1%} ({wins:,} of {len(rows):,})"
        pair = f"{source} · {variant} against {against} · {against_variant}"
        title = alt.TitleParams(text=[pair, share], fontSize=12.5, offset=4)
        panels.append(panel.properties(width=_SIDE, height=_SIDE, title=title))
    chart = alt.concat(*panels, columns=2)
    heading = "Fine-tuning against pretraining"
    return styled(chart.properties(title=titled(heading, subtitle, "above the line, fine-tuning is closer")))
