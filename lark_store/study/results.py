"""A study's results: a frame per table, all computed from its store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import polars as pl

    from lark_store.study.recipe import Recipe

PLAIN = "raw"


@dataclass(frozen=True)
class Results:
    """A study's tables.

    Intervals (`low`, `high`) are 95%, over queries; a checkpoint's rows are in order of epochs. `sketch_error` bounds
    the change of a figure under another seed of the sketcher (`query.sketch_error`).

    `checkpoints`: checkpoint, epoch, step, learning_rate, train_loss, query_loss (mean over queries, nats per target
    token), accuracy, accuracy_low, accuracy_high, macro_f1, macro_f1_low, macro_f1_high, n_evaluated. Unmeasured values
    are null.

    `influence` (Table I, at every checkpoint): checkpoint, epoch, source, stage, variant, mean_max_influence, low,
    high, sketch_error, ft_wins, ft_wins_low, ft_wins_high (share of queries on which fine-tuning is closer; null for
    fine-tuning itself), n_queries.

    `relevance` (a pretraining source over another in one variant): checkpoint, epoch, variant, source, against_source,
    value (ratio of their mean max influences − 1), low, high, difference (of the means), difference_low,
    difference_high, sketch_error (of the difference), p_value, n_queries.

    `dominance` (Table II, fine-tuning against each pretraining source and variant): checkpoint, epoch, learning_rate,
    source, variant, ft, pt, ratio (ft over pt), low, high, sketch_error (of the ratio), r_median, r_q1, r_q3 (median
    and quartiles of the ratios of the n_ratio queries with Φ(pt) > 0), n_ratio, ft_wins, pt_wins, pt_wins_low,
    pt_wins_high, p_value, accuracy, n_queries. `source` and `variant` are the pretraining group's. `ratio` is null
    unless ft and pt are above 0.

    `format_effect` (each other variant over `raw`, same source): checkpoint, epoch, source, variant, value (a ratio of
    mean max influences), low, high, sketch_error, r_median, r_q1, r_q3, n_ratio, p_value, n_queries.

    `storage` (Table III): model, parameters, what (`sketches` as measured on disk, `gradients in fp16`, `… in fp32`),
    measured (bool), bytes_per_sample, n_samples, bytes, times_smaller (row size over sketch size; 1 for sketches).

    `methods` (Table IV): checkpoint, epoch, source, variant, method (the baseline, such as `bm25`), ft_wins (by LARK's
    cosine), rival_ft_wins, difference (ft_wins − rival_ft_wins), low, high, p_value, n_queries.

    `queries`: checkpoint, epoch, query_id, label, prediction, correct, loss, ft, pt (Φ of fine-tuning and of the
    recipe's `against` source, in its main variant), ratio, winner (finetune, pretrain, tie).

    `truth` (empty without `[truth]`): checkpoint, epoch, method, mrr, mrr_low, mrr_high, recall_at_10, recall_low,
    recall_high, n_queries, n_samples.

    `truth_gaps` (cosine minus each other method, paired): checkpoint, epoch, method, metric (mrr, recall_at_10),
    difference, low, high, p_value, n_queries.

    `notes` are warnings beyond the tables. `environment` and `hashes` come from the store.
    """

    recipe: Recipe
    checkpoints: pl.DataFrame
    influence: pl.DataFrame
    relevance: pl.DataFrame
    dominance: pl.DataFrame
    format_effect: pl.DataFrame
    storage: pl.DataFrame
    methods: pl.DataFrame
    queries: pl.DataFrame
    truth: pl.DataFrame
    truth_gaps: pl.DataFrame
    notes: list[str]
    environment: dict[str, Any]
    hashes: dict[str, str]

    def tables(self) -> dict[str, pl.DataFrame]:
        """Return the non-empty frames by name, in reading order."""
        names = "checkpoints influence relevance dominance format_effect storage methods queries truth truth_gaps"
        frames = {name: getattr(self, name) for name in names.split()}
        return {name: frame for name, frame in frames.items() if len(frame)}
