"""The cells of a table: values rounded for people by the name and the type of their column, or exact."""

from __future__ import annotations

import datetime as dt
import json
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import polars as pl

_DIGITS = 4  # significant digits of the largest value of a column
_DIGITS_OF_ERRORS = 2
_ERRORS = {"noise", "sketch_error"}
_IS_JSON = re.compile(r"[{\[].*[}\]]", re.DOTALL)
_SMALLEST_P = 0.001
_SHORT_HASH = 12
_P_VALUE = re.compile(r"(.*_)?[pq]_value")
_BYTES = re.compile(r"(.*_)?bytes(_.*)?")
_SECONDS = re.compile(r"(.*_)?seconds(_.*)?")
_NOT_A_COUNT = re.compile(r"(.*_)?(id|run|runs|seed|year|version)")
_HASH = re.compile(r"[0-9a-f]{40,}")
_NAME_OF_HASH = re.compile(r"(.*_)?(sha256|hash|fingerprint)")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


@dataclass(frozen=True)
class Column:
    """A column of a table as text. `is_constant`: all its values are the same."""

    name: str
    cells: list[str]
    is_number: bool
    is_constant: bool = False


def rounded(series: pl.Series) -> Column:
    """Return a column with values rounded for people; a missing value is empty."""
    values = series.to_list()
    cells = _formatted(series.name, values)
    is_constant = len(set(cells)) == 1 and (cells[0].startswith("<") or all(v == values[0] for v in values))
    return Column(series.name, cells, series.dtype.is_numeric(), is_constant)


def exact(series: pl.Series) -> Column:
    """Return a column with all digits of its values and complete texts."""
    return Column(series.name, [_exact(value) for value in series.to_list()], series.dtype.is_numeric())


def size(n_bytes: float) -> str:
    """Return a number of bytes in binary units.

    >>> size(512), size(81_920), size(1_300_000_000)
    ('512 B', '80 KiB', '1.2 GiB')
    """
    value, unit = float(n_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        if abs(value) < 1024:
            break
        value, unit = value / 1024, larger
    text = f"{value:.1f}".removesuffix(".0") if abs(value) < 10 and unit != "B" else f"{value:.0f}"
    return f"{text} {unit}"


def duration(seconds: float) -> str:
    """Return a time in units that people read.

    >>> duration(0.0213), duration(200), duration(7_500), duration(200_000)
    ('0.021 s', '3 min 20 s', '2 h 5 min', '2 d 7 h')
    """
    if seconds < 10:
        return f"{float(f'{seconds:.2g}'):g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    units = [(days, "d"), (hours, "h"), (minutes, "min"), (rest, "s")]
    first = next((i for i, (n, _) in enumerate(units) if n), 3)
    return " ".join(f"{n} {unit}" for n, unit in units[first : first + 2] if n)


def p_value(value: float) -> str:
    """Return a p-value with three decimals.

    >>> p_value(0.03125), p_value(1e-9), p_value(1)
    ('0.031', '<0.001', '1.000')
    """
    return f"<{_SMALLEST_P}" if value < _SMALLEST_P else f"{value:.3f}"


def numbers(values: Sequence[Any], digits: int = _DIGITS) -> list[str]:
    """Return numbers with as many decimals as the largest needs for these significant digits.

    >>> numbers([0.866812, -0.0123, None, 0.0000001])
    ['0.8668', '-0.0123', '', '1e-07']
    >>> numbers([28.5993, 4.149]), numbers([0.0002, 0.0001]), numbers([12_000, 3])
    (['28.60', '4.15'], ['0.0002', '0.0001'], ['12,000', '3'])
    """
    finite = [abs(value) for value in values if value is not None and math.isfinite(value)]
    if all(float(value).is_integer() for value in finite) and max(finite, default=0) < 1e15:
        return ["" if v is None else f"{int(v):,}" if math.isfinite(v) else str(v) for v in values]
    decimals = digits - 1 - math.floor(math.log10(max(finite)))
    if decimals < 0:  # large
        return ["" if v is None else f"{v:,.0f}" if abs(v) < 1e15 else f"{v:.3g}" for v in values]
    if decimals > digits + 3:  # small
        return ["" if v is None else f"{v:.3g}" for v in values]
    shortest = max(len(f"{v:.{decimals}f}".rstrip("0")) - len(f"{v:.0f}") - 1 for v in finite)
    if all(abs(round(v, decimals) - v) <= 1e-12 * v for v in finite):  # nothing is lost without the last zeros
        decimals = min(decimals, shortest)
    return ["" if v is None else _decimal(v, decimals) for v in values]


def _decimal(value: float, decimals: int) -> str:
    text = f"{value:,.{decimals}f}"
    return f"{value:.2g}" if value and not text.strip("-0.,") else text


def plain(text: str) -> str:
    r"""Return a text on one line, without control characters.

    >>> plain("yes\n\x1b[31mno")
    'yes �[31mno'
    """
    return _CONTROL.sub("�", " ".join(text.split()))


def _formatted(name: str, values: list[Any]) -> list[str]:
    """Return the values of a column as text, rounded as its name and their type ask for."""
    present = [value for value in values if value is not None]
    is_number = all(isinstance(value, int | float) and not isinstance(value, bool) for value in present)
    if not is_number:
        return ["" if value is None else _text(name, value) for value in values]
    by_name: list[tuple[re.Pattern[str], Callable[[Any], str]]] = [
        (_P_VALUE, p_value),
        (_BYTES, size),
        (_SECONDS, duration),
        (_NOT_A_COUNT, lambda value: f"{value:g}" if isinstance(value, float) else str(value)),
    ]
    for pattern, form in by_name:
        if pattern.fullmatch(name):
            return ["" if value is None else form(value) if math.isfinite(value) else str(value) for value in values]
    return numbers(values, _DIGITS_OF_ERRORS if name in _ERRORS else _DIGITS)


def _text(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dt.datetime):
        return value.strftime("%Y-%m-%d %H:%M")
    if isinstance(value, list) and all(isinstance(item, str | int) for item in value):
        return plain(", ".join(map(str, value)))
    if isinstance(value, str) and _NAME_OF_HASH.fullmatch(name) and _HASH.fullmatch(value):
        return f"{value[:_SHORT_HASH]}…"
    if isinstance(value, str) and _IS_JSON.fullmatch(value):
        return plain(value.replace(',"', ', "').replace('":', '": '))  # places to break a line
    return _exact(value)


def _exact(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list | dict):
        value = json.dumps(value, ensure_ascii=False, default=lambda v: v.hex() if isinstance(v, bytes) else str(v))
    elif isinstance(value, bytes):
        value = value.hex()
    return plain(str(value))
