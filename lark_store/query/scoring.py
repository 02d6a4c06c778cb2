"""The scoring pass: stream sketches, multiply them with the queries', keep what is asked. Memory does not grow with N.

Shape letters: Q queries, B rows of a batch, K sketch bins, N samples of a group, H hits kept per query.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lark_store.schema.vectors import ROWS_PER_BATCH, where

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pyarrow as pa

    from lark_store.query.groups import Group
    from lark_store.schema.vectors import VectorStore


@dataclass(frozen=True)
class Queries:
    """Query sketches in memory: `ids` (Q), `unit_QK` float32 with norm 1, `norm_Q` the gradients' norms."""

    ids: list[str]
    unit_QK: torch.Tensor
    norm_Q: torch.Tensor


@dataclass(frozen=True)
class GroupScores:
    """One group's scores against Q queries.

    `top_ids`, `top_scores` (Q, H) hold the highest scores of each query, best first, ties by sample id (which of
    those that tie for the last place is kept is not said);
    `max_Q`, `mean_Q`, `std_Q` (the population's) and `argmax` are over all N samples.
    """

    top_ids: np.ndarray[Any, Any]
    top_scores: np.ndarray[Any, Any]
    max_Q: np.ndarray[Any, Any]
    argmax: np.ndarray[Any, Any]
    mean_Q: np.ndarray[Any, Any]
    std_Q: np.ndarray[Any, Any]
    n: int


def vectors_of(batch: pa.RecordBatch) -> torch.Tensor:
    """Return a batch's sketches, (B, K) float32 with norm 1."""
    column = batch.column("vector")
    k = column.type.list_size
    flat = column.flatten().to_numpy(zero_copy_only=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # it is only read
        stored = torch.from_numpy(flat).view(-1, k)
    scaled: torch.Tensor = stored.float() * k**-0.5
    return scaled


def _norms(batch: pa.RecordBatch) -> torch.Tensor:
    return torch.tensor(batch.column("grad_norm").to_numpy(), dtype=torch.float32)


def load_queries(vectors: VectorStore, group: Group, ids: list[str] | None = None) -> Queries:
    """Read the sketches of a group's queries, or of those with the given ids, in order of id."""
    chosen = group.filter if ids is None else f"{group.filter} AND {where(sample_id=ids)}"
    names: list[str] = []
    parts, norms = [], []
    for batch in vectors.scan(group.table, ["sample_id", "grad_norm", "vector"], chosen, ROWS_PER_BATCH):
        names += batch.column("sample_id").to_pylist()
        parts.append(vectors_of(batch))
        norms.append(_norms(batch))
    order = sorted(range(len(names)), key=names.__getitem__)
    if not order:
        return Queries([], torch.empty(0, 0), torch.empty(0))
    return Queries([names[i] for i in order], torch.cat(parts)[order], torch.cat(norms)[order])


def score_batches(
    vectors: VectorStore, group: Group, queries: Queries, method: str
) -> Iterator[tuple[list[str], torch.Tensor]]:
    """Yield sample ids (B) and their scores (Q, B) float32, batch by batch.

    `cosine` is the cosine of sketches; `dot` the cosine times both gradients' norms. Positive: training on the sample
    lowers the query's loss (to first order).
    """
    for batch in vectors.scan(group.table, ["sample_id", "grad_norm", "vector"], group.filter, ROWS_PER_BATCH):
        scores = queries.unit_QK @ vectors_of(batch).T
        if method == "dot":
            scores *= queries.norm_Q[:, None] * _norms(batch)[None, :]
        yield batch.column("sample_id").to_pylist(), scores


class _Top:
    """The H best of each query over a stream."""

    def __init__(self, n_queries: int, hits: int) -> None:
        self.hits = hits
        self.n = 0
        self.scores_QH = torch.empty(n_queries, 0)
        self.ids_QH = np.empty((n_queries, 0), dtype=object)

    def take(self, ids: list[str], scores_QB: torch.Tensor) -> None:
        names = np.broadcast_to(np.array(ids, dtype=object), tuple(scores_QB.shape))
        scores = torch.cat([self.scores_QH, scores_QB], dim=1)
        self.scores_QH, kept = scores.topk(min(self.hits, scores.shape[1]), dim=1)
        self.ids_QH = np.take_along_axis(np.concatenate([self.ids_QH, names], axis=1), kept.numpy(), 1)
        self.n += len(ids)

    def result(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Return the ids and scores, (Q, ≤H), best first, ties in order of id."""
        ids, scores = self.ids_QH, self.scores_QH.numpy()
        by_id = np.argsort(ids, axis=1)
        by_score = np.argsort(-np.take_along_axis(scores, by_id, 1), axis=1, kind="stable")
        order = np.take_along_axis(by_id, by_score, 1)
        return np.take_along_axis(ids, order, 1), np.take_along_axis(scores, order, 1)


def score_group(vectors: VectorStore, group: Group, queries: Queries, method: str, hits: int) -> GroupScores | None:
    """Score one group in one pass over its sketches; None if it holds none."""
    top = _Top(len(queries.ids), hits)
    total_Q = torch.zeros(len(queries.ids), dtype=torch.float64)
    square_Q = torch.zeros_like(total_Q)
    for ids, scores_QB in score_batches(vectors, group, queries, method):
        exact = scores_QB.double()
        total_Q += exact.sum(dim=1)
        square_Q += exact.square().sum(dim=1)
        top.take(ids, scores_QB)
    n = top.n
    if n == 0:
        return None
    top_ids, top_scores = top.result()
    mean_Q = total_Q / n
    std_Q = (square_Q / n - mean_Q.square()).clamp(min=0).sqrt()
    return GroupScores(
        top_ids, top_scores, top_scores[:, 0], top_ids[:, 0], mean_Q.float().numpy(), std_Q.float().numpy(), n
    )
