"""A study's tables, from its store.

Definitions are those of `query.metrics`; intervals and tests those of `query.compare`. Every comparison is paired by
query. The fine-tuning group is the source of stage `finetune` in its first variant.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import polars as pl

from lark_store.errors import CheckpointError
from lark_store.query import metrics
from lark_store.query.compare import Figure
from lark_store.schema.vectors import sketch_table
from lark_store.study import truth
from lark_store.study.groups import (
    SKETCHER,
    asked,
    columns,
    evaluated,
    in_order,
    numbers,
    read_phi,
    with_epoch,
)
from lark_store.study.notes import notes_of
from lark_store.study.results import FORMATTED, PLAIN, Results

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lark_store import Store
    from lark_store.study.recipe import Recipe

LARGE = ("OLMo-3-7B", 7_298_011_136)
SKETCHES, FP16, FP32 = "sketches", "gradients in fp16", "gradients in fp32"
_MEASURED = (
    *("train_loss", "query_loss", "accuracy", "accuracy_low", "accuracy_high"),
    *("macro_f1", "macro_f1_low", "macro_f1_high", "n_evaluated"),
)
CHECKPOINTS = (
    columns(pl.String, "checkpoint")
    | columns(pl.Int64, "epoch step")
    | columns(pl.Float64, "learning_rate")
    | dict.fromkeys(_MEASURED, pl.Float64)
    | columns(pl.Int64, "n_evaluated")
)
STORAGE = (
    columns(pl.String, "model")
    | columns(pl.Int64, "parameters")
    | columns(pl.String, "what")
    | columns(pl.Boolean, "measured")
    | columns(pl.Float64, "bytes_per_sample")
    | columns(pl.Int64, "n_samples bytes")
    | columns(pl.Float64, "times_smaller")
)
_PREDICTED = columns(pl.String, "checkpoint query_id label prediction") | columns(pl.Boolean, "correct")
_QUERIES = """
    SELECT x.checkpoint, x.sample_id AS query_id, coalesce(s.label, s.response) AS label, x.loss::DOUBLE AS loss
    FROM sketches x LEFT JOIN samples s USING (source, sample_id)
    WHERE x.sketcher = $sketcher AND x.source = $queries AND x.variant = $query_variant
      AND list_contains($checkpoints, x.checkpoint)
    ORDER BY query_id"""


def collect(
    store: Store,
    recipe: Recipe,
    *,
    predictions: pl.DataFrame | None = None,
    environment: Mapping[str, Any] | None = None,
    hashes: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
    sketcher: str = SKETCHER,
) -> Results:
    """Compute a study's tables from its store, ingested and attributed by every method of the recipe.

    `predictions` has a row per checkpoint and evaluated sample: checkpoint, query_id, label, prediction, correct. The
    notes given come before those that the data make.

    Raises
    ------
    NothingToScoreError, InputError
    """
    phi = read_phi(store, recipe, sketcher)
    cosine = phi.filter(pl.col("method") == "cosine").drop("method")
    losses = store.sql(_QUERIES, asked(recipe, sketcher))
    checkpoints = _checkpoints(store, recipe, losses)
    mean = metrics.mean_max_influence(cosine)
    own, gaps = truth.found(store, recipe, phi, sketcher)
    found = Results(
        recipe=recipe,
        checkpoints=checkpoints,
        influence=_influence(cosine, mean, recipe),
        relevance=_relevance(cosine, recipe),
        dominance=_dominance(cosine, mean, checkpoints, recipe),
        format_effect=_format_effect(cosine, recipe),
        storage=_storage(store, recipe, sketcher),
        methods=_methods(phi, recipe),
        queries=_queries(losses, cosine, predictions, recipe),
        truth=own,
        truth_gaps=gaps,
        notes=list(notes),
        environment=dict(environment or {}),
        hashes=dict(hashes or {}),
    )
    found.notes.extend(notes_of(store, found, phi, sketcher))
    return found


def _checkpoints(store: Store, recipe: Recipe, queries: pl.DataFrame) -> pl.DataFrame:
    """Make the table of what was measured at each checkpoint; a learning rate that the store lacks is the recipe's."""
    facts = store.sql("SELECT name AS checkpoint, step, learning_rate FROM checkpoints")
    measured = store.sql("SELECT checkpoint, name, value FROM checkpoint_metrics")
    measured = measured.filter(pl.col("name").is_in([name for name in _MEASURED if name != "query_loss"]))
    rates = pl.DataFrame(
        {"checkpoint": recipe.checkpoints, "planned": [None, *recipe.finetune.learning_rates]},
        {"checkpoint": pl.String, "planned": pl.Float64},
    )
    table = rates.join(facts, on="checkpoint", how="left", maintain_order="left")
    table = table.with_columns(pl.coalesce("learning_rate", "planned").alias("learning_rate"))
    losses = queries.group_by("checkpoint").agg(query_loss=pl.col("loss").mean())
    table = table.join(losses, on="checkpoint", how="left", maintain_order="left")
    for (name,), rows in measured.group_by("name", maintain_order=True):
        values = rows.select("checkpoint", pl.col("value").alias(str(name)))
        table = table.join(values, on="checkpoint", how="left", maintain_order="left")
    missing = [pl.lit(None).alias(name) for name in CHECKPOINTS if name not in {*table.columns, "epoch"}]
    return with_epoch(table.with_columns(missing), recipe).select(list(CHECKPOINTS)).cast(pl.Schema(CHECKPOINTS))


