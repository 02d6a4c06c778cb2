"""The stateless OPORP map and gradient sketches.

OPORP (Li & Li 2023, arXiv:2302.03505) sketches u ∈ R^P with one permutation, one random sign vector and k bins of fixed
length: x_b = Σ_{i in bin b} s_i u_i. A stored permutation of a 7B gradient takes 58 GB; this map is computed.

A *parameter* (one tensor) starts at a chunk boundary. A *chunk* is k coordinates. A keyed bijection maps them onto the
k bins, so two coordinates of one chunk never collide, and two of different chunks collide with probability 1/k. A *run*
is 64 coordinates that move together, from a row of the chunk to a row of the bins:

    row  → 4-round Feistel network keyed by the chunk, then xor with a key of the chunk
    lane → lane xor 6 hashed bits of the run
    sign = one of 64 hashed bits of the run, by target lane

⟨x, y⟩ is an unbiased estimate of ⟨u, v⟩, and the cosine of sketches estimates the cosine ρ of gradients with standard
deviation about (1 − ρ²)/√k. Every code is exact integer arithmetic below 2^63: the same on every device.

Shape letters: P coordinates of a parameter, C chunks, R rows of a chunk (k/64), L lanes (64), K bins.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from lark_store.gradients.sketch.sketcher_checks import MAP_VERSION, check_k

LANES = 64
_MASK = 0xFFFFFFFF
_FEISTEL, _ROW, _LANE, _SIGN_LOW, _SIGN_HIGH = range(5)


def mix(x: torch.Tensor) -> torch.Tensor:
    """Hash 32-bit values in int64. Both multipliers are below 2^31, so products do not overflow."""
    x = ((x >> 16) ^ x) * 0x7FEB352D & _MASK
    x = ((x >> 15) ^ x) * 0x5BD1E995 & _MASK
    return (x >> 16) ^ x


@dataclass(frozen=True)
class Oporp:
    """The map for one `k` and `seed`.

    >>> rows, lanes, signs = Oporp(k=256, seed=0).codes(first_chunk=0, n_chunks=1)
    >>> sorted(rows[0].tolist())
    [0, 1, 2, 3]
    """

    k: int
    seed: int

    def __post_init__(self) -> None:
        check_k(self.k)

    @property
    def rows(self) -> int:
        """R, the rows of a chunk."""
        return self.k // LANES

    def keys(self) -> list[int]:
        """Derive five 32-bit keys from the seed."""
        digest = hashlib.sha256(f"lark-store map {MAP_VERSION} seed {self.seed}".encode()).digest()
        return [int.from_bytes(digest[4 * i : 4 * i + 4], "little") for i in range(5)]

    def codes(self, first_chunk: int, n_chunks: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the target of each run in consecutive chunks.

        Returns
        -------
        rows : (C, R) int64
            A run's target row of the bins; one-to-one within a chunk.
        lanes : (C, R) int64 in [0, 64)
            Xor mask of a run's lanes.
        signs : (C, R, 2) int64 below 2^32
            Bit l of word 0 (l < 32) or bit l − 32 of word 1: 1 if the value in target lane l is negated.
        """
        run_CR = torch.arange(first_chunk * self.rows, (first_chunk + n_chunks) * self.rows).view(-1, self.rows)
        return self.codes_of(run_CR)

    def codes_of(self, run: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return row (…), lane code (…) and sign words (…, 2) of runs (…), numbered from the first chunk."""
        keys = self.keys()
        chunk, row = run // self.rows, run % self.rows
        rows = self._feistel(row, mix(chunk ^ keys[_FEISTEL]))
        rows = rows ^ (mix(chunk ^ keys[_ROW]) & (self.rows - 1))
        lanes = mix(run ^ keys[_LANE]) & (LANES - 1)
        signs = torch.stack([mix(run ^ keys[_SIGN_LOW]), mix(run ^ keys[_SIGN_HIGH])], dim=-1)
        return rows, lanes, signs

    def _feistel(self, row: torch.Tensor, chunk_key: torch.Tensor) -> torch.Tensor:
        """Permute [0, R) in four rounds; each changes one half of the bits by a hash of the other."""
        bits = self.rows.bit_length() - 1
        low = bits // 2
        low_mask, high_mask = (1 << low) - 1, (1 << (bits - low)) - 1
        a, b = row & low_mask, row >> low
        for turn in range(4):
            if turn % 2 == 0:
                a = a ^ (mix((b * 4 + turn) ^ chunk_key) & low_mask)
            else:
                b = b ^ (mix((a * 4 + turn) ^ chunk_key) & high_mask)
        return (b << low) | a
