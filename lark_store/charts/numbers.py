"""Numbers in the texts of charts and of tables beside them."""

from __future__ import annotations

import math


def rate_text(rate: float) -> str:
    """Format a learning rate: 2e-5."""
    mantissa, _, power = f"{rate:.1e}".partition("e")
    return f"{mantissa.removesuffix('.0')}e{int(power)}"


def bytes_text(n: float) -> str:
    """Format a number of bytes."""
    units = ("B", "kB", "MB", "GB", "TB", "PB")
    step = 0 if n < 1 else min(int(math.log10(n) // 3), len(units) - 1)
    return f"{n / 1000**step:.3g} {units[step]}"


def times_text(times: float) -> str:
    """Format a factor: 2,030×."""
    return f"{float(f'{times:.3g}'):,.10g}×"


def points_text(share: float, digits: int = 1) -> str:
    """Format a difference of shares in percentage points, with its sign."""
    number = f"{100 * share:+.{digits}f}"
    return number[1:] if float(number) == 0 else number.replace("-", "−")
