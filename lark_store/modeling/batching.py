"""Batches of samples of similar length, within a token budget."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

T = TypeVar("T")
TOKENS = {"cpu": 1024, "mps": 2048, "cuda": 8192}  # default token budget of a batch
WINDOW = 256  # samples sorted by length together, and committed together by several processes


def budget(requested: int | None, device: str, largest: int | None) -> int:
    """Return a batch's token budget: `requested` or the device's default, at most `largest`."""
    tokens = requested or TOKENS[device]
    return tokens if largest is None else min(tokens, largest)


def windows(samples: Iterable[T], size: int = WINDOW) -> Iterator[list[T]]:
    """Split a stream into lists of at most `size`."""
    stream = iter(samples)
    while window := list(islice(stream, size)):
        yield window


def batches(window: Iterable[T], length: Callable[[T], int], budget: Callable[[], int]) -> Iterator[list[T]]:
    """Yield batches of at least one sample, longest first: longest × count ≤ `budget()`, called for each batch.

    >>> list(batches(["aa", "a", "aaa", "a"], len, lambda: 4))
    [['aaa'], ['aa', 'a'], ['a']]
    """
    rest = sorted(window, key=length, reverse=True)  # longest first: memory runs out early or never
    while rest:
        count = max(1, budget() // max(1, length(rest[0])))
        yield rest[:count]
        rest = rest[count:]
