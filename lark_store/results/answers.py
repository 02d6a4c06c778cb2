"""Answers of `top` and `scores`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from lark_store.core.names import SUM_SEPARATOR
from lark_store.results.tabular import Convertible, Tabular

if TYPE_CHECKING:
    import numpy as np
    import polars as pl
    from numpy.typing import NDArray

    from lark_store.display.table import About

SIGNIFICANT = 0.05  # false discovery rate of significant hits


@dataclass(frozen=True)
class Hit:
    """One sample found by `top`. `more` has further columns, such as the two parts of a hybrid score.

    `noise` is the score's standard deviation from sketching; it, `p_value` and `q_value` are None where not computed.
    """

    rank: int
    score: float
    noise: float | None
    p_value: float | None
    q_value: float | None
    source: str
    stage: str
    variant: str
    sample_id: str
    text: str
    more: dict[str, Any] = field(default_factory=dict)


_OF_HIT = {field.name for field in fields(Hit)} - {"more"}


@dataclass(frozen=True, repr=False)
class Hits(Tabular[Hit]):
    """The result of `top`: a sequence of `Hit`, best first, with details of the search.

    `frame` has the columns rank, score, noise (the score's standard deviation from sketching, in the score's unit),
    p_value and q_value (against `null`), source, stage, variant, sample_id and text; hybrid scores add cosine,
    cosine_rank, bm25 and bm25_rank. Missing values are null. `score` names the score, such as `lark · cosine`; `notes`
    list caveats, such as a partly searched source; `scale` tells how to read the score. polars, pandas and
    DuckDB read it directly.
    """

    frame: pl.DataFrame
    query_id: str
    checkpoint: str
    query_checkpoint: str
    query_variant: str
    method: str
    n_searched: int
    ingest_runs: list[int]
    score: str
    exact: bool = True
    condition: str | None = None
    null: str = "none"
    recall: float | None = None
    candidates: int | None = None
    notes: tuple[str, ...] = ()
    scale: str = ""

    @property
    def _rows(self) -> pl.DataFrame:
        return self.frame

    def _item(self, row: dict[str, Any]) -> Hit:
        more = {name: value for name, value in row.items() if name not in _OF_HIT}
        return Hit(**{name: row[name] for name in _OF_HIT}, more=more)

    def __repr__(self) -> str:
        return f"{super().__repr__()}\n{self.how}"

    @property
    def about(self) -> About:
        """What to print around the table of the hits."""
        from lark_store.display.table import About

        facts = {"query": self.query_id, "checkpoint": self.checkpoint, "scored_by": self.score}
        return About(facts=facts, legend=[f"score: {self.scale}"] if self.scale else [])

    @property
    def n_significant(self) -> int:
        """Number of hits with q ≤ 0.05."""
        return int((self.frame["q_value"] <= SIGNIFICANT).sum())

    @property
    def how(self) -> str:
        """A summary of the search: exact or approximate, the sketches searched, their runs, and significant hits."""
        runs = ", ".join(map(str, self.ingest_runs))
        is_same_checkpoint = self.query_checkpoint in self.checkpoint.split(SUM_SEPARATOR)
        query = "" if is_same_checkpoint else f", query at `{self.query_checkpoint}`"
        condition = f" where {self.condition}" if self.condition else ""
        is_sum = " over " in self.score
        sketches = f", over {self.n_searched} sketches at each"
        if not is_sum:
            sketches = f" over {self.n_searched} sketches at `{self.checkpoint}`"
        return (
            f"{self._kind} {self.score}{sketches}{condition}{query}, "
            f"query as `{self.query_variant}`; ingest runs {runs}{self._significance}"
            + "".join(f"\nnote: {note}" for note in self.notes)
        )

    @property
    def _kind(self) -> str:
        if self.exact:
            return "exact"
        return f"approximate (recall@10 {self.recall:.3f} when measured, {self.candidates} candidates)"

    @property
    def _significance(self) -> str:
        if self.null == "none":
            return ""
        null = {"sources": "the other sources' samples", "signs": "shuffled signs"}.get(self.null, f"`{self.null}`")
        n = self.n_significant
        result = f"{n} of {len(self)} hits" if n else "nothing significant"
        return f"\nagainst {null}: {result} at q ≤ {SIGNIFICANT}"


@dataclass(frozen=True, repr=False)
class Trace(Tabular[Hit]):
    """The result of `trace`: a model's own answer to a question, and the samples with the most influence on it.

    A sequence of `Hit`, those of `hits`. `log_probability` is the mean over the answer's `n_tokens` tokens, in nats.
    `is_complete` tells whether the model ended the answer itself.
    """

    question: str
    answer: str
    log_probability: float
    n_tokens: int
    is_complete: bool
    hits: Hits

    @property
    def frame(self) -> pl.DataFrame:
        """The rows of `hits`."""
        return self.hits.frame

    @property
    def _rows(self) -> pl.DataFrame:
        return self.hits.frame

    def _item(self, row: dict[str, Any]) -> Hit:
        return self.hits._item(row)  # noqa: SLF001  # of the same module

    @property
    def about(self) -> About:
        """What to print around the table of the hits: the answer too."""
        hits = self.hits.about
        return replace(hits, facts={"answer": self.answer, **hits.facts})

    @property
    def said(self) -> str:
        """The answer with its checkpoint, its mean log-probability and its length, on one line each."""
        how = "" if self.is_complete else ", cut"
        figures = f"mean log-probability {self.log_probability:.3f} over {self.n_tokens} tokens{how}"
        return f"answer: {self.answer}\nby `{self.hits.query_checkpoint}`, {figures}"

    def __repr__(self) -> str:
        return f"{self.said}\n{self.hits!r}"


@dataclass(frozen=True, repr=False)
class ScoreMatrix(Convertible):
    """Scores of all samples for all queries: `matrix` (Q, N) float32, with rows `query_ids` and columns `samples`.

    `samples` has the columns source, variant and sample_id, sorted by them. A score > 0 means that training on the
    sample lowers the query's loss. `score` names the score, such as `lark · cosine`; `notes` list caveats; `scale`
    tells how to read it; `query_checkpoint` is the checkpoint of the queries' gradients, of a sum the last one. The
    Arrow stream interface exports the long form.
    """

    query_ids: list[str]
    samples: pl.DataFrame
    matrix: NDArray[np.float32]
    score: str
    method: str
    checkpoints: list[str]
    notes: tuple[str, ...] = ()
    scale: str = ""
    query_checkpoint: str = ""

    @property
    def frame(self) -> pl.DataFrame:
        """The long form: one row per query and sample, with query_id, source, variant, sample_id and score."""
        import polars as pl

        n = len(self.samples)
        ids = pl.Series("query_id", self.query_ids, dtype=pl.String)
        queries = pl.DataFrame(ids).select(pl.col("query_id").repeat_by(n).explode())
        samples = pl.concat([self.samples] * len(self.query_ids), rechunk=False)
        return queries.hstack(samples).with_columns(score=pl.Series(self.matrix.reshape(-1)))

    @property
    def across(self) -> str:
        """The queries' checkpoint as a phrase, if it is not a checkpoint of the samples; else empty."""
        is_same = self.query_checkpoint in ("", *self.checkpoints)
        return "" if is_same else f", queries at `{self.query_checkpoint}`"

    @property
    def _rows(self) -> pl.DataFrame:
        return self.frame

    def _first_rows(self, n: int) -> tuple[pl.DataFrame, int]:
        n_queries = -(-n // max(1, len(self.samples)))
        part = replace(self, query_ids=self.query_ids[:n_queries], matrix=self.matrix[:n_queries])
        return part.frame.head(n) if part.query_ids else self.frame, self.matrix.size

    @property
    def about(self) -> About:
        """What to print around the table of the scores."""
        from lark_store.display.table import About

        across = {"query_checkpoint": self.query_checkpoint} if self.across else {}
        return About(facts={"scored_by": self.score} | across, legend=[f"score: {self.scale}"] if self.scale else [])