def _of_tuning(recipe: Recipe) -> pl.Expr:
    """Tell which rows are of the fine-tuning group."""
    return (pl.col("source") == recipe.tuning.name) & (pl.col("variant") == recipe.tuning.variant)


def _against_tuning(phi: pl.DataFrame, recipe: Recipe) -> pl.DataFrame:
    """Leave out other variants of the fine-tuning source."""
    return phi.filter(_of_tuning(recipe) | (pl.col("stage") == "pretrain"))


def _influence(cosine: pl.DataFrame, mean: pl.DataFrame, recipe: Recipe) -> pl.DataFrame:
    """Make Table I at every checkpoint."""
    wins = metrics.ft_wins(_against_tuning(cosine, recipe)).select(
        "checkpoint",
        source="against_source",
        variant="against_variant",
        ft_wins="value",
        ft_wins_low="low",
        ft_wins_high="high",
    )
    key = ["checkpoint", "source", "variant"]
    stages = cosine.select("source", "stage").unique()
    table = (
        mean.select(*key, "low", "high", "n_queries", mean_max_influence="value")
        .join(stages, on="source")
        .join(wins, on=key, how="left")
    )
    table = with_epoch(in_order(table, recipe, "checkpoint", "source", "variant"), recipe)
    names = (
        "checkpoint epoch source stage variant mean_max_influence low high ft_wins ft_wins_low ft_wins_high n_queries"
    )
    return table.select(names.split())


def _relevance(cosine: pl.DataFrame, recipe: Recipe) -> pl.DataFrame:
    """Compare each pretraining source with those after it, in one variant: the ratio of mean max influences less 1."""
    place = {source.name: i for i, source in enumerate(recipe.pretraining)}
    ours = cosine.filter(pl.col("stage") == "pretrain")
    on = ["checkpoint", "variant", "query_id"]
    both = ours.join(ours, on=on, maintain_order="left_right").filter(
        pl.col("source").replace_strict(place) < pl.col("source_right").replace_strict(place)
    )
    names = dict.fromkeys(("checkpoint", "variant", "source", "against_source"), pl.String)
    ratios, gaps = [], []
    for key, group in both.group_by("checkpoint", "variant", "source", "source_right", maintain_order=True):
        left, right = numbers(group["phi"]), numbers(group["phi_right"])
        ratios.append(Figure(dict(zip(names, key, strict=True)), left, right, left - right))
        gaps.append(Figure(ratios[-1].names, left - right))
    table = evaluated(ratios, names).with_columns(pl.col("value", "low", "high") - 1)
    gap = evaluated(gaps, names).select(difference="value", difference_low="low", difference_high="high")
    table = pl.concat([table, gap], how="horizontal")
    table = table.select(pl.exclude("p_value", "n_queries"), "p_value", "n_queries")
    return with_epoch(in_order(table, recipe, "checkpoint", "variant", "source", "against_source"), recipe)


