"""A study's tables, computed from its store.

`query.metrics` defines the figures, `query.compare` the intervals and tests. All comparisons are paired by query. The
fine-tuning group is the source of stage `finetune` in its first variant.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import polars as pl

from lark_store.errors import CheckpointError
from lark_store.schema.table_schemas import sketch_table
from lark_store.stats import metrics
from lark_store.stats.bootstrap import Figure
from lark_store.stats.sketch_error import of_difference
from lark_store.study import known_answers
from lark_store.study.caveats import notes_of
from lark_store.study.groups import (
    SKETCHER,
    columns,
    figure_frame,
    in_order,
    numbers,
    read_phi,
    sql_parameters,
    with_epoch,
)
from lark_store.study.results import PLAIN, Results

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
    SELECT x.checkpoint, x.sample_id AS query_id,
           coalesce(s.label, s.response, s.completion, json_extract_string(s.messages, '$[#-1].content')) AS label,
           x.loss::DOUBLE AS loss
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

    `predictions` has a row per checkpoint and evaluated sample: checkpoint, query_id, label, prediction, correct.
    `notes` precede the notes on the data.

    Raises
    ------
    NothingToScoreError, InputError
    """
    phi = read_phi(store, recipe, sketcher)
    cosine = phi.filter(pl.col("method") == "cosine").drop("method")
    losses = store.sql(_QUERIES, sql_parameters(recipe, sketcher))
    checkpoints = _checkpoints(store, recipe, losses)
    mean = metrics.mean_max_influence(cosine)
    truth_frame, gaps = known_answers.truth_tables(store, recipe, phi, sketcher)
    results = Results(
        recipe=recipe,
        checkpoints=checkpoints,
        influence=_influence(cosine, mean, recipe),
        relevance=_relevance(cosine, recipe),
        dominance=_dominance(cosine, mean, checkpoints, recipe),
        format_effect=_format_effect(cosine, recipe),
        storage=_storage(store, recipe, sketcher),
        methods=_methods(phi, recipe),
        queries=_queries(losses, cosine, predictions, recipe),
        truth=truth_frame,
        truth_gaps=gaps,
        notes=list(notes),
        environment=dict(environment or {}),
        hashes=dict(hashes or {}),
    )
    results.notes.extend(notes_of(store, results, phi, sketcher))
    return results


def _checkpoints(store: Store, recipe: Recipe, queries: pl.DataFrame) -> pl.DataFrame:
    """Build the table of measurements by checkpoint; the recipe supplies missing learning rates."""
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


def _is_tuning(recipe: Recipe) -> pl.Expr:
    """Select rows of the fine-tuning group."""
    return (pl.col("source") == recipe.tuning.name) & (pl.col("variant") == recipe.tuning.variant)


def _tuning_and_pretraining(phi: pl.DataFrame, recipe: Recipe) -> pl.DataFrame:
    """Exclude other variants of the fine-tuning source."""
    return phi.filter(_is_tuning(recipe) | (pl.col("stage") == "pretrain"))


def _influence(cosine: pl.DataFrame, mean: pl.DataFrame, recipe: Recipe) -> pl.DataFrame:
    """Build Table I at every checkpoint."""
    wins = metrics.ft_wins(_tuning_and_pretraining(cosine, recipe)).select(
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
        mean.select(*key, "low", "high", "sketch_error", "n_queries", mean_max_influence="value")
        .join(stages, on="source")
        .join(wins, on=key, how="left")
    )
    table = with_epoch(in_order(table, recipe, "checkpoint", "source", "variant"), recipe)
    names = (
        "checkpoint epoch source stage variant mean_max_influence low high sketch_error ft_wins ft_wins_low "
        "ft_wins_high n_queries"
    )
    return table.select(names.split())


