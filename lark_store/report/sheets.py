"""Tables for readers: headings with units, rounded numbers, intervals as [low, high]."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lark_store.charts.numbers import points_text

if TYPE_CHECKING:
    from collections.abc import Callable

    import polars as pl

    Row = dict[str, Any]
    Cell = Callable[[Row], str]

MISSING = "–"


@dataclass(frozen=True)
class Sheet:
    """A formatted table: the first column names the row; `is_aside` tables are folded."""

    label: str
    caption: str
    heads: list[tuple[str, bool]]  # heading, and whether its column is numeric
    rows: list[list[str]]
    is_aside: bool = False


def number(value: float | None, digits: int = 3) -> str:
    """Return a rounded number, `–` if missing."""
    if value is None or math.isnan(value):
        return MISSING
    return f"{value:,.{digits}f}".replace("-", "−")


def share(value: float | None) -> str:
    """Return a share in percent."""
    return MISSING if value is None or math.isnan(value) else f"{100 * value:.1f}%"


def change(value: float | None) -> str:
    """Return a relative change in percent, with its sign."""
    return MISSING if value is None or math.isnan(value) else f"{points_text(value)}%"


def points(value: float | None) -> str:
    """Return a difference of shares in percentage points."""
    return MISSING if value is None or math.isnan(value) else points_text(value)


def p_value(value: float | None) -> str:
    """Return a p-value."""
    if value is None or math.isnan(value):
        return MISSING
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def formatted(field: str, write: Callable[[Any], str]) -> Cell:
    """Return the cell of a number."""
    return lambda row: write(row[field])


def word(field: str) -> Cell:
    """Return the cell of a text."""
    return lambda row: MISSING if row[field] is None else str(row[field])


def whole(field: str) -> Cell:
    """Return the cell of a whole number."""
    return lambda row: MISSING if row[field] is None else f"{row[field]:,}"


def interval(low: str, high: str, write: Callable[[Any], str]) -> Cell:
    """Return the cell of an interval, with a single percent sign."""

    def cell(row: Row) -> str:
        if row[low] is None or row[high] is None or math.isnan(row[low]) or math.isnan(row[high]):
            return MISSING
        return f"[{write(row[low]).removesuffix('%')}, {write(row[high])}]"

    return cell


def make_sheet(
    label: str, caption: str, frame: pl.DataFrame, columns: dict[str, Cell], words: int, **more: bool
) -> Sheet:
    """Return a table; its first `words` columns hold text."""
    heads = [(head, i >= words) for i, head in enumerate(columns)]
    rows = [[cell(row) for cell in columns.values()] for row in frame.iter_rows(named=True)]
    return Sheet(label, caption, heads, rows, **more)
