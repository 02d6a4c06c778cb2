"""Numbers as people read them, and what they allow to be said."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

ALPHA = 0.05
NO_DIFFERENCE = "no difference that this study can show"


def percent(x: float) -> str:
    """Write a relative change.

    >>> percent(0.123), percent(-0.02)
    ('+12.3%', '−2.0%')
    """
    return f"{x:+.1%}".replace("-", "−")


def share(x: float) -> str:
    """Write a share of a whole.

    >>> share(0.5)
    '50.0%'
    """
    return f"{x:.1%}".replace("-", "−")


def points(x: float) -> str:
    """Write a difference of two shares, in percentage points.

    >>> points(-0.2)
    '−20.0'
    """
    return f"{100 * x:+.1f}".replace("-", "−")


def number(x: float) -> str:
    """Write a figure.

    >>> number(-0.12345), number(44.16)
    ('−0.123', '44.2')
    """
    return (f"{x:.1f}" if abs(x) >= 10 else f"{x:.3f}").replace("-", "−")


def signed(x: float) -> str:
    """Write a difference.

    >>> signed(0.5)
    '+0.500'
    """
    return f"{x:+.3f}".replace("-", "−")


def size(n: float) -> str:
    """Write bytes.

    >>> size(512), size(133_419), size(14_596_022_272)
    ('512 bytes', '133.4 kB', '14.6 GB')
    """
    for unit, many in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= many:
            return f"{n / many:.1f} {unit}"
    return f"{n:.0f} bytes"


def interval(low: float | None, high: float | None, write: Callable[[float], str]) -> str:
    """Write an interval.

    >>> interval(0.1, 0.2, percent), interval(None, None, percent)
    ('[+10.0%, +20.0%]', '[undefined]')
    """
    return "[undefined]" if low is None or high is None else f"[{write(low)}, {write(high)}]"


def verdict(estimate: float | None, low: float | None, high: float | None, q: float | None) -> bool | None:
    """Tell whether a difference is above 0 (True), below (False), or not shown to be either (None).

    It is shown where its q-value is at most 0.05 and its interval, where it has one, lies on its side of 0.

    >>> verdict(0.2, 0.1, 0.3, 0.01), verdict(-0.2, -0.3, -0.1, 0.01), verdict(0.2, -0.1, 0.5, 0.01)
    (True, False, None)
    """
    if estimate is None or estimate == 0 or q is None or not q <= ALPHA:
        return None
    if low is not None and high is not None and not (low > 0 if estimate > 0 else high < 0):
        return None
    return estimate > 0


def tested(p: float | None, q: float | None) -> str:
    """Write a test's p-value, and its q-value among all that were looked at.

    >>> tested(0.0002, 0.0012)
    'p = 0.0002, q = 0.0012'
    """
    return "not tested" if p is None or q is None else f"p = {p:.2g}, q = {q:.2g}"


def concluded(holds: bool | None, above: str, below: str) -> str:
    """Choose the words that go with a verdict."""
    return {True: above, False: below, None: NO_DIFFERENCE}[holds]
