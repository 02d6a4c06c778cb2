"""The map and the sketch, against definitions written out in plain Python."""

from __future__ import annotations

import hashlib

import pytest
import torch
from helpers.gradients import CPU
from hypothesis import given
from hypothesis import strategies as st

from lark_store.errors import InputError
from lark_store.gradients.sketch.accumulate import GradientSketcher
from lark_store.gradients.sketch.kernels import torch_ops
from lark_store.gradients.sketch.kernels.cpu import CpuKernel
from lark_store.gradients.sketch.kernels.torch_ops import PlainKernel
from lark_store.gradients.sketch.oporp import Oporp
from lark_store.gradients.sketch.placement import place
from lark_store.schema.sign_codes import fold

# (chunk, position) to (bin, sign), k = 65,536, seed 0: a change of these is a new map version.
GOLDEN = {
    (0, 0): (20394, -1),
    (0, 1): (20395, 1),
    (0, 65535): (11843, -1),
    (1, 64): (62376, -1),
    (2, 12345): (56721, 1),
    (7, 40000): (42978, 1),
    (111359, 777): (59218, -1),
}
GOLDEN_DIGEST = "9e7f7d33b5d219591aad64d13727f47979bc536f789b6b36e9b5d2e7fb67ce33"
POWERS = st.sampled_from([2**i for i in range(8, 21)])


def mix(x: int) -> int:
    x = (x >> 16 ^ x) * 0x7FEB352D & 0xFFFFFFFF
    x = (x >> 15 ^ x) * 0x5BD1E995 & 0xFFFFFFFF
    return x >> 16 ^ x


def plain_code(k: int, seed: int, chunk: int, position: int) -> tuple[int, int]:
    """Return the bin and the sign of one coordinate, in Python's own integers."""
    digest = hashlib.sha256(f"lark-store map 1 seed {seed}".encode()).digest()
    keys = [int.from_bytes(digest[4 * i : 4 * i + 4], "little") for i in range(5)]
    rows = k // 64
    row, lane = divmod(position, 64)
    run = chunk * rows + row
    low = (rows.bit_length() - 1) // 2
    high = rows.bit_length() - 1 - low
    a, b = row & ((1 << low) - 1), row >> low
    chunk_key = mix(chunk ^ keys[0])
    for turn in range(4):
        if turn % 2 == 0:
            a ^= mix((b * 4 + turn) ^ chunk_key) & ((1 << low) - 1)
        else:
            b ^= mix((a * 4 + turn) ^ chunk_key) & ((1 << high) - 1)
    row = ((b << low) | a) ^ (mix(chunk ^ keys[1]) & (rows - 1))
    lane ^= mix(run ^ keys[2]) & 63
    bits = mix(run ^ keys[3]) | mix(run ^ keys[4]) << 32
    return row * 64 + lane, -1 if bits >> lane & 1 else 1


