"""Numbers formatted for readers, and the verdicts they support."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

ALPHA = 0.05
NO_DIFFERENCE = "this study shows no difference"


def percent(x: float) -> str:
    """Format a relative change.

    >>> percent(0.123), percent(-0.02)
    ('+12.3%', '−2.0%')
    """
    return f"{x:+.1%}".replace("-", "−")


def share(x: float) -> str:
    """Format a share.

    >>> share(0.5)
    '50.0%'
    """
    return f"{x:.1%}".replace("-", "−")


def points(x: float) -> str:
    """Format a difference of two shares, in percentage points.

    >>> points(-0.2)
    '−20.0'
    """
    return f"{100 * x:+.1f}".replace("-", "−")


def number(x: float) -> str:
    """Format a figure.

    >>> number(-0.12345), number(44.16)
    ('−0.123', '44.2')
    """
    return (f"{x:.1f}" if abs(x) >= 10 else f"{x:.3f}").replace("-", "−")


def signed(x: float) -> str:
    """Format a difference.

    >>> signed(0.5)
    '+0.500'
    """
    return f"{x:+.3f}".replace("-", "−")


def size(n: float) -> str:
    """Format a number of bytes.

    >>> size(512), size(133_419), size(14_596_022_272)
    ('512 bytes', '133.4 kB', '14.6 GB')
    """
    for unit, many in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= many:
            return f"{n / many:.1f} {unit}"
    return f"{n:.0f} bytes"


def interval(low: float | None, high: float | None, write: Callable[[float], str]) -> str:
    """Format an interval.

    >>> interval(0.1, 0.2, percent), interval(None, None, percent)
    ('[+10.0%, +20.0%]', '[undefined]')
    """
    return "[undefined]" if low is None or high is None else f"[{write(low)}, {write(high)}]"


def ratio_text(value: float | None, low: float | None, high: float | None) -> str:
    """Format a ratio of means with its interval.

    >>> ratio_text(1.25, 1.1, 1.4), ratio_text(None, None, None)
    ('1.250 [1.100, 1.400]', 'undefined')
    """
    return "undefined" if value is None else f"{number(value)} {interval(low, high, number)}"


def per_query_text(row: Mapping[str, Any]) -> str:
    """Return a sentence on the ratios of single queries; empty where none is defined.

    >>> per_query_text({"r_median": 1.5, "r_q1": 1.0, "r_q3": 2.25, "n_ratio": 40})
    " The median of 40 queries' ratios is 1.500, the quartiles are 1.000 and 2.250."
    """
    if not row["n_ratio"]:
        return ""
    median, q1, q3 = (number(row[name]) for name in ("r_median", "r_q1", "r_q3"))
    return f" The median of {row['n_ratio']} queries' ratios is {median}, the quartiles are {q1} and {q3}."


def verdict(estimate: float | None, low: float | None, high: float | None, q: float | None) -> bool | None:
    """Return whether a difference is above 0 (True), below 0 (False), or not significant (None).

    It is significant if its q-value is at most 0.05 and its interval, if any, excludes 0.

    >>> verdict(0.2, 0.1, 0.3, 0.01), verdict(-0.2, -0.3, -0.1, 0.01), verdict(0.2, -0.1, 0.5, 0.01)
    (True, False, None)
    """
    if estimate is None or estimate == 0 or q is None or not q <= ALPHA:
        return None
    if low is not None and high is not None and not (low > 0 if estimate > 0 else high < 0):
        return None
    return estimate > 0


def test_text(p: float | None, q: float | None) -> str:
    """Format a test's p-value, and its q-value among all tests.

    >>> test_text(0.0002, 0.0012)
    'p = 0.0002, q = 0.0012'
    """
    return "not tested" if p is None or q is None else f"p = {p:.2g}, q = {q:.2g}"


def conclusion(holds: bool | None, above: str, below: str) -> str:
    """Choose the words that go with a verdict."""
    return {True: above, False: below, None: NO_DIFFERENCE}[holds]
