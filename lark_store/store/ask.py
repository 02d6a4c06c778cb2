"""`Store`, answers: top, metrics, SQL."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lark_store.store.part import DEFAULT_SKETCHER, Part

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

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
        """Return metrics of what `attribute` scored, with 95% bootstrap intervals over queries.

        `view` is `all` (a row per figure: mean_max_influence, ft_pt_ratio, ft_wins, pt_dominance, format_effect),
        `influence` (the paper's Table I) or `dominance` (Table II). Definitions: `lark_store.query.metrics`.

        Raises
        ------
        NameUnknownError, NothingToScoreError, InputError
        """
        from lark_store.query.measure import measure

        return measure(self._db, checkpoint, view, method, sketcher, query_variant)

    def sql(
        self,
        query: str,
        parameters: Sequence[Any] | Mapping[str, Any] | None = None,
        *,
        timeout: float | None = None,
        memory: str = "4GB",
        max_rows: int | None = None,
    ) -> pl.DataFrame:
        """Run one SELECT (DuckDB's SQL) over the store's views, read-only.

        Views: checkpoints, checkpoint_metrics, sources, variants, sketchers, samples, ingest_runs, score_runs,
        sketches (without vectors), self_influence, failures, influence, source_influence.

        `parameters` are the values of `?` or `$1` (a sequence) or of `$name` (a mapping). The query ends with an error
        after `timeout` seconds, and when its work or its result needs more than `memory`; of a longer result the first
        `max_rows` rows are returned.

        Raises
        ------
        QueryError, InputError
        """
        from lark_store.query.sql import run

        return run(self._db, query, parameters, timeout=timeout, memory=memory, max_rows=max_rows)
