"""The answers of a report: at each checkpoint, one pass for the groups and one for the hits.

Shape letters: Q queries, G groups (a source in a format variant).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import polars as pl

from lark_store.core.text import coded, joined
from lark_store.errors import InputError
from lark_store.query.plots.base import Asked
from lark_store.query.plots.of_groups import losses
from lark_store.results import Progress
from lark_store.specs import PlotSpec, RankSpec, ReportSpec, SearchSpec, build

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lark_store.query.answers.groups import Scored
    from lark_store.query.select.resolve import Question
    from lark_store.results import Hits, OnProgress
    from lark_store.schema.database import Database

DEPTH = 100  # hits of which the course is shown
_KEYS = ["checkpoint", "queries", "query_id"]


@dataclass
class Answers:
    """What a report shows. `ids` are all queries, `shown` those in the picker, the same at each checkpoint.

    `phi`: checkpoint, queries, query_id, source, stage, variant, phi, noise. `by_source`: columns of `Store.groups`.
    `influence` and `dominance`: views of `Store.metrics`. `ft_pt`: columns of `Store.ft_pt`. `hits`: checkpoint,
    query_id, source, variant, sample_id, score, q_value, place. `losses`: query_id, checkpoint, loss.
    """

    spec: ReportSpec
    checkpoints: list[str]
    course: pl.DataFrame
    ids: list[str]
    shown: list[str]
    tuning: list[str]
    colours: dict[str, str]
    queries: str = ""
    label: str = ""
    scale: str = ""
    null: str = "none"
    n_searched: int = 0
    depth: int = DEPTH
    models: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    by_source: pl.DataFrame = field(default_factory=pl.DataFrame)
    influence: pl.DataFrame = field(default_factory=pl.DataFrame)
    dominance: pl.DataFrame = field(default_factory=pl.DataFrame)
    ft_pt: pl.DataFrame = field(default_factory=pl.DataFrame)
    phi: pl.DataFrame = field(default_factory=pl.DataFrame)
    hits: pl.DataFrame = field(default_factory=pl.DataFrame)
    losses: pl.DataFrame = field(default_factory=pl.DataFrame)
    texts: dict[tuple[str, str], tuple[Any, str | None]] = field(default_factory=dict)


def gather(
    db: Database,
    queries: Sequence[str] | None,
    checkpoints: list[str],
    options: Mapping[str, Any],
    on_progress: OnProgress | None,
) -> Answers:
    """Compute a report's answers.

    Raises
    ------
    NameUnknownError, NothingToScoreError, InputError, QueryError
    """
    from lark_store.query.methods import Method
    from lark_store.stats import metrics
    from lark_store.store.report.texts import texts_of

    spec = build(ReportSpec, options)
    if Method.of(options.get("method")).over is not None:
        raise InputError("a report shows each checkpoint alone", "use a method without a sum, such as `cosine`")
    asked = Asked(db, list(queries or ()), checkpoints, PlotSpec(), options).at_all_checkpoints()
    passes = [_at(asked, name, n, on_progress) for n, name in enumerate(asked.checkpoints)]
    answers = _common(asked, spec, passes)
    answers.phi = pl.concat(_phi(scored) for scored, _ in passes)
    table = metrics.paper_metrics(answers.phi)
    answers.influence, answers.dominance = metrics.influence_table(table), metrics.dominance_table(table)
    answers.ft_pt = _compared(answers.phi, answers.label)
    answers.by_source = _by_source(answers.phi)
    answers.hits = _hits(asked, answers, passes)
    answers.losses, _ = losses(replace(asked, queries=answers.shown))
    answers.texts = texts_of(db, answers.hits.filter(pl.col("place").is_not_null()), answers.queries, answers.shown)
    return answers


def _at(asked: Asked, checkpoint: str, n: int, on_progress: OnProgress | None) -> tuple[Scored, Question]:
    """Score the groups at a checkpoint for all queries of one source."""
    from lark_store.query.answers.groups import Grouped, scored_groups

    if on_progress:
        on_progress(Progress(f"scoring {checkpoint}", n, len(asked.checkpoints)))
    grouped = build(Grouped, {**asked.options, "by": ["source", "variant"], "how": "max"})
    spec = build(SearchSpec, asked.options, checkpoints=[checkpoint])
    scored = list(scored_groups(asked.db, asked.queries or None, spec, grouped))
    if len(scored) > 1:
        names = [one.question.queries.source.name for one in scored]
        raise InputError(f"there are queries in {joined(coded(names), 'and')}", "choose one with `--queries NAME`")
    return scored[0], scored[0].question


def _common(asked: Asked, spec: ReportSpec, passes: list[tuple[Scored, Question]]) -> Answers:
    """Return the facts on the whole report. The queries are those with a sketch at each checkpoint."""
    from lark_store.query.select.resolve import mixed_variants

    scored, question = passes[-1]
    ids = sorted(set.intersection(*(set(one.scores.ids) for one, _ in passes)))
    if not ids:
        raise InputError("no query has a sketch at each of these checkpoints", "choose others with `--checkpoint NAME`")
    listed = [term.checkpoint for _, one in passes for term in one.terms]
    columns = ("name", "epoch", "step", "learning_rate")
    course = pl.DataFrame([[getattr(one, name) for name in columns] for one in listed], orient="row", schema={
        "checkpoint": pl.String, "epoch": pl.Float64, "step": pl.Int64, "learning_rate": pl.Float64,
    })  # fmt: skip
    notes = [*asked.notes, *(note for one, _ in passes for note in one.notes)]
    notes += mixed_variants([one for _, one in passes])
    n_all = len({name for one, _ in passes for name in one.scores.ids})
    if len(ids) < n_all:
        notes.append(f"{n_all - len(ids):,} of {n_all:,} queries lack a sketch at some checkpoint and are left out")
    return Answers(
        spec,
        asked.checkpoints,
        course,
        ids,
        ids[: spec.limit],
        asked.tuning,
        asked.colours,
        queries=question.queries.source.name,
        label=question.label,
        scale=question.method.scale,
        n_searched=int(scored.scores.n_G.sum()),
        models=list(dict.fromkeys(one.model for one in listed)),
        sources=list(dict.fromkeys(group.source.name for group in question.groups)),
        notes=list(dict.fromkeys(notes)),
    )


def _phi(scored: Scored) -> pl.DataFrame:
    """Return Φ of each query and group at a checkpoint."""
    scores, question = scored.scores, scored.question
    stages = {group.source.name: group.source.stage for group in question.groups}
    at, queries = question.terms[-1].checkpoint.name, question.queries.source.name
    rows = [
        (
            at, queries, query, source, stages[str(source)], variant, float(scores.value_QG[q, g]),
            None if scores.noise_QG is None else float(scores.noise_QG[q, g]), int(scores.n_G[g]),
        )
        for q, query in enumerate(scores.ids)
        for g, (source, variant) in enumerate(scored.grouping.values)
    ]  # fmt: skip
    names = dict.fromkeys(("checkpoint", "queries", "query_id", "source", "stage", "variant"), pl.String)
    return pl.DataFrame(rows, names | {"phi": pl.Float64, "noise": pl.Float64, "n": pl.Int64}, orient="row")


def _compared(phi: pl.DataFrame, label: str) -> pl.DataFrame:
    """Return each query's pairs of a fine-tuning and a pretraining group."""
    keep = [*_KEYS, "source", "variant"]
    tuning = phi.filter(stage="finetune").select(*keep, ft="phi")
    others = phi.filter(stage="pretrain").select(*_KEYS, against_source="source", against_variant="variant", pt="phi")
    is_more = pl.when(pl.col("ft") > pl.col("pt")).then(pl.lit("finetune"))
    winner = is_more.when(pl.col("pt") > pl.col("ft")).then(pl.lit("pretrain")).otherwise(pl.lit("tie"))
    pairs = tuning.join(others, on=_KEYS, maintain_order="left_right")
    ratio = pl.when(pl.col("pt") > 0).then(pl.col("ft") / pl.col("pt"))
    return pairs.with_columns(ratio=ratio, winner=winner, scored_by=pl.lit(label))