def _relevance(cosine: pl.DataFrame, recipe: Recipe) -> pl.DataFrame:
    """Compare pretraining sources pairwise, in one variant: the ratio of mean max influences minus 1."""
    place = {source.name: i for i, source in enumerate(recipe.pretraining)}
    pretraining = cosine.filter(pl.col("stage") == "pretrain")
    keys = ["checkpoint", "variant", "query_id"]
    pairs = pretraining.join(pretraining, on=keys, maintain_order="left_right").filter(
        pl.col("source").replace_strict(place) < pl.col("source_right").replace_strict(place)
    )
    names = dict.fromkeys(("checkpoint", "variant", "source", "against_source"), pl.String)
    ratios, gaps, errors = [], [], []
    for key, group in pairs.group_by("checkpoint", "variant", "source", "source_right", maintain_order=True):
        left, right = numbers(group["phi"]), numbers(group["phi_right"])
        ratios.append(Figure(dict(zip(names, key, strict=True)), left, right, left - right))
        gaps.append(Figure(ratios[-1].names, left - right))
        errors.append(of_difference(numbers(group["noise"]), numbers(group["noise_right"])))
    table = figure_frame(ratios, names).with_columns(pl.col("value", "low", "high") - 1)
    gap = figure_frame(gaps, names).select(difference="value", difference_low="low", difference_high="high")
    table = pl.concat([table, gap], how="horizontal").with_columns(sketch_error=pl.Series(errors, dtype=pl.Float64))
    table = table.select(pl.exclude("p_value", "n_queries"), "p_value", "n_queries")
    return with_epoch(in_order(table, recipe, "checkpoint", "variant", "source", "against_source"), recipe)


def _dominance(cosine: pl.DataFrame, mean: pl.DataFrame, checkpoints: pl.DataFrame, recipe: Recipe) -> pl.DataFrame:
    """Build Table II: fine-tuning against each pretraining group."""
    compared = _tuning_and_pretraining(cosine, recipe)
    pair = ["checkpoint", "against_source", "against_variant"]
    table = metrics.ft_pt_ratio(compared).select(
        *pair, "low", "high", "sketch_error", *metrics.PER_QUERY, "p_value", "n_queries", ratio="value"
    )
    wins = metrics.ft_wins(compared).select(*pair, ft_wins="value")
    losses = metrics.pt_dominance(compared).select(*pair, pt_wins="value", pt_wins_low="low", pt_wins_high="high")
    ft = mean.filter(_is_tuning(recipe)).select("checkpoint", ft="value")
    pt = mean.select("checkpoint", against_source="source", against_variant="variant", pt="value")
    facts = checkpoints.select("checkpoint", "learning_rate", "accuracy")
    table = table.join(wins, on=pair).join(losses, on=pair).join(pt, on=pair)
    table = table.join(ft, on="checkpoint").join(facts, on="checkpoint")
    table = table.rename({"against_source": "source", "against_variant": "variant"})
    names = (
        "checkpoint epoch learning_rate source variant ft pt ratio low high sketch_error r_median r_q1 r_q3 n_ratio "
        "ft_wins pt_wins pt_wins_low pt_wins_high p_value accuracy n_queries"
    )
    return with_epoch(in_order(table, recipe, "checkpoint", "source", "variant"), recipe).select(names.split())


def _format_effect(cosine: pl.DataFrame, recipe: Recipe) -> pl.DataFrame:
    """Compare each other variant of a source with its `raw`."""
    table = metrics.format_effect(cosine, PLAIN)
    table = with_epoch(in_order(table, recipe, "checkpoint", "source", "variant"), recipe)
    names = "checkpoint epoch source variant value low high sketch_error r_median r_q1 r_q3 n_ratio p_value n_queries"
    return table.select(names.split())


