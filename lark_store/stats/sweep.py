"""The plateau of a sweep of learning rates: where the ranks of measured influence are stable. Pure functions.

Shape letters: R learning rates.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

STABLE = 0.95  # rank agreement of neighbouring rates
AUDIBLE = 10.0  # signal over noise


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
