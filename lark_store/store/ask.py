"""`Store`, answers: top, metrics, SQL."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lark_store.errors import InputError
from lark_store.store.distance import distance_note
from lark_store.store.part import Part

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import polars as pl

    from lark_store.query.groups import Wanted
    from lark_store.query.top import Ranking
    from lark_store.schema.records import Hits, NewText, OnProgress, ScoreMatrix


def _named(checkpoint: str | Sequence[str]) -> list[str]:
    """Return the names of the checkpoints that are given, at least one."""
    checkpoints = [checkpoint] if isinstance(checkpoint, str) else list(checkpoint)
    if not checkpoints:
        raise InputError("no checkpoint is named", "give it with `--checkpoint NAME`")
    return checkpoints


class Ask(Part):
    """The methods that answer."""

    def top(
        self,
        query: str | None = None,
        *,
        checkpoint: str | Sequence[str],
        k: int = 10,
        sources: Sequence[str] = (),
        variants: Sequence[str] = (),
        where: str | None = None,
        opponents: bool = False,
        queries: str | None = None,
        query_checkpoint: str | None = None,
        query_variant: str | None = None,
        sketcher: str | None = None,
        method: str | None = None,
        over_checkpoints: str | None = None,
        null: str | None = None,
        approximate: bool = False,
        new: NewText | None = None,
        device: str = "auto",
    ) -> Hits:
        """Return the `k` samples with the highest (`opponents`: the lowest) influence on a query, with their text.

        The query is one in the store, by id, or a `new` one, whose gradient is computed on the spot. `where` is any
        condition of SQL that holds before the ranking, on the columns of a sketch (source, stage, domain, variant,
        sample_id, n_tokens, n_loss_tokens, loss, grad_norm), of its sample (prompt, response, text, label, meta) and
        on the keys of the sample's metadata.

        `method` is `cosine`, `dot`, `whitened`, `centred` (see `lark_store.query.geometry`), `bm25`, `bm25-okapi`,
        `bm25plus` or `hybrid` (z(cosine) + z(bm25)). Of several checkpoints the scores are summed, as
        `over_checkpoints` says: `sum`, or `lr-weighted` by learning rate (`tracin`: of `dot`). Exact, from the sketches
        themselves, and `attribute` need not have run; `approximate` reads the candidates that the index names, which
        `index_build` must have measured.

        `null` is what a score is held against for its p-value: `sources` (the scores of the other sources that are
        searched, in the same variant), the name of one source (searched or not), `signs` (shuffled signs of the sketch)
        or `none`; by default `sources`, or `signs` where one source is searched. q-values are Benjamini–Hochberg's
        within each source and variant, times their number: see `lark_store.query.significance`.

        Raises
        ------
        NameUnknownError, NothingToScoreError, InputError, QueryError
        """
        from dataclasses import replace

        from lark_store.query.groups import Wanted, ask
        from lark_store.query.top import NULLS, Ranking, null_groups, top

        of = (sources, variants, query_checkpoint, query_variant, method, over_checkpoints)
        wanted = Wanted(_named(checkpoint), self._sketcher(sketcher), queries, *of)
        ranking = Ranking(k, opponents, where, null, (), approximate, device)
        if null is not None and null not in NULLS:
            ranking = replace(ranking, null_groups=null_groups(self._db, wanted, null))
        if (query is None) == (new is None):
            fact = "an id and a new text are two queries" if new else "one query is needed"
            raise InputError(fact, "give the id of a query, or a new text")
        if new is not None:
            return self._with_distance(self._top_of_new(new, wanted, ranking))
        assert query is not None
        return self._with_distance(top(self._db, [query], ask(self._db, wanted), ranking)[query])

    def _with_distance(self, hits: Hits) -> Hits:
        """Say how far the query's checkpoint is from the samples', where they are two."""
        from dataclasses import replace

        note = distance_note(self._db, hits.query_checkpoint, hits.checkpoint.split(" + "))
        return replace(hits, notes=(*hits.notes, note)) if note else hits

    def _top_of_new(self, new: NewText, wanted: Wanted, ranking: Ranking) -> Hits:
        """Sketch a text and ask with it: what needs both ingest and query is put together here."""
        import torch

        from lark_store.ingest.asked import read_sample, sample_of, sketch_new
        from lark_store.query.groups import ask_new
        from lark_store.query.scores import Asked
        from lark_store.query.scoring import Queries
        from lark_store.query.top import top_of_new

        if (new.file is not None) + (new.text is not None) + (new.prompt is not None or new.response is not None) > 1:
            raise InputError("a new query is one text", "give a prompt and its response, or a text, or a file")
        parts = {"prompt": new.prompt, "response": new.response, "text": new.text}
        if not new.file and new.text is None and None in (new.prompt, new.response):
            raise InputError("the new query is not whole", "give `--prompt` and `--response`, or `--text`")
        sample = read_sample(new.file) if new.file else sample_of(parts)
        variant = wanted.query_variant or "chatml"
        at = wanted.query_checkpoint or wanted.checkpoints[0]
        how = {"device": ranking.device, "precision": new.precision}
        made = sketch_new(self._db, sample, sketcher=wanted.sketcher, checkpoint=at, variant=variant, **how)
        question = ask_new(self._db, wanted, made.fingerprint)
        unit = torch.nn.functional.normalize(made.sketch.vector[None], dim=1)
        sketch = Queries(["new"], unit, torch.tensor([made.sketch.grad_norm]))
        return top_of_new(self._db, Asked(["new"], [sketch], [made.text], variant), question, ranking, (at, variant))

    def scores(
        self,
        query_ids: Sequence[str] | None = None,
        *,
        checkpoint: str | Sequence[str],
        sources: Sequence[str] = (),
        variants: Sequence[str] = (),
        where: str | None = None,
        queries: str | None = None,
        query_checkpoint: str | None = None,
        query_variant: str | None = None,
        sketcher: str | None = None,
        method: str | None = None,
        over_checkpoints: str | None = None,
        device: str = "auto",
        memory: int = 1 << 30,
    ) -> ScoreMatrix:
        """Return the score of every sample that is searched for each query, as `top` scores them, computed on the spot.

        The queries are those with the given ids, in that order, or all of one source, sorted. The arguments are those
        of `top`; as many queries are held at a time as fit into `memory` bytes, besides the matrix itself.

        Raises
        ------
        NameUnknownError, NothingToScoreError, InputError, QueryError
        """
        from lark_store.query.groups import Wanted, ask
        from lark_store.query.whole import all_scores

        of = (sources, variants, query_checkpoint, query_variant, method, over_checkpoints)
        questions = ask(self._db, Wanted(_named(checkpoint), self._sketcher(sketcher), queries, *of))
        return all_scores(self._db, query_ids, questions, condition=where, device=device, memory=memory)

    def ft_pt(
        self,
        checkpoint: str | Sequence[str],
        *,
        queries: str | None = None,
        query_variant: str | None = None,
        sketcher: str | None = None,
        method: str | None = None,
        over_checkpoints: str | None = None,
    ) -> pl.DataFrame:
        """Return, for each query and pair of a fine-tuning and a pretraining group, which of the two reaches further.

        Computed on the spot. Columns: checkpoint, queries, query_id, source, variant (the fine-tuning group),
        against_source, against_variant (the pretraining group), ft and pt (Φ, the highest score in each), ratio
        (ft / pt, null where pt ≤ 0), winner (`finetune`, `pretrain` or `tie`), scored_by and note. `method` and
        `over_checkpoints` are those of `top`.

        Raises
        ------
        NameUnknownError, NothingToScoreError, InputError
        """
        from lark_store.query.answers import ft_pt
        from lark_store.query.groups import Wanted

        of = ((), (), None, query_variant, method, over_checkpoints)
        return ft_pt(self._db, Wanted(_named(checkpoint), self._sketcher(sketcher), queries, *of))

    def trajectory(
        self,
        query: str,
        sample_id: str,
        *,
        source: str | None = None,
        variant: str | None = None,
        queries: str | None = None,
        query_variant: str | None = None,
        sketcher: str | None = None,
        method: str | None = None,
    ) -> pl.DataFrame:
        """Return one sample's influence on one query at every checkpoint that has both sketches, by epoch.

        Columns: checkpoint, epoch, learning_rate, step, queries, query_id, source, variant, sample_id, score, noise
        (the score's standard deviation from sketching), query_loss and sample_loss (nats per target token), scored_by.

        Raises
        ------
        NameUnknownError, NothingToScoreError, InputError
        """
        from lark_store.query.answers import trajectory
        from lark_store.query.groups import Wanted

        sources, variants = [source] if source else (), [variant] if variant else ()
        wanted = Wanted([], self._sketcher(sketcher), queries, sources, variants, None, query_variant, method)
        return trajectory(self._db, query, sample_id, wanted)

    def similar_text(
        self, query: str | None = None, *, text: str | None = None, k: int = 10, sources: Sequence[str] = ()
    ) -> pl.DataFrame:
        """Return the `k` samples whose texts share most with a query's, or with any `text`, by BM25.

        Columns: rank, score, source, stage, sample_id, text. See `lark_store.query.lexical`.

        Raises
        ------
        NameUnknownError, NothingToScoreError, InputError
        """
        from lark_store.query.answers import similar_text

        return similar_text(self._db, query, text=text, k=k, sources=sources)

    def self_influence(
        self,
        *,
        checkpoints: Sequence[str] = (),
        sources: Sequence[str] = (),
        k: int = 10,
        sketcher: str | None = None,
    ) -> pl.DataFrame:
        """Return the `k` samples with the highest self-influence, the squared norm of their gradient, with their text.

        Summed over the checkpoints given, weighted by learning rate where there are several (TracIn's; Pruthi et al.
        2020). High values mark samples that are hard, rare or mislabelled. `loss` is the mean over the checkpoints.

        Raises
        ------
        NameUnknownError, NothingToScoreError
        """
        from lark_store.query.itself import self_influence

        return self_influence(self._db, list(checkpoints), list(sources), k, self._sketcher(sketcher))

    def index_build(self, sketcher: str | None = None, *, on_progress: OnProgress | None = None) -> pl.DataFrame:
        """Make a sketcher's approximate index and measure it; a row per table of sketches.

        The index is a code of 512 bytes beside every sketch, written with it; here those that are missing are added,
        and it is measured how many candidates a search must read. Columns: fingerprint, n_rows, candidates, recall
        (recall@10 on queries that had no part in choosing that number) and n_queries.

        Raises
        ------
        NameUnknownError, NothingToScoreError, StoreBusyError
        """
        from lark_store.query.index import build, report
        from lark_store.schema.locks import working

        db, sketcher = self._writable, self._sketcher(sketcher)
        with working(db.location, f"index-{sketcher}", f"indexing the sketches of `{sketcher}`"):
            return report(build(db, sketcher, on_progress))

    def metrics(
        self,
        *,
        checkpoint: str | Sequence[str] | None = None,
        view: str = "all",
        method: str = "cosine",
        over_checkpoints: str | None = None,
        sketcher: str | None = None,
        query_variant: str | None = None,
    ) -> pl.DataFrame:
        """Return metrics of what `attribute` scored, with 95% bootstrap intervals and paired tests over queries.

        `view` is `all` (a row per figure: mean_max_influence, ft_pt_ratio, ft_wins, pt_dominance, format_effect,
        difference, change), `influence` (the paper's Table I), `dominance` (Table II) or `comparisons` (difference of
        two sources and change since the checkpoint before, with q-values over the rows; with `checkpoint` no change).
        `p_value` tests that the mean difference over queries is 0: it speaks of queries like these, not of other models
        or seeds. Definitions: `lark_store.query.metrics`. `method` and `over_checkpoints` are those of `attribute`; a
        sum is found by its last checkpoint or by all of them. `scored_by` names the score.

        Raises
        ------
        NameUnknownError, NothingToScoreError, InputError
        """
        from lark_store.query.measure import measure
        from lark_store.query.methods import Method

        at = [] if checkpoint is None else _named(checkpoint)
        return measure(self._db, at, view, Method.of(method, over_checkpoints), self._sketcher(sketcher), query_variant)

    def coverage(
        self, *, checkpoint: str | None = None, sketcher: str | None = None, method: str | None = None
    ) -> pl.DataFrame:
        """Return how much of each source was looked at: of what is sketched or, with `method`, of what it scored.

        A row per sketcher, checkpoint, source and variant with n_samples (that the source has now), n_searched
        (sketches of committed runs, or samples that `attribute` scored), chosen (how they were chosen, where not all
        were to be taken) and note (in words, where it is not all). What is said of a source, its highest influence
        above all, is said of the samples that were searched.

        Raises
        ------
        NameUnknownError, InputError
        """
        from lark_store.query.coverage import coverage

        return coverage(self._db, checkpoint, sketcher, method)

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
        score_runs, sketches (without vectors), coverage, self_influence, studies, evaluations, failures, influence,
        source_influence.

        `parameters` are the values of `?` or `$1` (a sequence) or of `$name` (a mapping). The query ends with an error
        after `timeout` seconds, and when its work or its result needs more than `memory`; of a longer result the first
        `max_rows` rows are returned.

        Raises
        ------
        QueryError, InputError
        """
        from lark_store.query.sql.engine import run

        return run(self._db, query, parameters, timeout=timeout, memory=memory, max_rows=max_rows)
