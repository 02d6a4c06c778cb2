"""The stateless OPORP map, and the sketch it makes of a gradient.

OPORP (Li & Li 2023, arXiv:2302.03505) sketches u ∈ R^P with one permutation, one random sign vector and k bins of fixed
length: x_b = Σ_{i in bin b} s_i u_i. A stored permutation of a 7B gradient takes 58 GB; this one is computed.

A *parameter* (one tensor) starts at a chunk boundary; a *chunk* is k coordinates, which a keyed bijection maps
one-to-one onto the k bins, so that two coordinates of one chunk never collide and two of different chunks collide with
probability 1/k. A *run* is 64 coordinates that move together, from a row of the chunk to a row of the bins:

    row  → 4-round Feistel network keyed by the chunk, then xor with a key of the chunk
    lane → lane xor 6 hashed bits of the run
    sign = one of 64 hashed bits of the run, by the lane it comes to

⟨x, y⟩ is an unbiased estimate of ⟨u, v⟩, and the cosine of sketches estimates the cosine ρ of gradients with standard
deviation about (1 − ρ²)/√k. Every code is exact integer arithmetic below 2^63: the same on every device.

Shape letters: P coordinates of a parameter, C chunks, R rows of a chunk (k/64), L lanes (64), K bins.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property

import torch

from lark_store.errors import InputError
from lark_store.ingest.corrections import Corrector
from lark_store.ingest.kernels import kernel_for

MAP_VERSION = 1
LANES = 64
SMALLEST_K, LARGEST_K = 256, 1_048_576
_MASK = 0xFFFFFFFF
_FEISTEL, _ROW, _LANE, _SIGN_LOW, _SIGN_HIGH = range(5)


def check_k(k: int) -> int:
    """Return `k` if the map offers it: a power of two from 256 to 1,048,576."""
    if SMALLEST_K <= k <= LARGEST_K and k & (k - 1) == 0:
        return k
    raise InputError(f"k = {k} is not a power of two from {SMALLEST_K} to {LARGEST_K}", "the paper's k is 65536")


def mix(x: torch.Tensor) -> torch.Tensor:
    """Hash 32-bit values held in int64. Both multipliers are below 2^31, so no product overflows."""
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
        """Return the five 32-bit keys that the seed gives."""
        digest = hashlib.sha256(f"lark-store map {MAP_VERSION} seed {self.seed}".encode()).digest()
        return [int.from_bytes(digest[4 * i : 4 * i + 4], "little") for i in range(5)]

    def codes(self, first_chunk: int, n_chunks: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return where each run of these chunks goes.

        Returns
        -------
        rows : (C, R) int64
            The row of the bins that a run comes to; one-to-one within a chunk.
        lanes : (C, R) int64 in [0, 64)
            What a coordinate's lane is xored with.
        signs : (C, R, 2) int64 below 2^32
            Bit l of word 0 (l < 32) or bit l − 32 of word 1: 1 if the value that comes to lane l is negated.
        """
        run_CR = torch.arange(first_chunk * self.rows, (first_chunk + n_chunks) * self.rows).view(-1, self.rows)
        return self.codes_of(run_CR)

    def codes_of(self, run: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return row (…), lane code (…) and sign words (…, 2) of these runs (…), counted from the first chunk."""
        keys = self.keys()
        chunk, row = run // self.rows, run % self.rows
        rows = self._feistel(row, mix(chunk ^ keys[_FEISTEL]))
        rows = rows ^ (mix(chunk ^ keys[_ROW]) & (self.rows - 1))
        lanes = mix(run ^ keys[_LANE]) & (LANES - 1)
        signs = torch.stack([mix(run ^ keys[_SIGN_LOW]), mix(run ^ keys[_SIGN_HIGH])], dim=-1)
        return rows, lanes, signs

    def _feistel(self, row: torch.Tensor, chunk_key: torch.Tensor) -> torch.Tensor:
        """Permute [0, R) by four rounds that change one half of the bits by a hash of the other."""
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


def fold(sketch: torch.Tensor, k: int) -> torch.Tensor:
    """Sum the bins that are equal modulo `k`: exactly the k-bin sketch of the folded map.

    Parameters
    ----------
    sketch : (..., K)
    k : int
        A power of two that divides K.

    Returns
    -------
    (..., k)
    """
    return sketch.view(*sketch.shape[:-1], -1, check_k(k)).sum(dim=-2)


@dataclass(frozen=True)
class Placement:
    """Where a parameter stands: its size and the chunk it starts at."""

    name: str
    shape: tuple[int, ...]
    first_chunk: int
    n_chunks: int

    @property
    def numel(self) -> int:
        """P, the parameter's coordinates."""
        return torch.Size(self.shape).numel()


def place(shapes: list[tuple[str, tuple[int, ...]]], k: int) -> list[Placement]:
    """Lay parameters out one after the other, each from a chunk boundary on.

    >>> [p.first_chunk for p in place([("a", (300,)), ("b", (10, 10))], k=256)]
    [0, 2]
    """
    placed, chunk = [], 0
    for name, shape in shapes:
        n_chunks = -(-torch.Size(shape).numel() // k)
        placed.append(Placement(name, tuple(shape), chunk, n_chunks))
        chunk += n_chunks
    if chunk * k // LANES > _MASK:
        raise InputError("the model is too large for the map (2^38 coordinates)", "sketch fewer parameters")
    return placed


class GradientSketcher:
    """Adds gradients, parameter by parameter and for several samples at once, into sketches.

    Gradients come as (S, P), as stretches of them that start at a chunk, or as single rows of an embedding. Those who
    make them ask `corrector` first, which changes nothing by default.
    """

    def __init__(
        self, oporp: Oporp, placements: list[Placement], device: torch.device, corrector: Corrector | None = None
    ) -> None:
        self.oporp = oporp
        self.corrector = corrector or Corrector()
        self.device = device
        self.placements = {p.name: p for p in placements}
        self.kernel = kernel_for(oporp, device)
        self.together = device.type == "cuda"  # whether one product for all samples beats one for each
        self._scratch: torch.Tensor | None = None

    def new(self, n: int = 1) -> torch.Tensor:
        """Return what `n` empty sketches are summed in; `finish` makes sketches of it."""
        return self.kernel.new(n)

    def finish(self, out: torch.Tensor) -> torch.Tensor:
        """Return the sketches, (S, K) float32."""
        return self.kernel.finish(out)

    def add(self, name: str, gradient_SN: torch.Tensor, out: torch.Tensor, chunk: int = 0) -> None:
        """Add a parameter's coordinates from its chunk `chunk` on, (S, N), to the sketches `out`."""
        self.kernel.add(gradient_SN, self.placements[name].first_chunk + chunk, out)

    def add_rows(self, name: str, index_T: torch.Tensor, values_TH: torch.Tensor, out: torch.Tensor, s: int) -> None:
        """Add rows `index_T` of the parameter, with values (T, H), to sketch `s`: a row that comes twice counts twice.

        The cost is that of T·H coordinates, however large the parameter is.
        """
        n_rows, width = values_TH.shape
        start_T = index_T * width
        before = LANES - 1 if width % LANES else 0  # a row may begin anywhere in a run, or always at its start
        wide = -(-(before + width) // LANES)
        runs = values_TH.new_zeros(n_rows, wide * LANES, dtype=torch.float32)
        place = (start_T % LANES)[:, None] + torch.arange(width, device=self.device)
        runs.scatter_(1, place, values_TH.float())
        run_TW = (start_T // LANES)[:, None] + torch.arange(wide, device=self.device)
        first = self.placements[name].first_chunk * self.oporp.rows
        row, lane, sign = self.oporp.codes_of(run_TW.flatten() + first)
        moved = runs.view(-1, LANES).gather(1, self._lanes ^ lane[:, None])
        bit = torch.where(self._lanes < 32, sign[:, :1] >> self._lanes, sign[:, 1:] >> (self._lanes - 32)) & 1
        moved *= 1 - 2 * bit
        bins = out.view(-1, *out.shape[-2:])[0, s].view(self.oporp.rows, LANES)
        if self.device.type == "cuda":
            bins.index_put_((row,), moved, accumulate=True)  # sorts first: the same bytes again
        else:
            bins.index_add_(0, row, moved)

    def scratch(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return memory to build a stretch in, the same each time: fresh pages cost as much as the sketch itself."""
        count = math.prod(shape)
        if self._scratch is None or self._scratch.numel() < count or self._scratch.dtype != dtype:
            self._scratch = torch.empty(count, dtype=dtype, device=self.device)
        return self._scratch[:count].view(shape)

    @cached_property
    def _lanes(self) -> torch.Tensor:
        return torch.arange(LANES, device=self.device)