def _dominance(cosine: pl.DataFrame, mean: pl.DataFrame, checkpoints: pl.DataFrame, recipe: Recipe) -> pl.DataFrame:
    """Make Table II: fine-tuning against each pretraining group."""
    ours = _against_tuning(cosine, recipe)
    pair = ["checkpoint", "against_source", "against_variant"]
    table = metrics.ft_pt_ratio(ours).select(*pair, "low", "high", "p_value", ratio="value", n_ratio="n_queries")
    wins = metrics.ft_wins(ours).select(*pair, "n_queries", ft_wins="value")
    losses = metrics.pt_dominance(ours).select(*pair, pt_wins="value", pt_wins_low="low", pt_wins_high="high")
    ft = mean.filter(_of_tuning(recipe)).select("checkpoint", ft="value")
    pt = mean.select("checkpoint", against_source="source", against_variant="variant", pt="value")
    known = checkpoints.select("checkpoint", "learning_rate", "accuracy")
    table = table.join(wins, on=pair).join(losses, on=pair).join(pt, on=pair)
    table = table.join(ft, on="checkpoint").join(known, on="checkpoint")
    table = table.rename({"against_source": "source", "against_variant": "variant"})
    names = (
        "checkpoint epoch learning_rate source variant ft pt ratio low high n_ratio ft_wins pt_wins pt_wins_low "
        "pt_wins_high p_value accuracy n_queries"
    )
    return with_epoch(in_order(table, recipe, "checkpoint", "source", "variant"), recipe).select(names.split())


def _format_effect(cosine: pl.DataFrame, recipe: Recipe) -> pl.DataFrame:
    """Compare `chatml` with `raw` of each source that has both."""
    table = metrics.format_effect(cosine, FORMATTED, PLAIN)
    table = with_epoch(in_order(table, recipe, "checkpoint", "source"), recipe)
    return table.select("checkpoint", "epoch", "source", "value", "low", "high", "p_value", "n_queries")


def _methods(phi: pl.DataFrame, recipe: Recipe) -> pl.DataFrame:
    """Make Table IV at every checkpoint: how often fine-tuning is ahead by the cosine, and by another method."""
    on = ["method", "checkpoint", "query_id"]
    ft = phi.filter(_of_tuning(recipe)).select(*on, ft="phi")
    pairs = phi.filter(pl.col("stage") == "pretrain").join(ft, on=on, maintain_order="left")
    pairs = pairs.with_columns(win=(pl.col("ft") > pl.col("phi")).cast(pl.Float64))
    key = ["checkpoint", "query_id", "source", "variant"]
    ours, theirs = (pairs.filter(test) for test in (pl.col("method") == "cosine", pl.col("method") != "cosine"))
    both = theirs.join(ours.select(*key, ours="win"), on=key, maintain_order="left")
    names: dict[str, Any] = dict.fromkeys(("checkpoint", "source", "variant", "method"), pl.String)
    shares = {"ft_wins": pl.Float64, "rival_ft_wins": pl.Float64}
    figures = []
    for group_key, group in both.group_by(*names, maintain_order=True):
        means = {"ft_wins": group["ours"].mean(), "rival_ft_wins": group["win"].mean()}
        gap = numbers(group["ours"] - group["win"])
        figures.append(Figure(dict(zip(names, group_key, strict=True)) | means, gap, difference=gap))
    table = evaluated(figures, names | shares).rename({"value": "difference"})
    return with_epoch(in_order(table, recipe, "checkpoint", "method", "source", "variant"), recipe)


