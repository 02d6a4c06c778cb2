"""The CPU kernel: one compiled loop over chunks.

The map is one-to-one within a chunk, so a chunk is read sequentially and its runs never collide. Chunks are assigned to
Z partial sums by number, and a thread handles one partial sum of one sample. So the bytes depend neither on the number
of threads nor on how a gradient is split.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lark_store.core.jit import compiled

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lark_store.gradients.sketch.oporp import Oporp

_PARTS = 2  # Z: threads per sample; each needs 4 K bytes, which fit in a core's cache
_ALONE = 1 << 16  # coordinates too few for a second thread


@compiled
def _mix(x: np.uint64) -> np.uint64:
    """Hash a 32-bit value, like `oporp.mix`."""
    x = (((x >> np.uint64(16)) ^ x) * np.uint64(0x7FEB352D)) & np.uint64(0xFFFFFFFF)
    x = (((x >> np.uint64(15)) ^ x) * np.uint64(0x5BD1E995)) & np.uint64(0xFFFFFFFF)
    return (x >> np.uint64(16)) ^ x


@compiled
def _map_chunk(chunk: np.uint64, keys: NDArray[np.uint64], rows: NDArray[np.uint64], codes: NDArray[np.uint64]) -> None:
    """Compute the targets of a chunk's runs: `rows` (R,), and `codes` (R, 2): lane code and 64 sign bits."""
    n_rows = np.uint64(len(rows))
    low = np.uint64(0)
    while (np.uint64(4) << (low * np.uint64(2))) <= n_rows:
        low += np.uint64(1)
    low_mask, high_mask = (np.uint64(1) << low) - np.uint64(1), (n_rows >> low) - np.uint64(1)
    key, flip = _mix(chunk ^ keys[0]), _mix(chunk ^ keys[1]) & (n_rows - np.uint64(1))
    for r in range(n_rows):
        row = np.uint64(r)
        a, b = row & low_mask, row >> low
        a ^= _mix((b * np.uint64(4)) ^ key) & low_mask
        b ^= _mix((a * np.uint64(4) + np.uint64(1)) ^ key) & high_mask
        a ^= _mix((b * np.uint64(4) + np.uint64(2)) ^ key) & low_mask
        b ^= _mix((a * np.uint64(4) + np.uint64(3)) ^ key) & high_mask
        rows[r] = ((b << low) | a) ^ flip
        run = chunk * n_rows + row
        codes[r, 0] = _mix(run ^ keys[2]) & np.uint64(63)
        codes[r, 1] = _mix(run ^ keys[3]) | (_mix(run ^ keys[4]) << np.uint64(32))


@compiled
def _map_chunks(first_chunk: int, n_chunks: int, n_rows: int, keys: NDArray[np.uint64]) -> Any:
    """Compute the targets of all runs of consecutive chunks: rows (C, R) and codes (C, R, 2)."""
    rows, codes = np.empty((n_chunks, n_rows), np.uint64), np.empty((n_chunks, n_rows, 2), np.uint64)
    for c in range(n_chunks):
        _map_chunk(np.uint64(first_chunk + c), keys, rows[c], codes[c])
    return rows, codes


@compiled
def _add_part(
    values: NDArray[np.float32],
    rows: NDArray[np.uint64],
    codes: NDArray[np.uint64],
    start: int,
    bins: NDArray[np.float32],
) -> None:
    """Add every second chunk of a stretch (N,), from chunk `start`, to bins (R, 64)."""
    n, n_rows = np.uint64(len(values)), rows.shape[1]
    for c in range(start, len(rows), _PARTS):
        for r in range(n_rows):
            first = np.uint64((c * n_rows + r) * 64)
            if first >= n:
                break
            row, lane, signs = rows[c, r], codes[c, r, 0], codes[c, r, 1]
            if first + np.uint64(64) <= n:
                for i in range(64):
                    sign = np.float32(1 - 2 * np.int32((signs >> np.uint64(i)) & np.uint64(1)))
                    bins[row, np.uint64(i)] += sign * values[first + (np.uint64(i) ^ lane)]
            else:
                for i in range(64):
                    place = first + (np.uint64(i) ^ lane)
                    if place < n:
                        sign = np.float32(1 - 2 * np.int32((signs >> np.uint64(i)) & np.uint64(1)))
                        bins[row, np.uint64(i)] += sign * values[place]


@cache
def _pool(n_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n_threads, thread_name_prefix="sketch")


class CpuKernel:
    """A `Kernel` with partial sums spread over torch's number of threads."""

    def __init__(self, oporp: Oporp) -> None:
        self.oporp = oporp
        self._keys = np.array(oporp.keys(), np.uint64)

    def new(self, n: int) -> torch.Tensor:
        """Return accumulators for `n` sketches, (Z, S, K)."""
        return torch.zeros(_PARTS, n, self.oporp.k)

    def add(self, gradient_SN: torch.Tensor, first_chunk: int, out: torch.Tensor) -> None:
        """Add stretches that start at chunk `first_chunk`."""
        gradient = gradient_SN.detach().to(torch.float32).contiguous().numpy()
        bins = out.view(*out.shape[:2], self.oporp.rows, 64).numpy()
        rows, codes = _map_chunks(first_chunk, -(-gradient.shape[1] // self.oporp.k), self.oporp.rows, self._keys)
        jobs = [(s, part) for s in range(len(gradient)) for part in range(min(_PARTS, len(rows)))]

        def work(job: tuple[int, int]) -> None:
            s, part = job
            _add_part(gradient[s], rows, codes, part, bins[(first_chunk + part) % _PARTS, s])

        n_threads = min(torch.get_num_threads(), len(jobs))
        if n_threads == 1 or gradient.size < _ALONE:
            for job in jobs:
                work(job)
        else:
            for _ in _pool(torch.get_num_threads()).map(work, jobs):
                continue

    def finish(self, out: torch.Tensor) -> torch.Tensor:
        """Sum the partial sums in order; return the sketches, (S, K)."""
        return out.sum(dim=0)
