"""Compare the matrices of a sweep of learning rates: rank agreement of neighbours, signal over noise, the plateau."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from lark_store.eif.runs import NOISE, find_run
from lark_store.schema.vectors import where
from lark_store.stats.ranks import spearman
from lark_store.stats.sweep import chosen, plateau

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lark_store.eif.runs import Job
    from lark_store.schema.database import Database

_FLOATS = ("learning_rate", "rank_agreement", "signal", "noise", "signal_over_noise")
SCHEMA = dict.fromkeys(_FLOATS, pl.Float64) | {"is_plateau": pl.Boolean, "is_chosen": pl.Boolean}
_KEYS = ["draw", "sample_id", "query_id"]


def compare_rates(db: Database, jobs: Mapping[float, Sequence[Job]]) -> pl.DataFrame:
    """Return a row per learning rate with the columns of `EifReport.sweep`; `jobs` are the matrices of each rate."""
    stored = {rate: _matrices(db, of_rate) for rate, of_rate in jobs.items()}
    rates = list(stored)
    agreement = [_agreement(stored[a][0], stored[b][0]) for a, b in pairwise(rates)]
    signals = [_rms(frame["value"].to_numpy()) for frame, _ in stored.values()]
    noises = [noise for _, noise in stored.values()]
    ratios = [signal / noise for signal, noise in zip(signals, noises, strict=True)]
    stable = plateau(agreement, ratios)
    best = chosen(stable)
    rows = zip(
        rates,
        [*agreement, None],
        signals,
        noises,
        ratios,
        (i in stable for i in range(len(rates))),
        (i == best for i in range(len(rates))),
        strict=True,
    )
    return pl.DataFrame(list(rows), SCHEMA, orient="row").with_columns(pl.col(pl.Float64).fill_nan(None))


def _matrices(db: Database, jobs: Sequence[Job]) -> tuple[pl.DataFrame, float]:
    """Return the rows of the matrices that are done, and the noise of a loss."""
    runs = [run for job in jobs if (run := find_run(db, job)) is not None and run.status == "done"]
    rows = db.vectors.read("eif", ["eif_run", *_KEYS[1:], "value"], where(eif_run=[run.id for run in runs]))
    draws = pl.DataFrame([(run.id, run.draw) for run in runs], {"eif_run": pl.Int64, "draw": pl.Int64}, orient="row")
    noise = _rms(np.array([run.recipe[NOISE] for run in runs], np.float64))
    return rows.join(draws, on="eif_run").drop("eif_run"), noise


def _rms(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> float:
    return float(np.sqrt(np.mean(values**2))) if len(values) else np.nan


def _agreement(one: pl.DataFrame, other: pl.DataFrame) -> float:
    """Return the rank correlation of two matrices over all pairs, averaged over draws."""
    pairs = one.join(other, on=_KEYS, nulls_equal=True)
    values = [
        spearman(part["value"].to_numpy()[None], part["value_right"].to_numpy()[None])[0]
        for _, part in pairs.group_by("draw")
    ]
    return float(np.mean(values)) if values else np.nan
