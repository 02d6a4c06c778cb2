"""Scatter plots as SVG in a page: points are links, without a script, and in the page's colours."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

SIDE, LEFT, BOTTOM, EDGE = 360.0, 64.0, 44.0, 12.0  # pixels: the square of the points, and around it
_TICKS = 5


@dataclass(frozen=True)
class Mark:
    """A point: its values, where a click leads, and its name, shown to a pointer."""

    x: float
    y: float
    href: str
    name: str


@dataclass(frozen=True)
class Tick:
    """A place on an axis, in pixels, and its label."""

    place: float
    label: str


@dataclass(frozen=True)
class Scatter:
    """A plot: its points in pixels, one scale for both axes, and their titles."""

    marks: list[Mark]
    ticks: list[Tick]
    x_title: str
    y_title: str
    side: float = SIDE
    left: float = LEFT
    bottom: float = BOTTOM
    edge: float = EDGE


def scatter(
    marks: Sequence[Mark], x_title: str, y_title: str, labels: dict[float, str] | None = None
) -> Scatter | None:
    """Return a plot of points over one scale, with the diagonal; None without points.

    `labels` are those of the ticks, by value; without them they are round numbers.
    """
    values = [value for mark in marks for value in (mark.x, mark.y)] + list(labels or ())
    if not marks:
        return None
    margin = 0.04 * (max(values) - min(values)) or 0.04 * abs(values[0]) or 1.0
    low, high = min(values) - margin, max(values) + margin

    def place(value: float) -> float:
        return round(SIDE * (value - low) / (high - low), 2)

    placed = [Mark(place(mark.x), SIDE - place(mark.y), mark.href, mark.name) for mark in marks]
    ticks = labels if labels is not None else dict(_round(low, high))
    return Scatter(placed, [Tick(place(value), label) for value, label in ticks.items()], x_title, y_title)


def _round(low: float, high: float) -> list[tuple[float, str]]:
    """Return about five round numbers within limits, with their labels."""
    power = 10 ** math.floor(math.log10((high - low) / _TICKS))
    step = power * next(factor for factor in (1, 2, 5, 10) if power * factor * _TICKS >= high - low)
    digits = max(0, -math.floor(math.log10(step)))
    numbers = range(math.ceil(low / step), math.floor(high / step) + 1)
    return [(number * step, f"{number * step:.{digits}f}".replace("-", "−")) for number in numbers]