def _methods(phi: pl.DataFrame, recipe: Recipe) -> pl.DataFrame:
    """Build Table IV at every checkpoint: how often fine-tuning is ahead by the cosine, and by another method."""
    keys = ["method", "checkpoint", "query_id"]
    ft = phi.filter(_is_tuning(recipe)).select(*keys, ft="phi")
    pairs = phi.filter(pl.col("stage") == "pretrain").join(ft, on=keys, maintain_order="left")
    pairs = pairs.with_columns(win=(pl.col("ft") > pl.col("phi")).cast(pl.Float64))
    key = ["checkpoint", "query_id", "source", "variant"]
    cosine, baselines = (pairs.filter(test) for test in (pl.col("method") == "cosine", pl.col("method") != "cosine"))
    joined = baselines.join(cosine.select(*key, ours="win"), on=key, maintain_order="left")
    names: dict[str, Any] = dict.fromkeys(("checkpoint", "source", "variant", "method"), pl.String)
    shares = {"ft_wins": pl.Float64, "rival_ft_wins": pl.Float64}
    figures = []
    for group_key, group in joined.group_by(*names, maintain_order=True):
        means = {"ft_wins": group["ours"].mean(), "rival_ft_wins": group["win"].mean()}
        gap = numbers(group["ours"] - group["win"])
        figures.append(Figure(dict(zip(names, group_key, strict=True)) | means, gap, difference=gap))
    table = figure_frame(figures, names | shares).rename({"value": "difference"})
    return with_epoch(in_order(table, recipe, "checkpoint", "method", "source", "variant"), recipe)


def _queries(
    asked_queries: pl.DataFrame, cosine: pl.DataFrame, predictions: pl.DataFrame | None, recipe: Recipe
) -> pl.DataFrame:
    """Build the table of queries; without a prediction, the label is the sample's label or response."""
    pretraining = next(source for source in recipe.pretraining if source.name == recipe.against)
    is_against = (pl.col("source") == pretraining.name) & (pl.col("variant") == pretraining.variant)
    keys = ["checkpoint", "query_id"]
    guessed = (pl.DataFrame(schema=_PREDICTED) if predictions is None else predictions).select(list(_PREDICTED))
    guessed = guessed.cast(pl.Schema(_PREDICTED)).rename({"label": "asked_label"})
    table = (
        asked_queries.join(guessed, on=keys, how="left", maintain_order="left")
        .join(cosine.filter(_is_tuning(recipe)).select(*keys, ft="phi"), on=keys, how="left", maintain_order="left")
        .join(cosine.filter(is_against).select(*keys, pt="phi"), on=keys, how="left", maintain_order="left")
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
    """Build Table III: the size of sketches on disk, and of gradients.

    A sketch's size is that of the sketcher's tables, including all versions and indices, divided by their rows.
    Gradients cover the sketched parameters; for the large model, all parameters. A sketch's size does not depend on the
    model, so the large model gets the measured one.
    """
    done_runs = "FROM ingest_runs WHERE sketcher = ? AND status = 'done' AND n_sketched > 0"
    prints = store.sql(f"SELECT DISTINCT fingerprint {done_runs}", [sketcher])["fingerprint"]
    on_disk = type(store).db_status(store.path).tables
    sketch_tables = on_disk.filter(pl.col("table").is_in([sketch_table(name) for name in prints]))
    per_sample = int(sketch_tables["bytes"].sum()) / int(sketch_tables["rows"].sum())
    n = store.sql("SELECT count(*) AS n FROM sketches WHERE sketcher = ?", [sketcher])["n"][0]
    model_name = recipe.model_name
    rows: list[tuple[Any, ...]] = []
    for model, parameters in ((model_name, _parameters(store, recipe, sketcher)), LARGE):
        rows.append((model, parameters, SKETCHES, model == model_name, per_sample, n, round(per_sample * n), 1.0))
        for kind, size in ((FP16, 2), (FP32, 4)):
            if parameters is not None:
                n_bytes = parameters * size
                rows.append((model, parameters, kind, False, float(n_bytes), n, n_bytes * n, n_bytes / per_sample))
    return pl.DataFrame(rows, schema=STORAGE, orient="row")


def _parameters(store: Store, recipe: Recipe, sketcher: str) -> int | None:
    """Count the sketched coordinates; None if the files of all checkpoints are gone."""
    for name in reversed(recipe.checkpoints):
        try:
            layout = store.sketcher_show(sketcher, checkpoint=name)
        except CheckpointError:
            continue
        return int(layout.filter("sketched")["coordinates"].sum())
    return None
