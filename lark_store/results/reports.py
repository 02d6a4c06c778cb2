"""Reports of ingest, plan and repair."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lark_store.results.tabular import Tabular

if TYPE_CHECKING:
    import polars as pl


@dataclass(frozen=True, repr=False)
class IngestReport(Tabular[dict[str, Any]]):
    """The result of an ingest, one row per checkpoint × source × variant.

    `units` has the columns checkpoint, source, variant, n_samples, n_existing, n_sketched, n_failed, n_truncated
    (sketched samples longer than the variant or the model allows), n_cut (tokens they lost), run, seconds and bytes;
    seconds and bytes are null for an import. `failures` has checkpoint, source, variant, sample_id and reason; `notes`
    report unusual handling. Its rows are the units.
    """

    units: pl.DataFrame
    failures: pl.DataFrame
    notes: list[str]

    @property
    def n_failed(self) -> int:
        """Number of samples that failed."""
        return int(self.units["n_failed"].sum())

    @property
    def n_truncated(self) -> int:
        """Number of sketched samples that were truncated."""
        return int(self.units["n_truncated"].sum())

    @property
    def n_cut(self) -> int:
        """Number of tokens lost by truncation."""
        return int(self.units["n_cut"].sum())

    @property
    def _rows(self) -> pl.DataFrame:
        return self.units


@dataclass(frozen=True, repr=False)
class PlanReport(Tabular[dict[str, Any]]):
    """The estimated cost of an ingest.

    `units` has the columns checkpoint, source, variant, n_samples, n_existing, tokens_per_sample (mean), n_truncated
    (samples that will be truncated), n_cut (tokens they will lose), seconds and bytes, for the missing sketches. Tokens
    are counted on some samples of each unit, or all if they are few, and scaled up.
    `checkpoints` has checkpoint, path (`BatchPath`: several samples per backward pass, `HookPath`: one at a time),
    tensors and coordinates sketched, bytes_per_sample, seconds_per_sample and peak_bytes of memory: the device's on
    CUDA, else the process's. `notes` list further costs and samples that will fail. Its rows are the units.
    """

    units: pl.DataFrame
    checkpoints: pl.DataFrame
    notes: list[str] = field(default_factory=list)

    @property
    def _rows(self) -> pl.DataFrame:
        return self.units


@dataclass(frozen=True, repr=False)
class ProbeReport(Tabular[dict[str, Any]]):
    """The result of probing facts, one row per checkpoint × source × variant; after a dry run, its estimate.

    `units` has the columns checkpoint, source, variant, n_facts, n_existing (facts probed before), n_probed (by this
    call, failed ones included; after a dry run those to probe), n_failed, n_correct (facts with a correct greedy
    answer), n_latent (greedy wrong, but a sampled answer correct; null without sampled answers), run and seconds.
    `failures` has checkpoint, source, variant, sample_id and reason. Its rows are the units.
    """

    units: pl.DataFrame
    failures: pl.DataFrame
    is_plan: bool = False

    @property
    def n_failed(self) -> int:
        """Number of samples that could not be probed."""
        return int(self.units["n_failed"].sum())

    @property
    def _rows(self) -> pl.DataFrame:
        return self.units


@dataclass(frozen=True, repr=False)
class SurvivalReport(Tabular[dict[str, Any]]):
    """A survival analysis of facts. Its rows are the effects.

    `effects` has a row per covariate, in the columns of the SQL function `survival`. `curves` are Kaplan–Meier curves:
    group, time, n_risk, n_events, survival (the share of facts without the event), low, high. `tests` has the log-rank
    test of the groups: by, n_groups, chi2, p_value. `recall` is the share of correct facts at each checkpoint, seen and
    withheld. `events` are the facts at risk, in the columns of `fact_events`, with their group; `by` is what the groups
    differ in.
    """

    effects: pl.DataFrame
    curves: pl.DataFrame
    tests: pl.DataFrame
    recall: pl.DataFrame
    events: pl.DataFrame
    by: str | None

    @property
    def _rows(self) -> pl.DataFrame:
        return self.effects


@dataclass(frozen=True, repr=False)
class EifReport(Tabular[dict[str, Any]]):
    """The result of a measurement of influence, or its plan; a row per learning rate, and per draw of a domain.

    `runs` has the columns eif_run (null in a plan of a new run), checkpoint, source, queries, mode, optimizer,
    learning_rate, draw, n_samples, n_queries, n_existing (pairs of both measured before), n_measured (pairs measured
    now, or to measure), forward and backward (passes of one sample or query each) and seconds.

    `sweep` has, for each learning rate, rank_agreement (Spearman's correlation with the next rate's matrix, over all
    pairs, averaged over draws), signal (root mean square of the influence), noise (of the rounding of losses),
    signal_over_noise, is_plateau and is_chosen; empty without a sweep. `failures` has source, sample_id and reason of
    samples and queries left out. Its rows are the runs.
    """

    runs: pl.DataFrame
    sweep: pl.DataFrame
    failures: pl.DataFrame
    notes: list[str]

    @property
    def _rows(self) -> pl.DataFrame:
        return self.runs


@dataclass(frozen=True, repr=False)
class RepairReport(Tabular[dict[str, Any]]):
    """The result of a repair: repaired findings and remaining ones. Its rows are the remaining ones.

    Both frames have the columns of `Store.db_check`. After a dry run, `mended` has the planned repairs.
    """

    mended: pl.DataFrame
    left: pl.DataFrame

    @property
    def _rows(self) -> pl.DataFrame:
        return self.left
