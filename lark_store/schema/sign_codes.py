"""Codes: the signs of a folded sketch, stored with it, to find candidates for approximate search.

Folding sums the bins of a sketch that are equal mod F, which gives the sketch of the folded map. The signs of F = 4,096
bins take 512 bytes, 1/256 of a sketch in float16. Scores of codes only select candidates; reported scores always come
from the sketches.

Shape letters: N rows, K bins, F folded bins.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MAX_BINS = 4096


def code_bins(k: int) -> int:
    """Return F for a sketch of `k` bins: at most 4,096, a multiple of 8.

    >>> code_bins(65_536), code_bins(1_000)
    (4096, 1000)
    """
    return min(_MAX_BINS, -(-k // 8) * 8)


def code_bytes(k: int) -> int:
    """Return the length of a code in bytes."""
    return code_bins(k) // 8


def fold(vectors_NK: NDArray[Any], bins: int) -> NDArray[np.float32]:
    """Return sketches folded to `bins`, (N, F) float32; padded with zeros if F does not divide K."""
    n, k = vectors_NK.shape
    full = np.pad(vectors_NK, ((0, 0), (0, -k % bins)))
    folded: NDArray[np.float32] = full.reshape(n, full.shape[1] // bins, bins).sum(axis=1, dtype=np.float32)
    return folded


def codes_of(vectors_NK: NDArray[Any]) -> NDArray[np.uint8]:
    """Return the codes of sketches, (N, F/8) uint8: bit i of byte j is set if bin 8 j + i > 0."""
    return np.packbits(fold(vectors_NK, code_bins(vectors_NK.shape[1])) > 0, axis=1, bitorder="little")
