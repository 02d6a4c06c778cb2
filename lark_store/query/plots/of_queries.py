"""`hits` and `histogram` of one query; `dominance` and `influence` over all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from lark_store.core.names import SUM_SEPARATOR
from lark_store.core.text import distinct_notes
from lark_store.errors import InputError
from lark_store.query.plots.base import EXACT, SEARCH, Asked, Plot
from lark_store.specs import Compute, build

if TYPE_CHECKING:
    from lark_store.charts.style import Figure
    from lark_store.results import Hits

_NOISE = "whiskers: ± the noise of sketching, one standard deviation"


class HitsPlot(Plot):
    """The top samples of a query, on both sides."""

    name: ClassVar[str] = "hits"
    meaning: ClassVar[str] = "the samples with the highest and lowest influence on one query"
    uses: ClassVar[frozenset[str]] = EXACT | {"k"}

    def draw(self, asked: Asked) -> tuple[Figure, list[str]]:
        """Return the chart, and notes for the reader."""
        import polars as pl

        from lark_store.charts.hits import hits_chart

        top, bottom = (_ranked(asked, opponents=opponents) for opponents in (False, True))
        keys = ["source", "variant", "sample_id"]
        frame = pl.concat([top.frame, bottom.frame]).unique(keys, maintain_order=True)
        subtitle = f"{top.score} at {top.checkpoint}, {top.n_searched:,} sketches searched; {_NOISE}"
        chart = hits_chart(frame, asked.colours, f"Influence on query {top.query_id}", subtitle, top.scale)
        return chart, list(top.notes)


class Histogram(Plot):
    """All scores of a query."""

    name: ClassVar[str] = "histogram"
    meaning: ClassVar[str] = "the scores of all samples for one query, with its top hits marked"
    uses: ClassVar[frozenset[str]] = EXACT | {"k", "memory"}

    def draw(self, asked: Asked) -> tuple[Figure, list[str]]:
        """Return the chart, and notes for the reader."""
        from lark_store.charts.hits import histogram
        from lark_store.query.answers.score_matrix import all_scores
        from lark_store.query.select.resolve import ask

        top = _ranked(asked)
        query = asked.one_query()
        options = asked.options
        scores = all_scores(
            asked.db, [query], ask(asked.db, asked.search), options.get("where"), build(Compute, options)
        )
        n = scores.matrix.size
        subtitle = f"{top.score} at {top.checkpoint}: {n:,} sketches, the {len(top)} highest marked"
        chart = histogram(scores.matrix[0], top.frame, asked.colours, f"Scores for query {query}", subtitle, top.scale)
        return chart, list(top.notes)


def _ranked(asked: Asked, *, opponents: bool = False) -> Hits:
    """Return the top hits of the only query, without tests."""
    from lark_store.query.answers.stored_queries import of_stored, ranking_of

    query = asked.one_query()
    asked.check_checkpoint()
    options: dict[str, Any] = {**asked.options, "k": asked.show.k, "opponents": opponents, "null": "none"}
    (hits,) = of_stored(asked.db, [query], asked.search, ranking_of(asked.db, asked.search, options))
    return hits


class Dominance(Plot):
    """Fine-tuning against pretraining."""

    name: ClassVar[str] = "dominance"
    meaning: ClassVar[str] = "fine-tuning against pretraining: a point per query, with FT wins"
    uses: ClassVar[frozenset[str]] = SEARCH - {"sources", "variants"}

    def draw(self, asked: Asked) -> tuple[Figure, list[str]]:
        """Return the chart, and notes for the reader."""
        import polars as pl

        from lark_store.charts.dominance import dominance
        from lark_store.query.answers.ft_pt import ft_pt
        from lark_store.query.select.queries import unknown_query

        asked.check_checkpoint()
        frame = ft_pt(asked.db, asked.search)
        if asked.queries:
            ids = frame["query_id"].unique().to_list()
            for query in asked.queries:
                if query not in ids:
                    raise unknown_query(asked.db, query, ids)
            frame = frame.filter(pl.col("query_id").is_in(asked.queries))
        sources = frame["queries"].unique(maintain_order=True).to_list()
        if len(sources) > 1:
            raise InputError(f"there are queries in `{'`, `'.join(sources)}`", "choose one with `--queries NAME`")
        at = SUM_SEPARATOR.join(asked.checkpoints)
        notes = distinct_notes(frame["note"])
        return dominance(frame, f"{frame['scored_by'][0]} at {at}; a point per query of `{sources[0]}`"), notes


class Influence(Plot):
    """The sources' influence over checkpoints, from the stored scores."""

    name: ClassVar[str] = "influence"
    meaning: ClassVar[str] = "influence of each source at each checkpoint, with intervals (run `attribute` first)"
    uses: ClassVar[frozenset[str]] = frozenset(
        ("query_variant", "query_checkpoint", "sketcher", "method", "over_checkpoints", "queries")
    )

    def draw(self, asked: Asked) -> tuple[Figure, list[str]]:
        """Return the chart, and notes for the reader."""
        from lark_store.charts.influence import source_influence
        from lark_store.query.answers.metrics import measure
        from lark_store.query.select.resolve import method_across
        from lark_store.query.select.score_filter import ScoreFilter

        if asked.queries:
            raise InputError("`influence` is over all queries", "leave out the ids, or use `heatmap`")
        spec = asked.search
        method = method_across(spec.method, spec.over_checkpoints, spec.checkpoints, spec.query_checkpoint)
        scores = ScoreFilter(asked.checkpoints, method, spec.query_checkpoint, spec.query_variant)
        frame = measure(asked.db, scores, "influence", spec.sketcher)
        frame = frame.unique(["checkpoint", "queries", "source", "variant"], maintain_order=True)
        if spec.queries is not None:
            frame = frame.filter(queries=spec.queries)
        sources = frame["queries"].unique(maintain_order=True).to_list()
        if len(sources) != 1:
            fact = (
                f"there are scores for `{'`, `'.join(sources)}`" if sources else f"`{spec.queries}` is not scored yet"
            )
            hint = "choose one with `--queries NAME`" if sources else "score it with `lark-store attribute`"
            raise InputError(fact, hint)
        label = f"{frame['scored_by'][0]}; mean over queries of `{sources[0]}` of the highest score in a source"
        return source_influence(frame, asked.tuning, f"{label}; bands are 95% intervals"), []