def plain_sketch(gradients: dict[str, torch.Tensor], k: int, seed: int) -> torch.Tensor:
    out = torch.zeros(k, dtype=torch.float64)
    chunk = 0
    for gradient in gradients.values():
        flat = gradient.flatten().tolist()
        for i, value in enumerate(flat):
            where, sign = plain_code(k, seed, chunk + i // k, i % k)
            out[where] += sign * value
        chunk += -(-len(flat) // k)
    return out


def sketch(gradients: dict[str, torch.Tensor], k: int, seed: int = 0, device: torch.device = CPU) -> torch.Tensor:
    placements = place([(name, tuple(g.shape)) for name, g in gradients.items()], k)
    sketcher = GradientSketcher(Oporp(k, seed), placements, device)
    out = sketcher.new()
    for name, gradient in gradients.items():
        sketcher.add(name, gradient.to(device).view(1, -1), out)
    return sketcher.finish(out)[0]


@pytest.mark.parametrize("k", [256, 1024, 65_536])
def test_plain_and_compiled_kernels_agree(k):
    torch.manual_seed(0)
    plain, compiled = PlainKernel(Oporp(k, 3), CPU), CpuKernel(Oporp(k, 3))
    results = []
    for kernel in (plain, compiled):
        torch.manual_seed(0)
        out = kernel.new(3)
        for n, first_chunk in ((5 * k + 77, 7), (64, 0), (1, 40), (2 * k, 2**20)):
            kernel.add(torch.randn(3, n), first_chunk, out)
        results.append(kernel.finish(out))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_bytes_are_independent_of_threads_and_stretches():
    gradient = torch.randn(2, 40 * 4096 + 100)
    results, before = [], torch.get_num_threads()
    try:
        for threads, step in ((1, 41), (2, 41), (2, 3)):
            torch.set_num_threads(threads)
            kernel = CpuKernel(Oporp(4096, 0))
            out = kernel.new(2)
            for chunk in range(0, 41, step):
                kernel.add(gradient[:, chunk * 4096 : (chunk + step) * 4096], 5 + chunk, out)
            results.append(kernel.finish(out))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_rows_sum_to_the_sketch_of_their_table():
    for width in (48, 64, 100, 192):
        placements = place([("before", (300,)), ("table", (50, width))], 256)
        sketcher = GradientSketcher(Oporp(256, 1), placements, CPU)
        index, values = torch.tensor([3, 49, 3, 0]), torch.randn(4, width)
        table = torch.zeros(50, width).index_add_(0, index, values)
        rows, whole = sketcher.new(2), sketcher.new(2)
        sketcher.add_rows("table", index, values, rows, 1)
        sketcher.add("table", torch.stack([torch.zeros(50 * width), table.flatten()]), whole)
        torch.testing.assert_close(sketcher.finish(rows), sketcher.finish(whole), rtol=1e-4, atol=1e-5)


def test_blocks_of_the_plain_kernel_add_up(monkeypatch):
    gradient, kernels = torch.randn(1, 7 * 256 + 5), [PlainKernel(Oporp(256, 3), CPU) for _ in range(2)]
    results = []
    for kernel, size in zip(kernels, (1 << 19, 256), strict=True):
        monkeypatch.setattr(torch_ops, "_BLOCK", {"cpu": size})
        out = kernel.new(1)
        kernel.add(gradient, 2, out)
        results.append(kernel.finish(out))
    torch.testing.assert_close(*results)


def test_parts_of_a_parameter_start_at_their_chunks():
    placements = place([("before", (600,)), ("a", (700,))], 256)  # chunks 0 to 2, and 3 to 5
    sketcher, gradient = GradientSketcher(Oporp(256, 1), placements, CPU), torch.randn(1, 700)
    whole, parts = sketcher.new(), sketcher.new()
    sketcher.add("a", gradient, whole)
    for chunk in range(3):
        sketcher.add("a", gradient[:, chunk * 256 : (chunk + 1) * 256], parts, chunk=chunk)
    torch.testing.assert_close(sketcher.finish(parts), sketcher.finish(whole))


@given(k=POWERS, seed=st.integers(0, 2**40), chunk=st.integers(0, 2**12), data=st.data())
def test_torch_codes_equal_plain_integers(k, seed, chunk, data):
    rows, lanes, signs = Oporp(k, seed).codes(chunk, 1)
    position = data.draw(st.integers(0, k - 1))
    run, lane = divmod(position, 64)
    out_lane = lane ^ int(lanes[0, run])
    word = int(signs[0, run, out_lane // 32])
    sign = -1 if word >> (out_lane % 32) & 1 else 1
    assert (int(rows[0, run]) * 64 + out_lane, sign) == plain_code(k, seed, chunk, position)


def test_golden_codes_of_map_version_1():
    assert [plain_code(65_536, 0, chunk, position) for chunk, position in GOLDEN] == list(GOLDEN.values())
    rows, lanes, signs = Oporp(65_536, 0).codes(0, 3)
    digest = hashlib.sha256(b"".join(x.contiguous().numpy().tobytes() for x in (rows, lanes, signs))).hexdigest()
    assert digest == GOLDEN_DIGEST


@given(k=POWERS, seed=st.integers(0, 2**32), chunk=st.integers(0, 1000))
def test_a_chunk_maps_one_to_one_onto_the_bins(k, seed, chunk):
    rows, lanes, _ = Oporp(k, seed).codes(chunk, 2)
    lane = torch.arange(64)
    bins = rows[:, :, None] * 64 + (lane ^ lanes[:, :, None])
    for bins_of_row in bins:
        assert torch.equal(bins_of_row.flatten().sort().values, torch.arange(k))


@pytest.mark.parametrize("k", [256, 512, 1024])
def test_a_sketch_is_the_signed_sum_over_bins(k):
    torch.manual_seed(1)
    gradients = {"a": torch.randn(37, 19), "b": torch.randn(3), "c": torch.randn(2, 64, 16), "d": torch.randn(1)}
    result = sketch(gradients, k, seed=5)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), plain_sketch(gradients, k, seed=5), atol=1e-5, rtol=1e-5)


def test_the_same_gradient_gives_the_same_bytes():
    gradients = {"a": torch.randn(300, 500)}
    assert torch.equal(sketch(gradients, 4096), sketch(gradients, 4096))


def test_bfloat16_gradients_are_summed_in_float32():
    gradient = torch.randn(64, 64).bfloat16()
    assert torch.equal(sketch({"a": gradient}, 256), sketch({"a": gradient.float()}, 256))


def test_folding_equals_the_sketch_of_the_folded_map():
    # Whole numbers, so that sums are exact in any order.
    gradients = {"a": torch.randint(-8, 9, (700, 300)).float(), "b": torch.randint(-8, 9, (99,)).float()}
    expected = torch.zeros(1024, dtype=torch.float64)
    for placement, gradient in zip(
        place([(n, tuple(g.shape)) for n, g in gradients.items()], 65_536), gradients.values(), strict=True
    ):
        rows, lanes, signs = Oporp(65_536, 3).codes(placement.first_chunk, placement.n_chunks)
        flat = torch.zeros(placement.n_chunks * 65_536)
        flat[: gradient.numel()] = gradient.flatten()
        lane = torch.arange(64) ^ lanes[..., None]
        bins = (rows[..., None] * 64 + lane) % 1024  # the folded map
        word = torch.where(lane < 32, signs[..., :1], signs[..., 1:])
        sign = 1 - 2 * ((word >> (lane % 32)) & 1)
        expected.index_add_(0, bins.flatten(), (sign.flatten() * flat).double())
    assert torch.equal(
        torch.from_numpy(fold(sketch(gradients, 65_536, seed=3).numpy()[None], 1024)[0]).double(), expected
    )


@pytest.mark.parametrize("k", [1024, 65_536])
def test_inner_products_are_unbiased_with_the_expected_variance(k):
    torch.manual_seed(0)
    n = 4 * k
    u = torch.randn(n)
    v = 0.6 * u + 0.8 * torch.randn(n)
    rho = float(torch.nn.functional.cosine_similarity(u, v, dim=0))
    errors = []
    for seed in range(100 if k == 1024 else 40):
        x, y = sketch({"w": u}, k, seed), sketch({"w": v}, k, seed)
        errors.append(float(torch.nn.functional.cosine_similarity(x, y, dim=0)) - rho)
    error = torch.tensor(errors)
    # Coordinates of one chunk never collide: of 4 chunks' pairs, 3/4 can.
    expected = (1 - rho**2) * (3 / 4 / k) ** 0.5
    assert abs(float(error.mean())) < 4 * expected / len(errors) ** 0.5
    assert float(error.square().mean().sqrt()) == pytest.approx(expected, rel=0.3)


def test_parameters_start_at_chunk_boundaries():
    placed = place([("a", (300, 2)), ("b", ()), ("c", (256,))], 256)
    assert [(p.first_chunk, p.n_chunks, p.numel) for p in placed] == [(0, 3, 600), (3, 1, 1), (4, 1, 256)]


@pytest.mark.parametrize("k", [0, 128, 1000, 65_537, 2**21])
def test_k_is_a_power_of_two_in_range(k):
    with pytest.raises(InputError, match="power of two"):
        Oporp(k, 0)


def test_too_large_model_is_refused():
    with pytest.raises(InputError, match="the map's limit"):
        place([("a", (2**20, 2**17)), ("b", (2**20, 2**17)), ("c", (1,))], 256)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_cuda_sketch_equals_cpu_sketch():
    gradients = {"a": torch.randn(700, 300), "b": torch.randn(99)}
    on_cuda = sketch(gradients, 65_536, device=torch.device("cuda"))
    again = sketch(gradients, 65_536, device=torch.device("cuda"))
    assert torch.equal(on_cuda, again)
    torch.testing.assert_close(on_cuda.cpu(), sketch(gradients, 65_536), atol=1e-5, rtol=1e-5)


def test_layout_has_at_most_2_to_the_38_coordinates():
    most = 1 << 38
    (whole,) = place([("a", (most - 256,))], 256)
    assert (whole.n_chunks, whole.numel) == (most // 256 - 1, most - 256)
    assert [p.first_chunk for p in place([("a", (257,)), ("b", ()), ("c", (2, 128)), ("d", (1,))], 256)] == [0, 2, 3, 4]
    for shapes in ([("a", (most,))], [("a", (most - 256,)), ("b", (1,))]):
        with pytest.raises(InputError, match=r"exceed 2\^38 coordinates"):
            place(shapes, 256)
