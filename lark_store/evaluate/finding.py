"""`facts`: whether a score finds the samples that are known to state a query's answer.

A query's own samples are those with its value of a metadata key. Ties count against the method: of equal scores, its
own samples come last.

    mrr           1 / rank of the best of the query's own samples among all candidates
    recall@k      its own samples among the first k / min(k, its own samples)

The rerank protocol (Akyürek et al. 2022) asks the same among candidates that are hard to tell apart: the query's own
samples, the 100 best by BM25, 100 with the same answer (the response, or a text that holds it) and 100 at random; three
trials draw anew. Finding the sample that states a fact is not influence: read it beside `causal` and `lds`.

Shape letters: Q queries, N samples.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lark_store.errors import InputError
from lark_store.evaluate.task import Task
from lark_store.store.part import clear

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Unpack

    from numpy.typing import NDArray

    from lark_store.evaluate.material import Material
    from lark_store.evaluate.scorers import Asked
    from lark_store.evaluate.task import Options, Outcome
    from lark_store.store import Store

    Flags = NDArray[np.bool_]

OF_EACH = 100  # candidates of each sort in the rerank protocol


@clear
def facts(
    store: Store,
    scores: Sequence[Asked],
    *,
    key: str,
    at: Sequence[int] = (1, 10),
    rerank: bool = False,
    trials: int = 3,
    **options: Unpack[Options],
) -> Outcome:
    """Rank each query's own samples, which have its value of the metadata `key`, among all candidates.

    Measures: `mrr` and `recall@k` for each k of `at`; with `rerank` also `rerank mrr` and `rerank recall@k` of the
    rerank protocol in `trials` trials. Queries without an own sample among the candidates are left out.

    Raises
    ------
    InputError
        No query has an own sample; k or the trials are no number of 1 or more.
    NameUnknownError, NothingToScoreError
    """
    if not at or min(at) < 1 or trials < 1:
        raise InputError("recall@k and trials are counted from 1", "such as `--at 10 --trials 3`")
    task = Task("facts", store, scores, **options)
    own_QN = task.material.own(key)
    if not own_QN.any():
        raise InputError(
            f"no query has the same value of `{key}` as a sample",
            "`--key` names a column of the metadata of both",
        )
    without = int((~own_QN.any(axis=1)).sum())
    if without:
        task.notes.append(f"{without} of {len(own_QN)} queries have no own sample among the candidates: left out")
    every = np.ones_like(own_QN)
    for name, score_QN in task.matrices.items():
        for measure, value_Q in found(score_QN, own_QN, every, at).items():
            task.add(name, measure, value_Q)
    if rerank:
        _rerank(task, own_QN, at, trials)
    return task.finish(key=key, at=list(at), rerank=rerank, trials=trials if rerank else None)


def found(score_QN: NDArray[Any], own_QN: Flags, pool_QN: Flags, at: Sequence[int]) -> dict[str, NDArray[np.float64]]:
    """Return `mrr` and `recall@k` of each query, (Q,) each, among its pool's samples; NaN where none is its own."""
    made = {name: np.full(len(own_QN), np.nan) for name in ("mrr", *(f"recall@{k}" for k in at))}
    for q, (scores, own, pool) in enumerate(zip(score_QN, own_QN, pool_QN, strict=True)):
        if not (own & pool).any():
            continue
        is_own = own[pool][np.lexsort((own[pool], -scores[pool]))]  # best first, of equal ones an own sample last
        places = np.flatnonzero(is_own)
        made["mrr"][q] = 1 / (places[0] + 1)
        for k in at:
            made[f"recall@{k}"][q] = (places < k).sum() / min(k, len(places))
    return made


def _rerank(task: Task, own_QN: Flags, at: Sequence[int], trials: int) -> None:
    """Add the figures of the rerank protocol."""
    bm25_QN, alike_QN = task.rival("bm25"), same_answer(task.material)
    matrices = task.matrices
    pools = [pools_of(own_QN, bm25_QN, alike_QN, [task.seed, trial]) for trial in range(trials)]
    if all(pool_QN.all() for pool_QN in pools):
        task.notes.append(f"rerank: its candidates are all {own_QN.shape[1]} samples, so it says what the rest says")
    for name, score_QN in matrices.items():
        for trial, pool_QN in enumerate(pools):
            for measure, value_Q in found(score_QN, own_QN, pool_QN, at).items():
                task.add(name, f"rerank {measure}", value_Q, trial)


def same_answer(material: Material) -> Flags:
    """Tell which samples have a query's answer, (Q, N): its response as theirs, or within their text."""
    rows = []
    for query in material.queries:
        answer = (query.sample.response or "").strip()
        samples = (text.sample for text in material.samples)
        rows.append([bool(answer) and (answer == s.response if s.text is None else answer in s.text) for s in samples])
    return np.array(rows, dtype=bool)


def pools_of(own_QN: Flags, bm25_QN: NDArray[Any], alike_QN: Flags, seed: list[int]) -> Flags:
    """Return the candidates of one trial of the rerank protocol, (Q, N) bool."""
    pool_QN = own_QN.copy()
    for q, pool in enumerate(pool_QN):
        rng = np.random.default_rng([*seed, q])
        pool[np.argsort(-bm25_QN[q], kind="stable")[:OF_EACH]] = True
        for among in (alike_QN[q], np.ones_like(pool)):
            rest = np.flatnonzero(among & ~pool)
            pool[rng.permutation(rest)[:OF_EACH]] = True
    return pool_QN
