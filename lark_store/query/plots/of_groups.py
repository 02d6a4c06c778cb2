"""`trajectory` and `heatmap`: groups of samples over checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from lark_store.core.text import coded, distinct_notes, joined
from lark_store.errors import InputError, NothingToScoreError
from lark_store.query.plots.base import GROUPS, Asked, Plot
from lark_store.query.plots.labels import unique_labels
from lark_store.specs import build

if TYPE_CHECKING:
    from collections.abc import Iterable

    import polars as pl

    from lark_store.charts.style import Figure
    from lark_store.query.answers.groups import Grouped, Scored
    from lark_store.query.select.resolve import Question

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
        notes = [*asked.notes, *distinct_notes(frame["note"])]
        frame = _one_source_of_queries(frame)
        values = frame.select(["group_name", "subgroup_name"][: len(grouped.by)]).rows()
        labels = unique_labels(values, grouped.by)
        group = pl.Series("group", [labels[value] for value in values], pl.String)
        n = frame["n_queries"][0]
        of = f"query {frame['query_id'][0]}" if n == 1 else f"mean over {n:,} queries of `{frame['queries'][0]}`"
        of += _as(frame["query_variant"])
        subtitle = f"{frame['scored_by'][0]}; {grouped.how} over a group's samples; {of}"
        return heatmap(frame.with_columns(group), f"Influence by {' and '.join(grouped.by)}", subtitle), notes


def _one_source_of_queries(frame: pl.DataFrame) -> pl.DataFrame:
    names = frame["queries"].unique(maintain_order=True).to_list()
    if len(names) > 1:
        raise InputError(f"there are queries in {joined(coded(names), 'and')}", "choose one with `--queries NAME`")
    return frame


def _grouped(asked: Asked) -> Grouped:
    from lark_store.query.answers.groups import Grouped

    return build(Grouped, {**asked.options, "how": asked.show.how})


def _as(variants: Iterable[str]) -> str:
    """Name the format variants of the queries, for a subtitle."""
    return f" as {joined(dict.fromkeys(variants), 'and')}"


def _influences(asked: Asked) -> tuple[Figure, list[str]]:
    import polars as pl

    from lark_store.charts.trajectory import influence_trajectory
    from lark_store.query.answers.groups import scored_groups
    from lark_store.query.select.resolve import mixed_variants

    grouped = _grouped(asked)
    passes = list(scored_groups(asked.db, asked.queries, asked.search, grouped))
    questions = [scored.question for scored in passes]
    labels = unique_labels((names for scored in passes for names in scored.grouping.values), grouped.by)
    rows = [row for scored in passes for row in _values(scored, labels)]
    notes = [*asked.notes, *(note for scored in passes for note in scored.notes), *mixed_variants(questions)]
    label, scale = questions[-1].label, questions[-1].method.scale
    schema = dict.fromkeys(("query_id", "checkpoint", "series"), pl.String)
    frame = pl.DataFrame(rows, schema | {"value": pl.Float64, "noise": pl.Float64, "n_samples": pl.Int64}, orient="row")
    how = f"{label}: {grouped.how} over a group's samples; queries{_as(_variants(questions))}"
    title = f"Influence by {' and '.join(grouped.by)} over checkpoints"
    subtitle = f"{how}; bands are ± the noise of sketching"
    return influence_trajectory(frame, asked.colours, title, subtitle, scale), list(dict.fromkeys(notes))


def _variants(questions: Iterable[Question]) -> list[str]:
    return [question.queries.variant.name for question in questions]


def _values(scored: Scored, labels: dict[tuple[str | None, ...], str]) -> list[tuple[object, ...]]:
    """Return a row per query and group."""
    scores, checkpoint = scored.scores, scored.question.terms[-1].checkpoint.name
    rows: list[tuple[object, ...]] = []
    for number, query in enumerate(scores.ids):
        for group, names in enumerate(scored.grouping.values):
            noise = None if scores.noise_QG is None else float(scores.noise_QG[number, group])
            value = float(scores.value_QG[number, group])
            rows.append((query, checkpoint, labels[names], value, noise, int(scores.n_G[group])))
    return rows


def _losses(asked: Asked) -> tuple[Figure, list[str]]:
    from lark_store.charts.trajectory import loss_trajectory
    from lark_store.query.select.resolve import mixed_variants

    frame, questions = losses(asked)
    known = frame.fill_nan(None).drop_nulls("loss")
    notes = [*asked.notes, *mixed_variants(questions)]
    if known.is_empty():
        raise NothingToScoreError("no loss of these queries is stored", "sketch them with `lark-store ingest`")
    lacking = frame.join(known, on=["query_id", "checkpoint"], how="anti", maintain_order="left")
    for query, names in lacking.group_by("query_id", maintain_order=True).agg("checkpoint").iter_rows():
        notes.append(f"the loss of `{query}` at {joined(coded(names), 'and')} is not stored, so it is left out")
    return loss_trajectory(known, f"queries{_as(_variants(questions))}"), notes


def losses(asked: Asked) -> tuple[pl.DataFrame, list[Question]]:
    """Return the losses of queries at checkpoints, and the questions that hold the queries.

    Columns: query_id, checkpoint, loss (nats per target token; NaN for imported sketches).
    """
    import polars as pl

    from lark_store.query.answers.top import find_queries
    from lark_store.query.select.resolve import ask
    from lark_store.schema.vectors import where

    rows, questions = [], []
    for name in asked.checkpoints:
        at = build(type(asked.search), asked.options, checkpoints=[name])
        for question, ids in find_queries(asked.db, asked.queries, ask(asked.db, at), lenient=False):
            queries = question.queries
            stored = asked.db.vectors.read(
                queries.table, ["sample_id", "loss"], f"{queries.filter} AND {where(sample_id=ids)}"
            )
            rows += [(query, name, loss) for query, loss in stored.sort("sample_id").iter_rows()]
            questions.append(question)
    schema = {"query_id": pl.String, "checkpoint": pl.String, "loss": pl.Float64}
    return pl.DataFrame(rows, schema, orient="row"), questions
