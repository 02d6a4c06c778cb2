"""`Store`, queries: top, scores, metrics, coverage, SQL."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, overload

from lark_store.specs import Compute, ExplainSpec, GroupsSpec, MetricsSpec, RankSpec, SearchSpec, TraceSpec, build
from lark_store.store.base import Part, keywords, named

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Unpack

    import polars as pl

    from lark_store.results import Explanation, Hits, NewText, OnProgress, ScoreMatrix, Trace
    from lark_store.specs import (
        CoverageOptions,
        ExplainerOptions,
        ExplainOptions,
        GroupsOptions,
        MethodOptions,
        MetricsOptions,
        ScoreOptions,
        ScoresOptions,
        SelfInfluenceOptions,
        SimilarTextOptions,
        TopOptions,
        TraceOptions,
    )
    from lark_store.store.explain import Explainer
    from lark_store.store.rankings import Rankings


_OF_EXPLAINED = ("queries", "query_variant", "variant", "normalize")  # the rest is of the model


class AnswerMethods(Part):
    """The methods that answer questions."""

    @overload
    def top(
        self,
        query: str | None = None,
        *,
        checkpoint: str | Sequence[str],
        new: NewText | None = None,
        **options: Unpack[TopOptions],
    ) -> Hits: ...
    @overload
    def top(
        self,
        query: str | list[str] | None = None,
        *,
        checkpoints: Sequence[str],
        new: NewText | Sequence[NewText] | None = None,
        **options: Unpack[TopOptions],
    ) -> Rankings: ...
    @overload
    def top(
        self,
        query: list[str] | None = None,
        *,
        checkpoint: str | Sequence[str],
        new: Sequence[NewText] | None = None,
        **options: Unpack[TopOptions],
    ) -> Rankings: ...
    @keywords(SearchSpec, RankSpec, Compute)
    def top(
        self,
        query: str | Sequence[str] | None = None,
        *,
        checkpoint: str | Sequence[str] | None = None,
        checkpoints: Sequence[str] | None = None,
        new: NewText | Sequence[NewText] | None = None,
        **options: Unpack[TopOptions],
    ) -> Hits | Rankings:
        """Return the `k` samples with the highest (`opponents`: the lowest) influence on a query, with their text.

        The query is the id of one in the store, or a `new` one whose gradient is computed on the spot. `SOURCE/ID` is a
        sample of any source: its stored sketch is the query, and it is left out of its own hits. A list of queries, or
        `checkpoints` instead of `checkpoint`, gives `Rankings`: a ranking for each query at each checkpoint.

        `where` is an SQL condition applied before ranking. Its columns are those of the sketch (source, stage, domain,
        variant, sample_id, n_tokens, n_loss_tokens, loss, grad_norm), those of the sample (prompt, response, text,
        label, meta) and the keys of the sample's metadata.

        `method` is `cosine`, `dot`, `whitened`, `centred` (see `lark_store.query.scoring.geometry`), `bm25`,
        `bm25-okapi`, `bm25plus` or `hybrid` (z(cosine) + z(bm25)). Scores of several checkpoints are summed as
        `over_checkpoints` says: `sum`, or `lr-weighted` by learning rate (`tracin` is `dot`, lr-weighted). The search
        is exact and reads the sketches themselves, so `attribute` need not have run. With `approximate` it reads only
        candidates from the index, measured by `index_build`.

        `null` is the reference for p-values: `sources` (the scores of the other searched sources in the same variant),
        the name of one source (searched or not), `signs` (shuffled signs of the sketch) or `none`. The default is
        `sources`, or `signs` if only one source is searched. q-values are Benjamini–Hochberg's within each source and
        variant, times their number: see `lark_store.stats.significance`.

        Raises
        ------
        NameUnknownError, NothingToScoreError, InputError, QueryError
        """
        from lark_store.store.top import Asked, rankings

        return rankings(self._db, Asked(query, new, checkpoint, checkpoints), options)

    @keywords(SearchSpec, RankSpec, TraceSpec, Compute)
    def trace(self, question: str, *, checkpoint: str | None = None, **options: Unpack[TraceOptions]) -> Trace:
        """Answer a question with the model of a checkpoint, and rank the samples by their influence on the answer.

        The question is rendered as a prompt in `query_variant` (`chatml`). The most likely tokens, at most
        `max_answer`, are the answer; it becomes the response of a query, for which samples are ranked as by `top`. The
        checkpoint is by default the newest with sketches. With `query_checkpoint` the model at that checkpoint answers,
        and the samples' gradients are those at `checkpoint`. The other arguments are those of `top`.

        Raises
        ------
        NameUnknownError, NothingToScoreError, InputError, QueryError, CheckpointError, CheckpointChangedError
        """
        from lark_store.store.trace import trace

        return trace(self._db, question, checkpoint, options)

    @keywords(ExplainSpec, SearchSpec, Compute)
    def explain(
        self,
        query: str | None,
        sample: str,
        *,
        checkpoint: str | None = None,
        new: NewText | None = None,
        **options: Unpack[ExplainOptions],
    ) -> Explanation:
        """Divide the exact score of a query and a sample among the tokens of both.

        The gradients of both are taken at the checkpoint (default: the only one) in float32, with the sketcher's
        correction, parameters and positions. Each token of either side has two parts of the score. `by_position` is
        what its position contributes to the gradient: the layers' inputs and output gradients there. `by_target` is
        what the loss of predicting it contributes. Both sum to the score, exact but for rounding.

        `query` is as in `top`, with `new` for a text outside the store; `sample` is `SOURCE/ID`, or an id that only one
        source has. With `normalize` the parts sum to the cosine, else to the dot product of the gradients. A variant is
        by default the one with sketches, of several `chatml`. See `explainer` to keep the model for more questions.

        Raises
        ------
        NameUnknownError, InputError, CheckpointError, CheckpointChangedError, NothingToScoreError
        """
        from lark_store.store.explain import Explainer, check_names

        check_names(self._db, query, sample, new, options)
        asked = {name: options[name] for name in _OF_EXPLAINED if name in options}  # type: ignore[literal-required]
        return Explainer(self._db, checkpoint, options).explain(query, sample, new=new, **asked)

    @keywords(SearchSpec, Compute)
    def explainer(self, *, checkpoint: str | None = None, **options: Unpack[ExplainerOptions]) -> Explainer:
        """Load the model of a checkpoint for several explanations: `store.explainer(...).explain(query, sample)`.

        Its method `explain` takes the other arguments of `Store.explain`.

        Raises
        ------
        NameUnknownError, InputError, CheckpointError, CheckpointChangedError, NothingToScoreError
        """
        from lark_store.store.explain import Explainer

        return Explainer(self._db, checkpoint, options)

    @keywords(SearchSpec, RankSpec, Compute)
    def scores(
        self,
        query_ids: Sequence[str] | None = None,
        *,
        checkpoint: str | Sequence[str],
        **options: Unpack[ScoresOptions],
    ) -> ScoreMatrix:
        """Return the score of every searched sample for each query, scored as by `top` and computed on the spot.

        The queries are the given ids, in that order, or all of one source, sorted. The other arguments are those of
        `top`. Holds as many queries at a time as fit into `memory` bytes, besides the matrix itself.

        Raises
        ------
        NameUnknownError, NothingToScoreError, InputError, QueryError
        """
        from lark_store.query.answers.score_matrix import all_scores
        from lark_store.query.select.resolve import ask

        questions = ask(self._db, build(SearchSpec, options, checkpoints=named(checkpoint)))
        return all_scores(self._db, query_ids, questions, options.get("where"), build(Compute, options))

    @keywords(SearchSpec, RankSpec, GroupsSpec, Compute)
    def groups(
        self,
        query: str | Sequence[str] | None = None,
        *,
        checkpoint: str | Sequence[str],
        **options: Unpack[GroupsOptions],
    ) -> pl.DataFrame:
        """Return the influence of groups of samples: of each value of a key, or of each pair of values of two.

        `by` names one key or two: `source`, `stage`, `domain`, `variant`, `label`, or any key of the samples' metadata.
        Samples without a key are the group null, and `note` counts them. A group's value is the `mean`, `sum` or `max`
        (`how`) of its samples' scores for a query; for several queries (a list, or None: all of each source of stage
        `query`) it is the mean over them. Several checkpoints are scored one by one, or summed as `over_checkpoints`
        says. The other arguments are those of `top`. The scores are exact, of all searched sketches.

        Columns: checkpoint, queries, query_id (null over several), group_name and subgroup_name (values of the keys, as
        text), n_samples (one in two format variants counts twice), value, low and high (95% interval), interval_over
        (what it resamples: `queries`; for one query the group's `samples`; null without an interval, as for one
        query's maximum), sketch_error (bound of the value's standard deviation over sketcher seeds, null where the
        method has none), wins (share of queries for which no group has a higher value), n_queries, query_checkpoint,
        query_variant (the queries' format; a note says where it differs between checkpoints), scored_by and note. The
        highest value comes first. Intervals are bootstrapped; those over more than 500 samples
        are the mean ± 1.96 standard errors.

        Raises
        ------
        NameUnknownError, NothingToScoreError, InputError, QueryError
        """
        from lark_store.query.answers.groups import Grouped, groups

        ids = None if query is None else named(query, "query")
        spec = build(SearchSpec, options, checkpoints=named(checkpoint))
        return groups(self._db, ids, spec, build(Grouped, options))

    @keywords(SearchSpec)
    def ft_pt(self, checkpoint: str | Sequence[str], **options: Unpack[ScoreOptions]) -> pl.DataFrame:
        """Compare the highest influence of fine-tuning and pretraining groups, for each query and pair of groups.

        Computed on the spot. Columns: checkpoint, queries, query_id, source, variant (the fine-tuning group),
        against_source, against_variant (the pretraining group), ft and pt (Φ, the highest score in each), ratio (ft /
        pt, null where pt ≤ 0), winner (`finetune`, `pretrain` or `tie`), query_checkpoint, scored_by and note.
        `method`, `over_checkpoints` and `query_checkpoint` are those of `top`.

        Raises
        ------
        NameUnknownError, NothingToScoreError, InputError
        """
        from lark_store.query.answers.ft_pt import ft_pt

        return ft_pt(self._db, build(SearchSpec, options, checkpoints=named(checkpoint)))

    @keywords(SearchSpec)
    def trajectory(
        self,
        query: str,
        sample_id: str,
        *,
        source: str | None = None,
        variant: str | None = None,
        **options: Unpack[MethodOptions],
    ) -> pl.DataFrame:
        """Return one sample's influence on one query at every checkpoint with both sketches, by epoch.

        Columns: checkpoint, epoch, learning_rate, step, queries, query_id, source, variant, sample_id, score, noise
        (the score's standard deviation from sketching), query_loss and sample_loss (nats per target token),
        query_checkpoint, scored_by.

        The query's gradient is at the sample's checkpoint, or with `query_checkpoint` always at that one. Then the row
        of that checkpoint itself is the score at one checkpoint, and `dot` is the default.

        Raises
        ------
        NameUnknownError, NothingToScoreError, InputError
        """
        from lark_store.query.answers.trajectory import trajectory

        sources, variants = [source] if source else (), [variant] if variant else ()
        spec = build(SearchSpec, options, checkpoints=(), sources=sources, variants=variants)
        return trajectory(self._db, query, sample_id, spec)

    @keywords(RankSpec, SearchSpec)
    def similar_text(
        self, query: str | None = None, *, text: str | None = None, **options: Unpack[SimilarTextOptions]
    ) -> pl.DataFrame:
        """Return the `k` samples whose texts are most similar to a query's, or to any `text`, by BM25.

        Columns: rank, score, source, stage, sample_id, text. See `lark_store.query.scoring.bm25`.

        Raises
        ------
        NameUnknownError, NothingToScoreError, InputError
        """
        from lark_store.query.answers.similar_text import similar_text

        spec = build(SearchSpec, options, checkpoints=())
        return similar_text(self._db, query, text=text, k=build(RankSpec, options).k, sources=spec.sources)

    @keywords(RankSpec, SearchSpec)
    def self_influence(
        self, *, checkpoints: Sequence[str] = (), **options: Unpack[SelfInfluenceOptions]
    ) -> pl.DataFrame:
        """Return the `k` samples with the highest self-influence, the squared norm of their gradient, with their text.

        Summed over the given checkpoints, weighted by learning rate if there are several (TracIn; Pruthi et al. 2020).
        High values mark hard, rare or mislabelled samples. `loss` is the mean over the checkpoints.

        Raises
        ------
        NameUnknownError, NothingToScoreError
        """
        from lark_store.query.answers.self_influence import self_influence

        spec = build(SearchSpec, options, checkpoints=checkpoints)
        sketcher = self._sketcher(spec.sketcher, checkpoints)
        return self_influence(self._db, list(checkpoints), list(spec.sources), build(RankSpec, options).k, sketcher)

    def index_build(self, sketcher: str | None = None, *, on_progress: OnProgress | None = None) -> pl.DataFrame:
        """Build and measure a sketcher's approximate index; returns a row per table of sketches.

        The index is a 512-byte code stored with every sketch. This adds missing codes and measures the number of
        candidates a search must read. Columns: fingerprint, n_rows, candidates, recall (recall@10 on queries not used
        to choose that number) and n_queries.

        Raises
        ------
        NameUnknownError, NothingToScoreError, StoreBusyError
        """
        from lark_store.query.scoring.ann_index import build, report
        from lark_store.schema.locks import working

        db, sketcher = self._writable, self._sketcher(sketcher)
        with working(db.location, f"index-{sketcher}", f"indexing the sketches of `{sketcher}`"):
            return report(build(db, sketcher, on_progress))

    @keywords(SearchSpec, MetricsSpec)
    def metrics(
        self, *, checkpoint: str | Sequence[str] | None = None, **options: Unpack[MetricsOptions]
    ) -> pl.DataFrame:
        """Return metrics of the scores from `attribute`, with 95% bootstrap intervals and paired tests over queries.

        `view` is `all` (a row per figure: mean_max_influence, ft_pt_ratio, ft_wins, pt_dominance, format_effect,
        difference, change), `influence` (the paper's Table I), `dominance` (Table II) or `comparisons` (difference of
        two sources and change since the previous checkpoint, with q-values over the rows; no change if `checkpoint` is
        given).

        `ft_pt_ratio`, `format_effect` (each variant against `raw`) and the column `ratio` of `dominance` are ratios of
        means, null unless both means are above 0. `r_median`, `r_q1` and `r_q3` are the median and quartiles of the
        ratios of single queries, over the `n_ratio` queries with a divisor above 0.

        `sketch_error` bounds the standard deviation of a figure over sketcher seeds; more queries don't reduce it.
        `p_value` tests that the mean difference over queries is 0; it generalises to similar queries, not to other
        models or seeds. Definitions: `lark_store.stats.metrics`. `method` and `over_checkpoints` are those of
        `attribute`; a sum is selected by its last checkpoint or by all of them. `scored_by` names the score.

        The scores are those with queries and samples at one checkpoint (`cosine` by default). With `query_checkpoint`
        they are those of queries at this checkpoint and samples at others (`dot` by default); the two never mix.

        Raises
        ------
        NameUnknownError, NothingToScoreError, InputError
        """
        from lark_store.query.answers.metrics import measure
        from lark_store.query.select.resolve import method_across
        from lark_store.query.select.score_filter import ScoreFilter

        checkpoints = [] if checkpoint is None else named(checkpoint)
        spec = build(SearchSpec, options, checkpoints=checkpoints)
        method = method_across(spec.method, spec.over_checkpoints, checkpoints, spec.query_checkpoint)
        scores = ScoreFilter(checkpoints, method, spec.query_checkpoint, spec.query_variant)
        return measure(self._db, scores, build(MetricsSpec, options).view, spec.sketcher)

    @keywords(SearchSpec)
    def coverage(self, *, checkpoint: str | None = None, **options: Unpack[CoverageOptions]) -> pl.DataFrame:
        """Return the share of each source that is sketched or, with `method`, scored by it.

        The scores are those of queries at the samples' own checkpoint, or at `query_checkpoint`.

        A row per sketcher, checkpoint, source and variant with n_samples (in the source now), n_searched (sketches of
        committed runs, or samples scored by `attribute`), n_truncated (sketches of truncated samples), n_cut (the
        tokens cut off them), chosen (how the samples were chosen, if not all) and note (an explanation, if not all).
        n_truncated and n_cut are null for imported sketches and those of older versions, which did not count.
        Statements about a source, its highest influence above all, hold for the searched samples only.

        Raises
        ------
        NameUnknownError, InputError
        """
        from lark_store.query.select.coverage import coverage

        spec = build(SearchSpec, options, checkpoints=())
        return coverage(self._db, checkpoint, spec.sketcher, spec.method, spec.query_checkpoint)

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

        Views: checkpoints, checkpoint_metrics, sources, variants, sketchers, corrections, samples, ingest_runs,
        score_runs, sketches (without vectors), predictions, coverage, self_influence, studies, evaluations, failures,
        influence, source_influence, probe_runs, probes, eif_runs, eif, eif_pairs.

        `parameters` are the values of `?` or `$1` (a sequence) or of `$name` (a mapping). The query fails after
        `timeout` seconds, or if its work or result needs more than `memory`. A longer result is cut to its first
        `max_rows` rows.

        Raises
        ------
        QueryError, InputError
        """
        from lark_store.query.sql.engine import run

        return run(self._db, query, parameters, timeout=timeout, memory=memory, max_rows=max_rows)
