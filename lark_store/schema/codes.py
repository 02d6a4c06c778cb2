"""Codes: the signs of a folded sketch, kept beside it, by which an approximate search finds its candidates.

Summing the bins of a sketch that are equal mod F folds it to F bins: the sketch of the folded map. The signs of
F = 4,096 bins take 512 bytes, 1/256 of a sketch in float16. The scores that they give only choose candidates, whose
sketches are then read: no score that anyone sees comes from a code.

Shape letters: N rows, K bins, F folded bins.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MOST_BINS = 4096


def code_bins(k: int) -> int:
    """Return F for a sketch of `k` bins: 4,096, or as many as the sketch has, a multiple of 8.

    >>> code_bins(65_536), code_bins(1_000)
    (4096, 1000)
    """
    return min(_MOST_BINS, -(-k // 8) * 8)


def code_bytes(k: int) -> int:
    """Return the length of a code in bytes."""
    return code_bins(k) // 8


def fold(vectors_NK: NDArray[Any], bins: int) -> NDArray[np.float32]:
    """Return sketches folded to `bins`, (N, F) float32; sketches that F does not divide are filled up with zeros."""
    n, k = vectors_NK.shape
    folds = -(-k // bins)
    full = np.zeros((n, folds * bins), np.float32) if k % bins else vectors_NK.astype(np.float32, copy=False)
    if k % bins:
        full[:, :k] = vectors_NK
    folded: NDArray[np.float32] = full.reshape(n, folds, bins).sum(axis=1)
    return folded


def codes_of(vectors_NK: NDArray[Any]) -> NDArray[np.uint8]:
    """Return the codes of sketches, (N, F/8) uint8: bit i of byte j is set where bin 8 j + i is above 0."""
    return np.packbits(fold(vectors_NK, code_bins(vectors_NK.shape[1])) > 0, axis=1, bitorder="little")