def _queries(
    asked_queries: pl.DataFrame, cosine: pl.DataFrame, predictions: pl.DataFrame | None, recipe: Recipe
) -> pl.DataFrame:
    """Make the table of single queries; where nothing was predicted, the label is the sample's own, or its response."""
    against = next(source for source in recipe.pretraining if source.name == recipe.against)
    is_against = (pl.col("source") == against.name) & (pl.col("variant") == against.variant)
    on = ["checkpoint", "query_id"]
    guessed = (pl.DataFrame(schema=_PREDICTED) if predictions is None else predictions).select(list(_PREDICTED))
    guessed = guessed.cast(pl.Schema(_PREDICTED)).rename({"label": "asked_label"})
    table = (
        asked_queries.join(guessed, on=on, how="left", maintain_order="left")
        .join(cosine.filter(_of_tuning(recipe)).select(*on, ft="phi"), on=on, how="left", maintain_order="left")
        .join(cosine.filter(is_against).select(*on, pt="phi"), on=on, how="left", maintain_order="left")
    )
    ft, pt = pl.col("ft"), pl.col("pt")
    winner = pl.when(ft > pt).then(pl.lit("finetune")).when(pt > ft).then(pl.lit("pretrain"))
    table = table.with_columns(
        pl.coalesce("asked_label", "label").alias("label"),
        pl.when(pt > 0).then(ft / pt).alias("ratio"),
        winner.when(ft == pt).then(pl.lit("tie")).alias("winner"),
    )
    names = "checkpoint epoch query_id label prediction correct loss ft pt ratio winner"
    return with_epoch(in_order(table, recipe, "checkpoint"), recipe).select(names.split())


def _storage(store: Store, recipe: Recipe, sketcher: str) -> pl.DataFrame:
    """Make Table III: what sketches take on disk, and what gradients would.

    A sketch's bytes are those of the sketcher's tables, all versions and indices with them, over their rows. The
    gradient is that of the parameters that the sketcher takes; of the large model, of all. A sketch is as large
    whatever the model is, so the large model's is the one measured here.
    """
    ours = "FROM ingest_runs WHERE sketcher = ? AND status = 'done' AND n_sketched > 0"
    prints = store.sql(f"SELECT DISTINCT fingerprint {ours}", [sketcher])["fingerprint"]
    on_disk = type(store).db_status(store.path).tables
    taken = on_disk.filter(pl.col("table").is_in([sketch_table(name) for name in prints]))
    per_sample = int(taken["bytes"].sum()) / int(taken["rows"].sum())
    n = store.sql("SELECT count(*) AS n FROM sketches WHERE sketcher = ?", [sketcher])["n"][0]
    here = recipe.model_name
    rows: list[tuple[Any, ...]] = []
    for model, parameters in ((here, _parameters(store, recipe, sketcher)), LARGE):
        rows.append((model, parameters, SKETCHES, model == here, per_sample, n, round(per_sample * n), 1.0))
        for what, size in ((FP16, 2), (FP32, 4)):
            if parameters is not None:
                each = parameters * size
                rows.append((model, parameters, what, False, float(each), n, each * n, each / per_sample))
    return pl.DataFrame(rows, schema=STORAGE, orient="row")


def _parameters(store: Store, recipe: Recipe, sketcher: str) -> int | None:
    """Count the coordinates that the sketcher takes; None where no checkpoint is on this machine any more."""
    for name in reversed(recipe.checkpoints):
        try:
            taken = store.sketcher_show(sketcher, checkpoint=name)
        except CheckpointError:
            continue
        return int(taken.filter("sketched")["coordinates"].sum())
    return None
