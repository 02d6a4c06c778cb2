"""A sweep of learning rates: rank agreement of neighbours, signal over noise, and the plateau. Pure functions.

Shape letters: R learning rates.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from lark_store.stats.ranks import spearman

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

STABLE = 0.95  # rank agreement of neighbouring rates
AUDIBLE = 10.0  # signal over noise
_FLOATS = ("learning_rate", "rank_agreement", "signal", "noise", "signal_over_noise")
SCHEMA = dict.fromkeys(_FLOATS, pl.Float64) | {"is_plateau": pl.Boolean, "is_chosen": pl.Boolean}
_PAIR = ["draw", "sample_id", "query_id"]


def compare_rates(rows: pl.DataFrame, noises: Mapping[float, float]) -> pl.DataFrame:
    """Return a row per learning rate, ascending, with the columns of `EifReport.sweep`.

    `rows` has the columns learning_rate, draw, sample_id, query_id and value; `noises` is the rounding error of a loss
    at each rate. A rate without rows has nulls.
    """
    rates = sorted(noises)
    matrices = [rows.filter(pl.col("learning_rate") == rate) for rate in rates]
    agreement = [_agreement(one, other) for one, other in pairwise(matrices)]
    signals = [float(np.sqrt(np.mean(m["value"].to_numpy() ** 2))) if len(m) else np.nan for m in matrices]
    ratios = [signal / noises[rate] for rate, signal in zip(rates, signals, strict=True)]
    stable = plateau(agreement, ratios)
    best = chosen(stable)
    is_plateau = [n in stable for n in range(len(rates))]
    is_chosen = [n == best for n in range(len(rates))]
    noise = [noises[rate] for rate in rates]
    columns = (rates, [*agreement, None], signals, noise, ratios, is_plateau, is_chosen)
    frame = pl.DataFrame(dict(zip(SCHEMA, columns, strict=True)), SCHEMA)
    return frame.with_columns(pl.col(pl.Float64).fill_nan(None))


def _agreement(one: pl.DataFrame, other: pl.DataFrame) -> float:
    """Return the rank correlation of two matrices over all pairs, averaged over draws."""
    pairs = one.join(other, on=_PAIR, nulls_equal=True, maintain_order="left")
    values = [
        spearman(part["value"].to_numpy()[None], part["value_right"].to_numpy()[None])[0]
        for _, part in pairs.group_by("draw", maintain_order=True)
    ]
    return float(np.mean(values)) if values else np.nan


def plateau(agreement: Sequence[float], signal_over_noise: Sequence[float]) -> range:
    """Return the numbers of the longest run of neighbouring rates with stable ranks; among equals, the lowest.

    `agreement` (R − 1) is the rank agreement of each rate with the next, at least `STABLE` within the plateau, and
    `signal_over_noise` (R) is at least `AUDIBLE`. Empty if no two neighbouring rates qualify.

    >>> plateau([0.5, 0.99, 0.98, 0.7], [2, 20, 90, 90, 90])
    range(1, 4)
    """
    best = start = range(0)
    for number, signal in enumerate(signal_over_noise):
        is_linked = len(start) > 0 and agreement[number - 1] >= STABLE
        if not signal >= AUDIBLE:  # also NaN: not measured
            start = range(0)
        elif is_linked:
            start = range(start.start, number + 1)
        else:
            start = range(number, number + 1)
        if len(start) > max(1, len(best)):
            best = start
    return best


def chosen(rates: range) -> int | None:
    """Return the number of the middle rate of a plateau, the lower of two; None if it is empty.

    >>> chosen(range(1, 5))
    2
    """
    return rates[(len(rates) - 1) // 2] if rates else None
