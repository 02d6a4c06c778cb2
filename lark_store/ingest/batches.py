"""Samples to batches: of like length, so that little is padding, and within a budget of tokens."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

T = TypeVar("T")
TOKENS = {"cpu": 1024, "mps": 2048, "cuda": 8192}  # a batch's budget where none is given
WINDOW = 256  # samples that are sorted by length together, and that several processes commit together


def budget(asked: int | None, device: str, largest: int | None) -> int:
    """Return the tokens that a batch may have: those asked for, or the device's, but no more than was found to fit."""
    wanted = asked or TOKENS[device]
    return wanted if largest is None else min(wanted, largest)


def windows(samples: Iterable[T], size: int = WINDOW) -> Iterator[list[T]]:
    """Cut a stream into lists of at most `size`."""
    stream = iter(samples)
    while window := list(islice(stream, size)):
        yield window


def batches(window: Iterable[T], length: Callable[[T], int], budget: Callable[[], int]) -> Iterator[list[T]]:
    """Yield batches, the longest samples first: longest × count ≤ `budget()`, asked anew for each; at least one sample.

    >>> list(batches(["aa", "a", "aaa", "a"], len, lambda: 4))
    [['aaa'], ['aa', 'a'], ['a']]
    """
    rest = sorted(window, key=length, reverse=True)  # if memory runs out, it does so at once
    while rest:
        count = max(1, budget() // max(1, length(rest[0])))
        yield rest[:count]
        rest = rest[count:]
