"""The GPU kernel: Triton programs in gather form.

A program owns a block of bin rows, for one of Z partial sums and a group of samples. For each chunk it computes the
source row of each of its rows (the inverse map), once for the group, and adds the values. Chunks are assigned to
partial sums by number and programs continue from existing sums. So the bytes depend neither on the split of a gradient
into stretches nor on the number of samples added together.

Codes use uint32 arithmetic, which wraps as `oporp.mix` masks. Triton reads a Python integer of 2^31 or more as int64,
so keys are passed as the int32 of the same bits.

Shape letters: S samples, N coordinates of the stretch, Z partial sums, C chunks, R rows of a chunk, K bins.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from lark_store.gradients.sketch.oporp import LANES, Oporp

# Z·K. Every sum has one load in flight: 4 MB for 4 samples of bfloat16, more than an H100's memory delivers within its
# latency, at any k. More would cost bandwidth: an `add` may read and write all sums, 2 MB each way per sample.
_SUMS = 1 << 19
_THREADS = 128
_CODE_ROWS = 1024  # per program of `_write_codes`
# Not specialised: a kernel is then compiled once, and a key of 1 stays a 32-bit number.
_NUMBERS = ("first_chunk", "key_0", "key_1", "key_2", "key_3", "key_4")


class _Shape(NamedTuple):
    """The shape of an `_add` program.

    A thread's samples and lanes of a row share the row's codes; neighbouring threads take the lanes between (16 lanes
    of bfloat16 are 32 bytes, the smallest read). Without a register limit, ptxas saves registers and waits for every
    load before it starts the next.
    """

    samples: int
    lanes_of_thread: int
    registers: int


_SHAPES = (_Shape(8, 4, 96), _Shape(4, 4, 64), _Shape(2, 8, 64), _Shape(1, 8, 64))


@triton.jit  # type: ignore[untyped-decorator]
def _mix(x: tl.tensor) -> tl.tensor:
    """Hash uint32 values, like `oporp.mix`."""
    x = tl.mul((x >> 16) ^ x, 0x7FEB352D, sanitize_overflow=False)
    x = tl.mul((x >> 15) ^ x, 0x5BD1E995, sanitize_overflow=False)
    return (x >> 16) ^ x


@triton.jit  # type: ignore[untyped-decorator]
def _unsigned(key_0: tl.tensor, key_1: tl.tensor, key_2: tl.tensor, key_3: tl.tensor, key_4: tl.tensor) -> tl.tuple:
    """Return the keys as the uint32 of the same bits."""
    return (
        key_0.to(tl.uint32, bitcast=True),
        key_1.to(tl.uint32, bitcast=True),
        key_2.to(tl.uint32, bitcast=True),
        key_3.to(tl.uint32, bitcast=True),
        key_4.to(tl.uint32, bitcast=True),
    )


@triton.jit  # type: ignore[untyped-decorator]
def _gather_codes(row: tl.tensor, chunk: tl.tensor, keys: tl.tuple, BITS: tl.constexpr) -> tl.tuple:
    """Return the sources of bin rows in a chunk of 2^BITS rows: source row · 64 + lane code, and two sign words.

    All are uint32.
    """
    low: tl.constexpr = BITS // 2
    low_mask: tl.constexpr = (1 << low) - 1
    high_mask: tl.constexpr = (1 << (BITS - low)) - 1
    chunk_key = _mix(chunk ^ keys[0])
    row = row ^ (_mix(chunk ^ keys[1]) & ((1 << BITS) - 1))
    a = row & low_mask
    b = row >> low
    b = b ^ (_mix((a * 4 + 3) ^ chunk_key) & high_mask)
    a = a ^ (_mix((b * 4 + 2) ^ chunk_key) & low_mask)
    b = b ^ (_mix((a * 4 + 1) ^ chunk_key) & high_mask)
    a = a ^ (_mix((b * 4) ^ chunk_key) & low_mask)
    source = (b << low) | a
    run = (chunk << BITS) | source
    return (source << 6) | (_mix(run ^ keys[2]) & 63), _mix(run ^ keys[3]), _mix(run ^ keys[4])


@triton.jit  # type: ignore[untyped-decorator]
def _signs(word_low: tl.tensor, word_high: tl.tensor, lane: tl.tensor) -> tl.tensor:
    """Convert sign words (ROWS,) to ±1.0 per lane, (1, HIGH, ROWS, LOW)."""
    word = tl.where(lane < 32, word_low[None, :, None], word_high[None, :, None])
    bits = ((word << (31 - (lane & 31)).to(tl.uint32)) & 0x80000000) | 0x3F800000
    return bits.to(tl.float32, bitcast=True)[None]


@triton.jit(do_not_specialize=["gradient", "n", "stride", "part_stride", *_NUMBERS])  # type: ignore[untyped-decorator]
def _add(
    gradient: tl.tensor,
    out: tl.tensor,
    n: tl.tensor,
    stride: tl.tensor,
    part_stride: tl.tensor,
    first_chunk: tl.tensor,
    key_0: tl.tensor,
    key_1: tl.tensor,
    key_2: tl.tensor,
    key_3: tl.tensor,
    key_4: tl.tensor,
    BITS: tl.constexpr,
    PARTS: tl.constexpr,
    SAMPLES: tl.constexpr,
    ROWS: tl.constexpr,
    HIGH: tl.constexpr,
) -> None:
    """Add stretches (S, N) to `out` (Z, S, K): one program per ROWS rows, partial sum and SAMPLES samples.

    The tile is (SAMPLES, HIGH, ROWS, 64 / HIGH). Triton distributes the last two dimensions over threads, so the first
    two stay within a thread.
    """
    K: tl.constexpr = 64 << BITS
    LOW: tl.constexpr = 64 // HIGH
    keys = _unsigned(key_0, key_1, key_2, key_3, key_4)
    first = tl.program_id(1)
    sample = (tl.program_id(2) * SAMPLES + tl.arange(0, SAMPLES)).to(tl.int64)[:, None, None, None]
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, HIGH)[:, None, None] * LOW + tl.arange(0, LOW)[None, None, :]
    part = (first_chunk + first) % PARTS
    slot = out + part.to(tl.int64) * part_stride + sample * K + (row[None, :, None] * 64 + lane)[None]
    start = gradient + sample * stride + first.to(tl.int64) * K
    row = row.to(tl.uint32)
    chunk = (first_chunk + first).to(tl.uint32)
    n_full = (n // K).to(tl.int32)
    total = tl.load(slot)
    place, word_low, word_high = _gather_codes(row, chunk, keys, BITS)
    for _ in range(first, n_full, PARTS):
        offset = place.to(tl.int32)[None, :, None] ^ lane
        value = tl.load(start + offset[None])
        sign = _signs(word_low, word_high, lane)
        # Compute the next codes while the values load.
        chunk += PARTS
        start += PARTS * K
        place, word_low, word_high = _gather_codes(row, chunk, keys, BITS)
        total = tl.fma(value.to(tl.float32), sign, total)
    if (n_full - first) % PARTS == 0:  # the partial last chunk is next
        offset = place.to(tl.int32)[None, :, None] ^ lane
        value = tl.load(start + offset[None], mask=(offset < (n % K).to(tl.int32))[None], other=0.0)
        total = tl.fma(value.to(tl.float32), _signs(word_low, word_high, lane), total)
    tl.store(slot, total)


@triton.jit(do_not_specialize=_NUMBERS)  # type: ignore[untyped-decorator]
def _write_codes(
    sources: tl.tensor,
    lanes: tl.tensor,
    signs: tl.tensor,
    first_chunk: tl.tensor,
    key_0: tl.tensor,
    key_1: tl.tensor,
    key_2: tl.tensor,
    key_3: tl.tensor,
    key_4: tl.tensor,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """Write the codes of ROWS rows of one chunk."""
    c = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    keys = _unsigned(key_0, key_1, key_2, key_3, key_4)
    place, word_low, word_high = _gather_codes(row.to(tl.uint32), (first_chunk + c).to(tl.uint32), keys, BITS)
    position = c.to(tl.int64) * (1 << BITS) + row
    tl.store(sources + position, (place >> 6).to(tl.int64))
    tl.store(lanes + position, (place & 63).to(tl.int64))
    tl.store(signs + position * 2, word_low.to(tl.int64))
    tl.store(signs + position * 2 + 1, word_high.to(tl.int64))


def _signed_keys(oporp: Oporp) -> list[int]:
    """Return the keys as the int32 of the same bits."""
    keys = oporp.keys()
    return [key - (key >> 31 << 32) for key in keys]


def codes(
    oporp: Oporp, first_chunk: int, n_chunks: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the inverse of `Oporp.codes`, the source of each bin row, as the kernel computes it.

    Returns
    -------
    sources : (C, R) int64
        The row of the chunk.
    lanes : (C, R) int64 in [0, 64)
    signs : (C, R, 2) int64 below 2^32
    """
    rows = oporp.rows
    sources, lanes = (torch.empty(n_chunks, rows, dtype=torch.int64, device=device) for _ in range(2))
    signs = torch.empty(n_chunks, rows, 2, dtype=torch.int64, device=device)
    block = min(rows, _CODE_ROWS)
    with torch.cuda.device_of(signs):  # type: ignore[no-untyped-call]
        _write_codes[n_chunks, rows // block](
            sources,
            lanes,
            signs,
            first_chunk,
            *_signed_keys(oporp),
            BITS=rows.bit_length() - 1,
            ROWS=block,
            enable_fp_fusion=False,
        )
    return sources, lanes, signs


