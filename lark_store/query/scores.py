"""A question's scores: for a block of queries, every row's score by the question's method, and what it is made of.

- `cosine`: the cosine of sketches; `dot`: times both gradients' norms
- `bm25`, `bm25-okapi`, `bm25plus`: of the texts
- `hybrid`: z(cosine) + z(bm25), each over all rows that are searched for the query

Of several checkpoints, Σ of the score at each, or Σ of learning rate × score: `cosine-sum`, `cosine-lr-weighted` and so
on; `tracin` is `dot`, weighted (Pruthi et al. 2020, TracInCP). A hybrid's gradient part is the sum then.

Positive: training on the sample lowers the query's loss (to first order); of the lexical ones: the texts share words.
Shape letters: Q queries, N rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from lark_store.query.lexical import open_lexical, texts_of
from lark_store.query.rows import Rows, find_rows
from lark_store.query.scoring import Queries, load_queries, matrix, products
from lark_store.query.significance import sketch_noise, z_scores

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from lark_store.query.groups import Group, Question
    from lark_store.schema.database import Database

    Matrix = NDArray[np.float32]

DEFAULT_MEMORY = 1 << 30
_KEYS = ["source", "variant", "sample_id"]


@dataclass(frozen=True)
class Asked:
    """A block of queries: their sketches at each term (none for a lexical method) and their texts."""

    ids: list[str]
    sketches: list[Queries]
    texts: list[str]


@dataclass(frozen=True)
class Scores:
    """Scores (Q, N); `noise` (Q, N) is their standard deviation from sketching, None where nothing is sketched.

    `parts` holds a hybrid's scores by name; `scale` see `scoring.Products`.
    """

    score: Matrix
    noise: Matrix | None = None
    scale: Matrix | None = None
    parts: dict[str, Matrix] = field(default_factory=dict)


class Search:
    """The rows that a question searches, at each of its checkpoints, and their scores."""

    def __init__(
        self,
        db: Database,
        question: Question,
        *,
        condition: str | None = None,
        null_groups: Sequence[Group] = (),
        device: str = "auto",
        check: Callable[[], None] | None = None,
    ) -> None:
        self.db, self.question, self.device = db, question, device
        own = {group.source.name for group in question.groups}
        exempt = {group.source.name for group in null_groups}
        extra = [group for group in null_groups if group.source.name not in own]
        *before, last = [
            [*term.groups, *(group for group in extra if group.checkpoint.id == term.checkpoint.id)]
            for term in question.terms
        ]
        found = find_rows(db, last, condition, exempt=exempt, check=check)
        others = [find_rows(db, groups, check=check) for groups in before]
        self.of_terms = _common([*others, found])
        self.rows = self.of_terms[-1]

    @property
    def null_only(self) -> NDArray[np.bool_]:
        """Which rows are there as a null alone, (N)."""
        frame = self.rows.frame
        only = (frame["group"] >= len(self.question.groups)) | ~frame["chosen"]
        found: NDArray[np.bool_] = only.to_numpy()
        return found

    def blocks(self, ids: Sequence[str], memory: int = DEFAULT_MEMORY) -> Iterator[Asked]:
        """Yield the queries with these ids, block after block, as many as `memory` bytes hold with their scores."""
        queries = self.question.queries
        streamed = self.question.method.is_adding
        per_query = 4 * queries.sketcher.k * len(self.question.terms) + (0 if streamed else 16 * len(self.rows))
        block = max(1, memory // per_query)
        for start in range(0, len(ids), block):
            some = list(ids[start : start + block])
            yield self.asked(some)

    def asked(self, ids: list[str]) -> Asked:
        """Load queries that are in the store."""
        sketches = []
        if self.question.method.reads_sketches:
            for term in self.question.terms:
                assert term.queries is not None
                sketches.append(load_queries(self.db.vectors, term.queries, ids))
            ids = sketches[0].ids
        reads_texts = self.question.method.engine is not None
        texts = texts_of(self.db, self.question.queries.source.name, ids) if reads_texts else [""] * len(ids)
        return Asked(ids, sketches, texts)

    def scores(self, asked: Asked, *, scales: bool = False) -> Scores:
        """Return every row's scores for a block of queries."""
        method = self.question.method
        if not method.reads_sketches:
            return Scores(self._lexical(asked))
        made = self._summed(asked) if method.over else self._at(0, asked, scales=scales)
        if method.base != "hybrid":
            return made
        parts = {"cosine": made.score, "bm25": self._lexical(asked)}
        score = z_scores(parts["cosine"]) + z_scores(parts["bm25"])
        return Scores(score.astype(np.float32), parts=parts)

    def stream(self, asked: Asked) -> Iterator[tuple[NDArray[np.int64], Matrix]]:
        """Yield rows' numbers (B) and their scores (Q, B): as they are read if that gives the score, else at once."""
        method = self.question.method
        if not method.is_adding:
            yield np.arange(len(self.rows)), self.scores(asked).score
            return
        (queries,) = asked.sketches
        norm_N = self.rows.frame["grad_norm"].to_numpy()
        for made in products(self.rows, queries, device=self.device):
            scores = made.cosine_QB.numpy()
            if method.base == "dot":
                scores *= queries.norm_Q.numpy()[:, None] * norm_N[made.numbers][None, :]
            yield made.numbers, scores

    def of_candidates(self, query: Queries, numbers: NDArray[np.int64]) -> Scores:
        """Return the scores of some rows for one query, by `cosine` or `dot`."""
        some = self.rows.only(numbers)
        return self._of_cosines(matrix(some, query, device=self.device)[0], query, some)

    def _lexical(self, asked: Asked) -> Matrix:
        engine = self.question.method.engine
        assert engine is not None
        return open_lexical(self.db, engine).of_rows(self.rows, asked.texts)

    def _at(self, term: int, asked: Asked, *, scales: bool = False) -> Scores:
        """Return the scores of gradients at one term's checkpoint."""
        rows, queries = self.of_terms[term], asked.sketches[term]
        cosine, scale = matrix(rows, queries, device=self.device, scales=scales)
        return self._of_cosines(cosine, queries, rows, scale)

    def _of_cosines(self, cosine: Matrix, queries: Queries, rows: Rows, scale: Matrix | None = None) -> Scores:
        noise = sketch_noise(cosine, queries.unit_QK.shape[1]).astype(np.float32)
        if self.question.method.gradient == "cosine":
            return Scores(cosine, noise, scale)
        norms = queries.norm_Q.numpy()[:, None] * rows.frame["grad_norm"].to_numpy()[None, :]
        return Scores(cosine * norms, noise * norms, None if scale is None else scale * norms)

    def _summed(self, asked: Asked) -> Scores:
        """Return Σ weight × score over the terms; their noises are taken to be independent."""
        score = np.zeros((len(asked.ids), len(self.rows)), np.float32)
        variance: Matrix | None = np.zeros_like(score)
        for number, term in enumerate(self.question.terms):
            made = self._at(number, asked)
            score += term.weight * made.score
            variance = None if variance is None or made.noise is None else variance + (term.weight * made.noise) ** 2
        return Scores(score, None if variance is None else np.sqrt(variance))


def query_ids(db: Database, question: Question) -> list[str]:
    """Return the ids of the queries that have a sketch at each of the question's checkpoints, sorted."""
    groups = [term.queries for term in question.terms if term.queries]
    return sorted(set.intersection(*[_ids(db, group) for group in groups]))


def _ids(db: Database, group: Group) -> set[str]:
    """Return the ids of a group's rows; an open store remembers them."""
    state = (group.table, db.vectors.table(group.table).version, group.filter)

    def read() -> set[str]:
        return set(db.vectors.read(group.table, ["sample_id"], group.filter)["sample_id"])

    return db.remember(f"queries {group.checkpoint.name} {group.label}", state, read)


def _common(terms: list[Rows]) -> list[Rows]:
    """Keep the samples that every term has, in the order of the last."""
    if len(terms) == 1:
        return terms
    shared = terms[-1].frame.select(_KEYS).with_row_index(f"_{len(terms) - 1}")
    for number, rows in enumerate(terms[:-1]):
        numbered = rows.frame.select(_KEYS).with_row_index(f"_{number}")
        shared = shared.join(numbered, on=_KEYS, maintain_order="left")
    return [rows.only(shared[f"_{number}"].cast(pl.Int64).to_numpy()) for number, rows in enumerate(terms)]
