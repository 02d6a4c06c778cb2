"""`facts`: whether a score finds the samples known to state a query's answer.

A query's own samples share its value of a metadata key. Ties count against the method: among equal scores, own samples
rank last.

    mrr           1 / rank of the query's best own sample among all candidates
    recall@k      own samples among the top k / min(k, number of own samples)

The rerank protocol (Akyürek et al. 2022) uses candidates that are hard to separate: the query's own samples, the top
100 by BM25, 100 with the same answer (as response, or within the text) and 100 at random. All queries of a trial share
the random ones; each trial draws anew. BM25 is rank-bm25's, as in the multi-stage paper, or the faster `bm25`. Finding
the sample that states a fact is not influence: read it beside `causal` and `lds`.

Shape letters: Q queries, N samples.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lark_store.core.text import coded, joined
from lark_store.errors import InputError
from lark_store.evaluate.evaluation import Task
from lark_store.specs import EvaluateSpec, FactsSpec, build
from lark_store.store.base import clear, keywords

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Unpack

    from numpy.typing import NDArray

    from lark_store.evaluate.dataset import Material
    from lark_store.evaluate.evaluation import Outcome
    from lark_store.evaluate.scorers import ScoreSpec
    from lark_store.results import OnProgress
    from lark_store.specs import FactsOptions
    from lark_store.store import Store

    Flags = NDArray[np.bool_]

POOL_ENGINES = ("bm25-okapi", "bm25")
POOL_SIZE = 100  # candidates of each kind in the rerank protocol


@clear
@keywords(FactsSpec, EvaluateSpec)
def facts(
    store: Store,
    scores: Sequence[ScoreSpec],
    *,
    key: str,
    on_progress: OnProgress | None = None,
    **options: Unpack[FactsOptions],
) -> Outcome:
    """Rank each query's own samples among all candidates; own samples share its value of the metadata `key`.

    Measures: `mrr` and `recall@k` for each k of `at`; with `rerank` also `rerank mrr` and `rerank recall@k`, over
    `trials` trials of the rerank protocol. Queries without an own sample among the candidates are skipped.

    Raises
    ------
    InputError
        No query has an own sample; a k or `trials` is below 1.
    NameUnknownError, NothingToScoreError
    """
    spec = build(FactsSpec, options)
    if not spec.at or min(spec.at) < 1 or spec.trials < 1:
        raise InputError("k of recall@k and the trials must be at least 1", "for example `--at 10 --trials 3`")
    task = Task("facts", store, scores, build(EvaluateSpec, options), on_progress)
    own_QN = task.material.own(key)
    if not own_QN.any():
        raise InputError(
            f"no query has the same value of `{key}` as a sample",
            "choose with `--key` a metadata column of both",
        )
    recipe: dict[str, Any] = {"key": key, "at": list(spec.at), "rerank": spec.rerank, "trials": None}
    if spec.rerank:
        if spec.pool_by not in POOL_ENGINES:
            raise InputError(
                f"`{spec.pool_by}` can't choose the pool", f"use {joined(coded(POOL_ENGINES), 'or')} for `--pool-by`"
            )
        recipe |= {"trials": spec.trials, "pool_by": spec.pool_by}
    task.prepare(also=POOL_ENGINES if spec.rerank else (), **recipe)
    without = int((~own_QN.any(axis=1)).sum())
    if without:
        task.notes.append(f"skipped {without} of {len(own_QN)} queries without an own sample among the candidates")
    every = np.ones_like(own_QN)
    for name, score_QN in task.matrices.items():
        for measure, value_Q in rank_metrics(score_QN, own_QN, every, spec.at).items():
            task.add(name, measure, value_Q)
    if spec.rerank:
        _rerank(task, own_QN, spec)
    return task.finish()


def rank_metrics(
    score_QN: NDArray[Any], own_QN: Flags, pool_QN: Flags, cutoffs: Sequence[int]
) -> dict[str, NDArray[np.float64]]:
    """Return `mrr` and `recall@k` of each query within its pool, (Q,) each; NaN where the pool has no own sample."""
    metrics = {name: np.full(len(own_QN), np.nan) for name in ("mrr", *(f"recall@{k}" for k in cutoffs))}
    for q, (scores, own, pool) in enumerate(zip(score_QN, own_QN, pool_QN, strict=True)):
        if not (own & pool).any():
            continue
        is_own = own[pool][np.lexsort((own[pool], -scores[pool]))]  # best first; among ties, own samples last
        places = np.flatnonzero(is_own)
        metrics["mrr"][q] = 1 / (places[0] + 1)
        for k in cutoffs:
            metrics[f"recall@{k}"][q] = (places < k).sum() / min(k, len(places))
    return metrics


def _rerank(task: Task, own_QN: Flags, spec: FactsSpec) -> None:
    """Add the figures of the rerank protocol."""
    by_engine, alike_QN = {name: task.baseline(name) for name in POOL_ENGINES}, same_answer(task.material)
    matrices, cutoffs = task.matrices, spec.at
    task.notes.append(agreement(by_engine))
    seeds = [[task.spec.seed, trial] for trial in range(spec.trials)]
    pools = [draw_pools(own_QN, by_engine[spec.pool_by], alike_QN, seed) for seed in seeds]
    if all(pool_QN.all() for pool_QN in pools):
        task.notes.append(f"rerank: the pool holds all {own_QN.shape[1]} samples, so its figures add nothing")
    for name, score_QN in matrices.items():
        for trial, pool_QN in enumerate(pools):
            for measure, value_Q in rank_metrics(score_QN, own_QN, pool_QN, cutoffs).items():
                task.add(name, f"rerank {measure}", value_Q, trial)


def same_answer(material: Material) -> Flags:
    """Return which samples contain a query's answer, (Q, N): as their response, or within their text."""
    rows = []
    for query in material.queries:
        answer = query.sample.answer.strip()
        samples = (text.sample for text in material.samples)
        rows.append(
            [bool(answer) and (answer == s.answer.strip() if s.text is None else answer in s.text) for s in samples]
        )
    return np.array(rows, dtype=bool)


def agreement(by_engine: dict[str, NDArray[Any]]) -> str:
    """Tell how many of the first `POOL_SIZE` samples two BM25 engines have in common, over all queries."""
    (one, one_QN), (other, other_QN) = by_engine.items()
    first = [[set(_first(score_N)) for score_N in score_QN] for score_QN in (one_QN, other_QN)]
    shared = sum(len(left & right) for left, right in zip(*first, strict=True)) / sum(map(len, first[0]))
    return f"rerank: `{one}` and `{other}` agree on {shared:.1%} of each query's first {len(first[0][0])} samples"


def _first(score_N: NDArray[Any]) -> list[int]:
    places: list[int] = np.argsort(-score_N, kind="stable")[:POOL_SIZE].tolist()
    return places


def draw_pools(own_QN: Flags, bm25_QN: NDArray[Any], alike_QN: Flags, seed: list[int]) -> Flags:
    """Return the candidates of one trial of the rerank protocol, (Q, N) bool; the random ones are those of all queries.

    A query's pool is smaller where these candidates overlap.
    """
    pool_QN = own_QN.copy()
    pool_QN[:, np.random.default_rng(seed).permutation(own_QN.shape[1])[:POOL_SIZE]] = True
    for q, pool in enumerate(pool_QN):
        pool[_first(bm25_QN[q])] = True
        alike = np.flatnonzero(alike_QN[q] & ~own_QN[q])
        pool[np.random.default_rng([*seed, q]).permutation(alike)[:POOL_SIZE]] = True
    return pool_QN