class GpuKernel:
    """A `Kernel` with partial sums on one CUDA device."""

    def __init__(self, oporp: Oporp, device: torch.device) -> None:
        self.oporp = oporp
        self.device = device
        self._n_parts = max(1, _SUMS // oporp.k)
        self._keys = _signed_keys(oporp)

    def new(self, n: int) -> torch.Tensor:
        """Return accumulators for `n` sketches, (Z, S, K)."""
        return torch.zeros(self._n_parts, n, self.oporp.k, device=self.device)

    def add(self, gradient_SN: torch.Tensor, first_chunk: int, out: torch.Tensor) -> None:
        """Add stretches that start at chunk `first_chunk`."""
        n_samples, start = len(gradient_SN), 0
        for shape in _SHAPES:
            n_groups = (n_samples - start) // shape.samples
            if n_groups:
                self._launch(shape, n_groups, gradient_SN[start:], first_chunk, out[:, start:])
                start += n_groups * shape.samples

    def _launch(
        self, shape: _Shape, n_groups: int, gradient_SN: torch.Tensor, first_chunk: int, out: torch.Tensor
    ) -> None:
        n, rows = gradient_SN.shape[1], self.oporp.rows
        n_chunks = -(-n // self.oporp.k)
        lanes_between = LANES // shape.lanes_of_thread
        block = min(rows, _THREADS // lanes_between)
        with torch.cuda.device_of(gradient_SN):  # type: ignore[no-untyped-call]
            _add[rows // block, min(self._n_parts, n_chunks), n_groups](
                gradient_SN,
                out,
                n,
                gradient_SN.stride(0),
                out.stride(0),
                first_chunk,
                *self._keys,
                BITS=rows.bit_length() - 1,
                PARTS=self._n_parts,
                SAMPLES=shape.samples,
                ROWS=block,
                HIGH=shape.lanes_of_thread,
                num_warps=block * lanes_between // 32,
                maxnreg=shape.registers,
                enable_fp_fusion=False,
            )

    def finish(self, out: torch.Tensor) -> torch.Tensor:
        """Sum the partial sums pairwise; return the sketches, (S, K)."""
        while len(out) > 1:
            out = out[: len(out) // 2] + out[len(out) // 2 :]
        return out[0]
