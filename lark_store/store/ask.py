"""`Store`, answers: top, metrics, SQL."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lark_store.store.part import DEFAULT_SKETCHER, Part

if TYPE_CHECKING:
    from collections.abc import Sequence

    import polars as pl

    from lark_store.schema.records import Hits


class Ask(Part):
    """The methods that answer."""

    def top(
        self,
        query: str,
        *,
        checkpoint: str,
        k: int = 10,
        sources: Sequence[str] = (),
        variants: Sequence[str] = (),
        opponents: bool = False,
        queries: str | None = None,
        query_checkpoint: str | None = None,
        query_variant: str | None = None,
        sketcher: str = DEFAULT_SKETCHER,
        method: str | None = None,
    ) -> Hits:
        """Return the `k` samples with the highest (`opponents`: the lowest) influence on a query, with their text.

        Exact, from the sketches themselves; `attribute` need not have run.

        Raises
        ------
        NameUnknownError, NothingToScoreError, InputError
        """
        from lark_store.query.groups import ask
        from lark_store.query.top import top

        questions = ask(
            self._db,
            checkpoint=checkpoint,
            queries=queries,
            sources=sources,
            variants=variants,
            query_checkpoint=query_checkpoint,
            query_variant=query_variant,
            sketcher=sketcher,
            method=method,
        )
        return top(self._db, query, questions, k=k, opponents=opponents)

    def metrics(
        self,
        *,
        checkpoint: str | None = None,
        view: str = "all",
        method: str = "cosine",
        sketcher: str = DEFAULT_SKETCHER,
        query_variant: str | None = None,
    ) -> pl.DataFrame:
        """Return metrics of what `attribute` scored, with 95% bootstrap intervals and paired tests over queries.

        `view` is `all` (a row per figure: mean_max_influence, ft_pt_ratio, ft_wins, pt_dominance, format_effect,
        difference, change), `influence` (the paper's Table I), `dominance` (Table II) or `comparisons` (difference of
        two sources and change since the checkpoint before, with q-values over the rows; with `checkpoint` no change).
        `p_value` tests that the mean difference over queries is 0: it speaks of queries like these, not of other models
        or seeds. Definitions: `lark_store.query.metrics`.

        Raises
        ------
        NameUnknownError, NothingToScoreError, InputError
        """
        from lark_store.query.measure import measure

        return measure(self._db, checkpoint, view, method, sketcher, query_variant)

    def sql(self, query: str) -> pl.DataFrame:
        """Run one SELECT (DuckDB's SQL) over the store's views, read-only.

        Views: checkpoints, checkpoint_metrics, sources, variants, sketchers, samples, sketches (without vectors),
        ingest_runs, failures, score_runs, influence, source_influence.

        Raises
        ------
        QueryError
        """
        from lark_store.query.sql import run

        return run(self._db, query)
