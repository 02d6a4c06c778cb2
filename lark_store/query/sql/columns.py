"""Columns of SQL views and table functions, with their types and meanings: declared once for SQL, frames and docs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import polars as pl

_POLARS = {
    "VARCHAR": "String",
    "DOUBLE": "Float64",
    "FLOAT": "Float32",
    "INTEGER": "Int32",
    "BIGINT": "Int64",
    "BOOLEAN": "Boolean",
}


@dataclass(frozen=True)
class Column:
    """A column: its DuckDB type and its meaning, with the unit."""

    type: str
    meaning: str


def columns(type_: str, **meanings: str) -> dict[str, Column]:
    """Return columns of one type."""
    return {name: Column(type_, meaning) for name, meaning in meanings.items()}


def text(**meanings: str) -> dict[str, Column]:
    """Return VARCHAR columns."""
    return columns("VARCHAR", **meanings)


def double(**meanings: str) -> dict[str, Column]:
    """Return DOUBLE columns."""
    return columns("DOUBLE", **meanings)


def frame_schema(columns: dict[str, Column]) -> pl.Schema:
    """Return the polars schema of a frame with these columns."""
    import polars as pl

    return pl.Schema({name: getattr(pl, _POLARS[column.type]) for name, column in columns.items()})


_RANK = columns("INTEGER", rank="rank, from 1")
_NOISE = double(noise="standard deviation of the score from sketching")
_SAMPLE = text(
    source="name of the sample's source",
    stage="the source's stage",
    variant="name of the format variant",
    sample_id="id of the sample",
    text="the sample's text; a prompt and its response are joined, a chat is a dialogue",
)
_AT = text(checkpoint="name of the checkpoint; the last of a sum", query_id="id of the query")
_CHECKPOINT, _QUERY = ({name: _AT[name]} for name in ("checkpoint", "query_id"))
_QUERIES = text(queries="name of the query source")
_BY = text(scored_by="sketcher and method, plus the checkpoints of a sum")
_QUERY_AT = text(query_checkpoint="name of the queries' checkpoint; the last of a sum")
_NOTE = text(note="notes on the score; null if none")
TOP = {
    **_AT,
    **_RANK,
    **columns("FLOAT", score="score of the method; > 0 proponent, < 0 opponent"),
    **_NOISE,
    **double(
        p_value="p-value against the scores of the other sources",
        q_value="Benjamini–Hochberg q-value: share of false hits so far",
    ),
    **columns("FLOAT", cosine="`hybrid` only: the cosine"),
    **columns("INTEGER", cosine_rank="`hybrid` only: rank by cosine"),
    **columns("FLOAT", bm25="`hybrid` only: the BM25 score"),
    **columns("INTEGER", bm25_rank="`hybrid` only: rank by BM25"),
    **_SAMPLE,
    **_BY,
    **_NOTE,
}
FT_PT = {
    **_CHECKPOINT,
    **_QUERIES,
    **_QUERY,
    **text(
        source="name of the fine-tuning source",
        variant="its format variant",
        against_source="name of the pretraining source",
        against_variant="its format variant",
    ),
    **double(
        ft="Φ of the fine-tuning group: its highest score",
        pt="Φ of the pretraining group: its highest score",
        ratio="ft / pt; null where pt is not above 0",
    ),
    **text(winner="finetune, pretrain or tie"),
    **_QUERY_AT,
    **_BY,
    **_NOTE,
}
TRAJECTORY = {
    **_CHECKPOINT,
    **double(epoch="epochs trained", learning_rate="learning rate at the checkpoint"),
    **columns("BIGINT", step="optimizer steps trained"),
    **_QUERIES,
    **_QUERY,
    **{name: _SAMPLE[name] for name in ("source", "variant", "sample_id")},
    **double(score="cosine or dot of the two gradients"),
    **_NOISE,
    **double(query_loss="the query's loss, in nats per target token", sample_loss="the sample's loss, likewise"),
    **_QUERY_AT,
    **_BY,
}
SIMILAR_TEXT = {
    **_RANK,
    **columns("FLOAT", score="the BM25 score"),
    **{name: _SAMPLE[name] for name in ("source", "stage", "sample_id", "text")},
}
METRICS = {
    **text(metric="name of the metric; null in `influence`, `dominance`"),
    **_CHECKPOINT,
    **_QUERIES,
    **text(
        source="name of the measured source",
        variant="its format variant",
        against_source="name of the source it is compared with",
        against_variant="its format variant",
        against_checkpoint="checkpoint a change is counted from",
    ),
    **double(
        value="value of the metric; null in `influence`, `dominance`",
        low="lower end of its 95% interval",
        high="upper end of its 95% interval",
        sketch_error="bound of its standard deviation over sketcher seeds",
        p_value="p-value of the paired permutation test",
        q_value="`comparisons` only: Benjamini–Hochberg q-value",
    ),
    **columns("BIGINT", n_queries="number of queries"),
    **double(
        r_median="`ft_pt_ratio`, `format_effect`, `dominance` only: median of the ratios of single queries",
        r_q1="their first quartile",
        r_q3="their third quartile",
    ),
    **columns("BIGINT", n_ratio="number of queries with a ratio: their divisor is above 0"),
    **double(mean_max_influence="`influence` only: mean over queries of Φ"),
    **text(finetune="`influence` only: fine-tuning source and variant"),
    **double(
        ft_wins="`influence`, `dominance`: share with Φ(ft) > Φ(pt)",
        pt_dominance="`dominance` only: share with Φ(pt) > Φ(ft)",
        ft="`dominance` only: mean Φ of the fine-tuning group",
        pt="`dominance` only: mean Φ of the pretraining group",
        ratio="`dominance` only: ft / pt over their common queries; null unless both are above 0",
    ),
    **_QUERY_AT,
    **_BY,
}
GROUPS = {
    **_CHECKPOINT,
    **_QUERIES,
    **text(
        query_id="id of the query; null over several",
        group_name="value of the first key; null: samples without it",
        subgroup_name="value of the second key; null without one",
    ),
    **columns("BIGINT", n_samples="samples in the group; one in two format variants counts twice"),
    **double(
        value="mean, sum or maximum of the samples' scores; over several queries their mean",
        low="lower end of its 95% interval",
        high="upper end of its 95% interval",
    ),
    **text(interval_over="what the interval resamples: `queries`, or `samples` for one query; null without one"),
    **double(
        sketch_error="bound of its standard deviation over sketcher seeds",
        wins="share of queries for which no group has a higher value",
    ),
    **columns("BIGINT", n_queries="number of queries"),
    **_QUERY_AT,
    **text(query_variant="name of the queries' format variant; at the last checkpoint of a sum"),
    **_BY,
    **_NOTE,
}
FACT_EVENTS = {
    **text(
        source="name of the facts' source",
        variant="name of their format variant",
        sample_id="id of the fact",
        event="acquisition, generalisation or degradation",
    ),
    **columns("BOOLEAN", seen="whether the fact was trained on", observed="whether it happened; false: censored"),
    **double(time="epochs from the baseline to the event, or to the end"),
    **text(baseline="name of the checkpoint that it starts from"),
    **columns("BOOLEAN", is_latent="baseline: greedy wrong, a sample correct"),
    **columns("INTEGER", n_correct="baseline: sampled answers that match", n_samples="baseline: sampled answers"),
    **double(
        p="baseline: probability of the answer and its end",
        answer_logprob="its logarithm, in nats",
        p_any="baseline: chance that n samples hold the answer",
    ),
    **columns("INTEGER", n_tokens="tokens of the answer and its end"),
    **text(meta="the fact's other columns, JSON"),
}
SURVIVAL = {
    **text(event="the event", covariate="name of the covariate"),
    **double(scale="its unit: 1 if it is 0 or 1, else a standard deviation"),
    **columns("BIGINT", n="facts at risk with all covariates", n_events="facts with the event"),
    **double(
        hazard_ratio="Cox, per unit and given the other covariates",
        low="lower end of its 95% interval",
        high="upper end of its 95% interval",
        p_value="its p-value (Wald)",
        zph_p_value="test of proportional hazards; small: they are not",
        discrete_hazard_ratio="the same in discrete time (cloglog)",
        discrete_low="lower end of its 95% interval",
        discrete_high="upper end of its 95% interval",
        discrete_p_value="its p-value",
    ),
}
