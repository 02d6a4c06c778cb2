"""Scores of a question: every row's score for a block of queries by the question's method, and its parts.

`lark_store.query.methods` has the methods; here are the rows and sums that they read.

For several checkpoints, Σ score or Σ learning rate × score over the checkpoints: `cosine-sum`, `cosine-lr-weighted` and
so on; `tracin` is `dot`, weighted (Pruthi et al. 2020, TracInCP). A hybrid sums its gradient part.

Positive: training on the sample lowers the query's loss (to first order); for lexical scores: the texts share words.
Shape letters: Q queries, N rows.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from lark_store.errors import StoreBusyError
from lark_store.query.scoring.bm25 import Lexical, open_lexical, texts_of
from lark_store.query.scoring.geometry import Place
from lark_store.query.scoring.products import Queries, QueryBatch, Scores, load_queries, matrix, products
from lark_store.query.select.rows import Rows, find_rows
from lark_store.specs import Compute

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from lark_store.query.methods.base import ScoringMethod
    from lark_store.query.scoring.geometry import Geometry
    from lark_store.query.select.resolve import Group, Question
    from lark_store.schema.database import Database

    Matrix = NDArray[np.float32]

DEFAULT_MEMORY = Compute.memory
_KEYS = ["source", "variant", "sample_id"]


class Search:
    """The searched rows of a question at each of its checkpoints, and their scores."""

    def __init__(
        self,
        db: Database,
        question: Question,
        *,
        condition: str | None = None,
        null_groups: Sequence[Group] = (),
        device: str = "auto",
        memory: int = DEFAULT_MEMORY,
        check: Callable[[], None] | None = None,
        without: tuple[str, str] | None = None,
    ) -> None:
        """Find the rows; `without` is the source and the id of a sample to leave out."""
        self.db, self.question, self.device, self.memory = db, question, device, memory
        searched = {group.source.name for group in question.groups}
        exempt = {group.source.name for group in null_groups}
        extra = [group for group in null_groups if group.source.name not in searched]
        *before, last = [
            [*term.groups, *(group for group in extra if group.checkpoint.id == term.checkpoint.id)]
            for term in question.terms
        ]
        last_rows = find_rows(db, last, condition, exempt=exempt, check=check)
        earlier_rows = [find_rows(db, groups, check=check) for groups in before]
        self.of_terms = _common([*earlier_rows, last_rows])
        n_rows = len(self.of_terms[-1])
        if without is not None:
            self.of_terms = [_without(rows, *without) for rows in self.of_terms]
        self.n_left_out = n_rows - len(self.of_terms[-1])
        self.rows = self.of_terms[-1]

    @property
    def null_only(self) -> NDArray[np.bool_]:
        """Which rows are used only as a null, (N)."""
        frame = self.rows.frame
        only = (frame["group"] >= len(self.question.groups)) | ~frame["chosen"]
        mask: NDArray[np.bool_] = only.to_numpy()
        return mask

    @cached_property
    def geometries(self) -> list[Geometry]:
        """The geometry of each term; none where plain products of sketches suffice."""
        geometry = self.question.method.scoring.geometry()
        if geometry is None:
            return []
        searched = np.flatnonzero(~self.null_only)
        memory = self.memory // len(self.of_terms)
        return [
            geometry(Place(self.db, rows, searched, number, memory, self.device))
            for number, rows in enumerate(self.of_terms)
        ]

    @cached_property
    def lexical(self) -> Lexical:
        """The lexical index, the same for all blocks even if samples are added meanwhile."""
        assert self.question.method.engine is not None
        return open_lexical(self.db, self.question.method.engine)

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes on the scores for the reader."""
        of_geometries = dict.fromkeys(note for geometry in self.geometries for note in geometry.notes)
        return (*self.question.notes, *of_geometries, *rising_losses(self.db, self.question))

    def blocks(self, ids: Sequence[str]) -> Iterator[QueryBatch]:
        """Yield the queries with these ids in blocks that fit into `memory` bytes with their scores."""
        method, k = self.question.method, self.question.queries.sketcher.k
        sketches_per_query = len(self.question.terms) + (method.scoring.geometry() is not None)
        per_query = 4 * k * sketches_per_query + (0 if method.is_adding else 16 * len(self.rows))
        block = max(1, self.memory // per_query)
        for start in range(0, len(ids), block):
            yield self.load(list(ids[start : start + block]))

    def load(self, ids: list[str]) -> QueryBatch:
        """Load stored queries."""
        sketches = []
        if self.question.method.reads_sketches:
            for term in self.question.terms:
                assert term.queries is not None
                sketches.append(load_queries(self.db.vectors, term.queries, ids))
            if any(term_sketches.ids != sorted(ids) for term_sketches in sketches):
                raise _replaced()
            ids = sketches[0].ids
        reads_texts = self.question.method.engine is not None
        try:
            texts = texts_of(self.db, self.question.queries.source.name, ids) if reads_texts else [""] * len(ids)
        except KeyError as error:
            raise _replaced() from error
        return QueryBatch(ids, sketches, texts, self.question.queries.variant.name)

    def scores(self, batch: QueryBatch, *, scales: bool = False) -> Scores:
        """Return every row's scores for a block of queries."""
        return self.question.method.scoring.scores(self, batch, scales=scales)

    def stream(self, batch: QueryBatch) -> Iterator[tuple[NDArray[np.int64], Matrix]]:
        """Yield row numbers (B) and scores (Q, B): as rows are read if scores allow it, else all at once."""
        method = self.question.method
        if not method.is_adding:
            yield np.arange(len(self.rows)), self.scores(batch).score
            return
        (queries,) = batch.sketches
        norm_N = self.rows.frame["grad_norm"].to_numpy()
        for product in products(self.rows, queries, device=self.device):
            norms = (queries.norm_Q, norm_N[product.numbers])
            yield product.numbers, method.scoring.weighted(product.cosine_QB, *norms)

    def stream_with_noise(self, batch: QueryBatch) -> Iterator[tuple[NDArray[np.int64], Scores]]:
        """Yield the same with the scores' noise."""
        method = self.question.method
        if not method.is_adding:
            yield np.arange(len(self.rows)), self.scores(batch)
            return
        (queries,) = batch.sketches
        norms = replace(self.rows, frame=self.rows.frame.select("grad_norm"))
        for product in products(self.rows, queries, device=self.device):
            rows = norms.only(product.numbers)
            yield product.numbers, method.scoring.of_cosines(product.cosine_QB, queries, rows)

    def of_candidates(self, query: Queries, numbers: NDArray[np.int64]) -> Scores:
        """Return the scores of some rows for one query, by an adding method."""
        rows = self.rows.only(numbers)
        return self.question.method.scoring.of_cosines(matrix(rows, query, device=self.device)[0], query, rows)

    def lexical_scores(self, batch: QueryBatch) -> Matrix:
        """Return the lexical scores of every row for a block of queries, (Q, N)."""
        return self.lexical.of_rows(self.rows, batch.texts)

    def summed(self, scoring: ScoringMethod, batch: QueryBatch, *, scales: bool = False) -> Scores:
        """Return the scores at the only checkpoint, or Σ weight × score over several.

        The terms of a sum share the map, so their noises are added: an upper bound.
        """
        if not self.question.method.over:
            return scoring.scores_at(self, 0, batch, scales=scales)
        score = np.zeros((len(batch.ids), len(self.rows)), np.float32)
        noise: Matrix | None = np.zeros_like(score)
        for number, term in enumerate(self.question.terms):
            term_scores = scoring.scores_at(self, number, batch)
            score += term.weight * term_scores.score
            noise = None if noise is None or term_scores.noise is None else noise + term.weight * term_scores.noise
        return Scores(score, noise)


def _replaced() -> StoreBusyError:
    return StoreBusyError("queries were removed or replaced during the search", "run the command again")


def rising_losses(db: Database, question: Question) -> Iterator[str]:
    """Yield a warning for each checkpoint of a sum where the queries' mean loss is higher than before.

    Including a checkpoint that has memorised the training samples makes a sum worse.
    """
    if len(question.terms) < 2 or not all(term.queries for term in question.terms):
        return
    ids = query_ids(db, question)
    lowest: tuple[float, str] | None = None
    for term in question.terms:
        assert term.queries is not None
        losses = db.vectors.read(term.queries.table, ["sample_id", "loss"], term.queries.filter)
        loss, name = losses.filter(pl.col("sample_id").is_in(ids))["loss"].cast(pl.Float64).mean(), term.checkpoint.name
        assert isinstance(loss, float)
        if lowest is not None and loss > lowest[0]:
            flags = " ".join(f"--checkpoint {kept_name}" for kept_name in question.checkpoints if kept_name != name)
            yield (
                f"the queries' mean loss rises from {lowest[0]:.3g} at `{lowest[1]}` to {loss:.3g} at `{name}`: that "
                f"checkpoint is overfitted and makes the sum worse\n\nhint: leave it out: `{flags}`"
            )
        else:
            lowest = (loss, name)


def query_ids(db: Database, question: Question) -> list[str]:
    """Return the sorted ids of the queries with a sketch at each of the question's checkpoints."""
    groups = [term.queries for term in question.terms if term.queries]
    return sorted(set.intersection(*[_ids(db, group) for group in groups]))


def _ids(db: Database, group: Group) -> set[str]:
    """Return the ids of a group's rows, cached by an open store."""
    state = (group.table, db.vectors.table(group.table).version, group.filter)

    def read() -> set[str]:
        return set(db.vectors.read(group.table, ["sample_id"], group.filter)["sample_id"])

    return db.remember(f"queries {group.checkpoint.name} {group.label}", state, read)


def _without(rows: Rows, source: str, sample_id: str) -> Rows:
    """Return rows without those of one sample."""
    keep = ~((rows.frame["source"] == source) & (rows.frame["sample_id"] == sample_id))
    return rows.only(np.flatnonzero(keep.to_numpy()))


def _common(terms: list[Rows]) -> list[Rows]:
    """Return the rows of each term limited to the samples in all terms, in the order of the last."""
    if len(terms) == 1:
        return terms
    shared = terms[-1].frame.select(_KEYS).with_row_index(f"_{len(terms) - 1}")
    for number, rows in enumerate(terms[:-1]):
        numbered = rows.frame.select(_KEYS).with_row_index(f"_{number}")
        shared = shared.join(numbered, on=_KEYS, maintain_order="left")
    return [rows.only(shared[f"_{number}"].cast(pl.Int64).to_numpy()) for number, rows in enumerate(terms)]