def _by_source(phi: pl.DataFrame) -> pl.DataFrame:
    """Return the mean over queries of each source's highest score, with its interval and wins."""
    from lark_store.stats.bootstrap import Figure, evaluate

    best = phi.group_by("checkpoint", "query_id", "source", maintain_order=True).agg(
        pl.col("phi").max(), n_samples=pl.col("n").sum()
    )
    is_most = (pl.col("phi") == pl.col("phi").max().over("checkpoint", "query_id")).cast(pl.Float64)
    figures = []
    for (checkpoint, source), rows in best.with_columns(won=is_most).group_by(
        "checkpoint", "source", maintain_order=True
    ):
        names = {"checkpoint": checkpoint, "group_name": source, "wins": rows["won"].mean()}
        figures.append(Figure(names | {"n_samples": rows["n_samples"][0]}, rows["phi"].to_numpy()))
    return pl.DataFrame(evaluate(figures)).with_columns(pl.col("low", "high").fill_nan(None))


def _hits(asked: Asked, answers: Answers, passes: list[tuple[Scored, Question]]) -> pl.DataFrame:
    """Return the first hits of the queries in the picker; `place` is null beyond those shown."""
    from lark_store.query.answers.top import Ranking, top

    ranking = build(Ranking, {**asked.options, "k": DEPTH, "has_texts": False, **_fixed()})
    frames, nulls = [], dict[str, None]()
    for checkpoint, (_, question) in zip(answers.checkpoints, passes, strict=True):
        for query, hits in top(asked.db, answers.shown, [question], ranking).items():
            frames.append(_ranked(hits, query, checkpoint, answers.spec.k))
            nulls[hits.null] = None
    null = next(iter(nulls))
    against = {"sources": "the other sources’ samples", "signs": "shuffled signs of the sketch"}.get(null)
    if against:
        answers.notes.append(
            f"p-values of hits are against {against}; q-values are Benjamini–Hochberg’s for each query"
        )
    else:
        answers.notes.append("hits are not tested: no q-value was computed")
    answers.null = null
    return pl.concat(frames)


def _fixed() -> dict[str, Any]:
    """Return the options of the hits' ranking that a report does not take."""
    spec = RankSpec()
    return {"opponents": spec.opponents, "null": spec.null, "approximate": spec.approximate}


def _ranked(hits: Hits, query: str, checkpoint: str, k: int) -> pl.DataFrame:
    is_shown = pl.when(pl.col("rank") <= k).then(pl.col("rank").cast(pl.Int64))
    return hits.frame.select(
        pl.lit(checkpoint).alias("checkpoint"), pl.lit(query).alias("query_id"), "source", "variant", "sample_id",
        pl.col("score").cast(pl.Float64), "q_value", is_shown.alias("place"),
    )  # fmt: skip
