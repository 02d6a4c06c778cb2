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
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lark_store.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

MAP_VERSION = 1
LANES = 64
SMALLEST_K, LARGEST_K = 256, 1_048_576
_MASK = 0xFFFFFFFF
_FEISTEL, _ROW, _LANE, _SIGN_LOW, _SIGN_HIGH = range(5)
# Coordinates sketched at a time: small enough for a CPU's cache, large enough to fill a GPU.
_BLOCK = {"cpu": 1 << 19, "cuda": 1 << 26, "mps": 1 << 24}


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
        keys = self.keys()
        chunk_C = torch.arange(first_chunk, first_chunk + n_chunks)[:, None]
        row_R = torch.arange(self.rows)[None, :]
        run_CR = chunk_C * self.rows + row_R
        if int(run_CR[-1, -1]) > _MASK:
            raise InputError("the model is too large for the map (2^38 coordinates)", "sketch fewer parameters")
        rows = self._feistel(row_R, mix(chunk_C ^ keys[_FEISTEL]))
        rows = rows ^ (mix(chunk_C ^ keys[_ROW]) & (self.rows - 1))
        lanes = mix(run_CR ^ keys[_LANE]) & (LANES - 1)
        signs = torch.stack([mix(run_CR ^ keys[_SIGN_LOW]), mix(run_CR ^ keys[_SIGN_HIGH])], dim=-1)
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
    return placed


class GradientSketcher:
    """Adds gradients, parameter by parameter, into a sketch.

    The map is evaluated once per parameter, inverted into gather form (so that no two writes meet and the same
    gradient always gives the same bytes) and kept on the device: 14 bytes per 64 coordinates.
    """

    def __init__(self, oporp: Oporp, placements: list[Placement], device: torch.device) -> None:
        self.oporp = oporp
        self.device = device
        self.placements = {p.name: p for p in placements}
        self._codes: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        lanes = torch.arange(LANES)
        self._lane_table = (lanes[:, None] ^ lanes[None, :]).to(device)
        byte = torch.arange(256)[:, None]
        self._sign_table = (1 - 2 * ((byte >> torch.arange(8)) & 1)).to(device, torch.float32)

    def new(self) -> torch.Tensor:
        """Return an empty sketch, (K,) float32."""
        return torch.zeros(self.oporp.k, dtype=torch.float32, device=self.device)

    def add(self, name: str, gradient: torch.Tensor, out: torch.Tensor) -> None:
        """Add one parameter's gradient, any shape with its P coordinates, to the sketch `out`, (K,) float32."""
        runs = self._runs(gradient)
        rows = self.oporp.rows
        for source, lane, sign in self._blocks(name):
            moved = runs.index_select(0, source).gather(1, self._lane_table.index_select(0, lane))
            signs = self._sign_table.index_select(0, sign).view(-1, LANES)
            out += moved.mul_(signs).view(-1, rows * LANES).sum(dim=0)

    def _runs(self, gradient: torch.Tensor) -> torch.Tensor:
        """Return the gradient as rows of 64, float32, with zeros at the end and one row of zeros after it."""
        flat = gradient.reshape(-1).to(torch.float32)
        n_runs = -(-flat.numel() // LANES)
        return torch.nn.functional.pad(flat, (0, (n_runs + 1) * LANES - flat.numel())).view(-1, LANES)

    def _blocks(self, name: str) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        if name not in self._codes:
            self._codes[name] = self._gather_codes(self.placements[name])
        source, lane, sign = self._codes[name]
        step = max(1, _BLOCK[self.device.type] // self.oporp.k) * self.oporp.rows
        for start in range(0, source.numel(), step):
            block = slice(start, start + step)
            yield source[block], lane[block].int(), sign[block].flatten().int()

    def _gather_codes(self, placement: Placement) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return, for every row of bins of every chunk, the run that comes to it, its lane code and its sign bytes."""
        rows, lanes, signs = self.oporp.codes(placement.first_chunk, placement.n_chunks)
        n_runs = -(-placement.numel // LANES)
        run = torch.arange(rows.numel()).view_as(rows)
        run = torch.where(run < n_runs, run, n_runs)
        source = torch.empty_like(rows).scatter_(1, rows, run)
        lane = torch.empty_like(rows).scatter_(1, rows, lanes)
        sign = torch.empty_like(signs).scatter_(1, rows[..., None].expand_as(signs), signs)
        signs_u8 = torch.stack([(sign >> (8 * i)) & 0xFF for i in range(4)], dim=-1).to(torch.uint8)
        codes = source.flatten().int(), lane.flatten().to(torch.uint8), signs_u8.view(-1, 8)
        return codes[0].to(self.device), codes[1].to(self.device), codes[2].to(self.device)
