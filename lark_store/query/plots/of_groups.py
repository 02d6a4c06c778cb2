"""`trajectory` and `heatmap`: groups of samples over checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from lark_store.core.text import coded, joined
from lark_store.errors import InputError
from lark_store.query.plots.base import GROUPS, Asked, Plot
from lark_store.specs import build

if TYPE_CHECKING:
    import polars as pl

    from lark_store.charts.style import Figure
    from lark_store.query.answers.groups import Grouped, Scored

_MOST_QUERIES = 12
_MEASURES = ("influence", "loss")


class Trajectory(Plot):
    """Groups, or losses, over checkpoints."""

    name: ClassVar[str] = "trajectory"
    meaning: ClassVar[str] = "influence on queries, or their loss, over checkpoints"
    uses: ClassVar[frozenset[str]] = GROUPS | {"measure"}

    def draw(self, asked: Asked) -> tuple[Figure, list[str]]:
        """Return the chart, and notes for the reader."""
        measure = asked.show.measure
        if measure not in _MEASURES:
            raise InputError(f"a trajectory shows no `{measure}`", f"`--measure` is {joined(coded(_MEASURES), 'or')}")
        if not 1 <= len(asked.queries) <= _MOST_QUERIES:
            n = len(asked.queries)
            fact = "no query is given" if not n else f"{n} queries are too many for one plot"
            raise InputError(fact, f"give the ids of 1 to {_MOST_QUERIES} queries")
        asked = asked.at_all_checkpoints()
        return _losses(asked) if measure == "loss" else _influences(asked)


class Heatmap(Plot):
    """Groups × checkpoints, over all queries or some."""

    name: ClassVar[str] = "heatmap"
    meaning: ClassVar[str] = "influence of sources, or of any key's values, at each checkpoint"
    uses: ClassVar[frozenset[str]] = GROUPS

    def draw(self, asked: Asked) -> tuple[Figure, list[str]]:
        """Return the chart, and notes for the reader."""
        import polars as pl

        from lark_store.charts.heatmap import heatmap
        from lark_store.query.answers.groups import groups

        asked = asked.at_all_checkpoints()
        grouped = _grouped(asked)
        frame = groups(asked.db, asked.queries or None, asked.search, grouped)
        notes = frame["note"].drop_nulls().unique(maintain_order=True).to_list()
        frame = _one_source_of_queries(frame)
        first, *second = grouped.by
        label = pl.col("group_name").fill_null(f"(no {first})")
        if second:
            label = pl.format("{} · {}", label, pl.col("subgroup_name").fill_null(f"(no {second[0]})"))
        n = frame["n_queries"][0]
        of = f"query {frame['query_id'][0]}" if n == 1 else f"mean over {n:,} queries of `{frame['queries'][0]}`"
        subtitle = f"{frame['scored_by'][0]}; {grouped.how} over a group's samples; {of}"
        return heatmap(frame.with_columns(group=label), f"Influence by {' and '.join(grouped.by)}", subtitle), notes


def _one_source_of_queries(frame: pl.DataFrame) -> pl.DataFrame:
    names = frame["queries"].unique(maintain_order=True).to_list()
    if len(names) > 1:
        raise InputError(f"there are queries in {joined(coded(names), 'and')}", "choose one with `--queries NAME`")
    return frame


def _grouped(asked: Asked) -> Grouped:
    from lark_store.query.answers.groups import Grouped

    return build(Grouped, {**asked.options, "how": asked.show.how})


def _influences(asked: Asked) -> tuple[Figure, list[str]]:
    import polars as pl

    from lark_store.charts.trajectory import influence_trajectory
    from lark_store.query.answers.groups import scored_groups

    grouped = _grouped(asked)
    rows, notes, label, scale = [], dict[str, None](), "", ""
    for scored in scored_groups(asked.db, asked.queries, asked.search, grouped):
        rows += _values(scored)
        notes |= dict.fromkeys(scored.notes)
        label, scale = scored.question.label, scored.question.method.scale
    schema = dict.fromkeys(("query_id", "checkpoint", "series"), pl.String)
    frame = pl.DataFrame(rows, schema | {"value": pl.Float64, "noise": pl.Float64, "n_samples": pl.Int64}, orient="row")
    of = f"{label}: {grouped.how} over a group's samples; bands are ± the noise of sketching"
    title = f"Influence by {' and '.join(grouped.by)} over checkpoints"
    return influence_trajectory(frame, asked.colours, title, of, scale), list(notes)


def _values(scored: Scored) -> list[tuple[object, ...]]:
    """Return a row per query and group."""
    scores, checkpoint = scored.scores, scored.question.terms[-1].checkpoint.name
    rows: list[tuple[object, ...]] = []
    for number, query in enumerate(scores.ids):
        for group, names in enumerate(scored.grouping.values):
            series = " · ".join("(none)" if name is None else name for name in names)
            noise = None if scores.noise_QG is None else float(scores.noise_QG[number, group])
            value = float(scores.value_QG[number, group])
            rows.append((query, checkpoint, series, value, noise, int(scores.n_G[group])))
    return rows


def _losses(asked: Asked) -> tuple[Figure, list[str]]:
    from lark_store.charts.trajectory import loss_trajectory

    return loss_trajectory(losses(asked)), []


def losses(asked: Asked) -> pl.DataFrame:
    """Return the losses of queries at checkpoints: query_id, checkpoint, loss (nats per target token)."""
    import polars as pl

    from lark_store.query.answers.top import find_queries
    from lark_store.query.select.resolve import ask
    from lark_store.schema.vectors import where

    rows = []
    for name in asked.checkpoints:
        at = build(type(asked.search), asked.options, checkpoints=[name])
        for question, ids in find_queries(asked.db, asked.queries, ask(asked.db, at), lenient=False):
            queries = question.queries
            stored = asked.db.vectors.read(
                queries.table, ["sample_id", "loss"], f"{queries.filter} AND {where(sample_id=ids)}"
            )
            rows += [(query, name, loss) for query, loss in stored.sort("sample_id").iter_rows()]
    schema = {"query_id": pl.String, "checkpoint": pl.String, "loss": pl.Float64}
    return pl.DataFrame(rows, schema, orient="row")
