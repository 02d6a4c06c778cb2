"""The Triton kernels, against the map in torch and in plain Python: compiled where there is CUDA, else interpreted."""

from __future__ import annotations

import pytest
import torch
from helpers.gradients import ragged_batch
from helpers.models import build_model

from lark_store.gradients.paths.batched import BatchPath
from lark_store.gradients.paths.hooks import choose_parameters
from lark_store.gradients.sketch.accumulate import GradientSketcher
from lark_store.gradients.sketch.oporp import Oporp
from lark_store.gradients.sketch.placement import place

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# k, seed, first chunk: the last chunks of the map too, whose run numbers are close below 2^32.
PLACES = [
    (256, 0, 0),
    (256, 7, 2**30 - 2),
    (512, 1, 3),
    (1024, 2**40, 2**28 - 2),
    (8192, 3, 2**24 + 1),
    (65_536, 0, 2**21 - 1),
    (65_536, 5, 2**22 - 2),
    (1_048_576, 0, 2**18 - 2),
]


class KeyedOporp(Oporp):
    """The map for chosen keys: 1, and a key negative as an int32."""

    def keys(self) -> list[int]:
        return [1, 2**31, 2**32 - 1, 0, 16]


@pytest.fixture(scope="module")
def gpu():
    """Return the module of kernels, whose definitions read the variable."""
    pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE.type == "cpu":
            patch.setenv("TRITON_INTERPRET", "1")
        from lark_store.gradients.sketch.kernels import gpu

        yield gpu


@pytest.fixture
def few_parts(gpu, monkeypatch):
    """Make kernels for k = 1024 with four partial sums: more would be slow in the interpreter."""
    monkeypatch.setattr(gpu, "_SUMS", 4096)
    return 4


def mix(x: int) -> int:
    x = (x >> 16 ^ x) * 0x7FEB352D & 0xFFFFFFFF
    x = (x >> 15 ^ x) * 0x5BD1E995 & 0xFFFFFFFF
    return x >> 16 ^ x


def plain_code(oporp: Oporp, chunk: int, row: int) -> tuple[int, int, int, int]:
    """Return a run's row, its lane code and its sign words, in Python integers."""
    keys = oporp.keys()
    run = chunk * oporp.rows + row
    low = (oporp.rows.bit_length() - 1) // 2
    a, b = row % 2**low, row >> low
    for turn in range(4):
        if turn % 2 == 0:
            a ^= mix((b * 4 + turn) ^ mix(chunk ^ keys[0])) % 2**low
        else:
            b ^= mix((a * 4 + turn) ^ mix(chunk ^ keys[0])) % (oporp.rows >> low)
    row = ((b << low) | a) ^ (mix(chunk ^ keys[1]) % oporp.rows)
    return row, mix(run ^ keys[2]) % 64, mix(run ^ keys[3]), mix(run ^ keys[4])


def reference(oporp: Oporp, gradient_SN: torch.Tensor, first_chunk: int) -> torch.Tensor:
    """Return the sketches in scatter form, in double precision."""
    n_samples, n = gradient_SN.shape
    n_chunks = -(-n // oporp.k)
    rows, lanes, signs = oporp.codes(first_chunk, n_chunks)
    runs = torch.nn.functional.pad(gradient_SN.cpu().double(), (0, n_chunks * oporp.k - n))
    lane = torch.arange(64) ^ lanes[..., None]
    word = torch.where(lane < 32, signs[..., :1], signs[..., 1:])
    sign = 1 - 2 * ((word >> (lane % 32)) & 1)
    bins = (rows[..., None] * 64 + lane).flatten()
    values = runs.view(n_samples, *lane.shape) * sign
    return torch.zeros(n_samples, oporp.k, dtype=torch.float64).index_add_(1, bins, values.view(n_samples, -1))


def sums(kernel, gradient_SN: torch.Tensor, first_chunk: int = 0) -> torch.Tensor:
    out = kernel.new(len(gradient_SN))
    kernel.add(gradient_SN.to(DEVICE), first_chunk, out)
    return out


def check(gpu, oporp: Oporp, gradient_SN: torch.Tensor, first_chunk: int = 0) -> None:
    kernel = gpu.GpuKernel(oporp, DEVICE)
    actual = kernel.finish(sums(kernel, gradient_SN, first_chunk))
    assert actual.shape == (len(gradient_SN), oporp.k)
    assert actual.dtype == torch.float32
    expected = reference(oporp, gradient_SN, first_chunk)
    atol = 1e-6 * float(expected.abs().max())
    torch.testing.assert_close(actual.cpu().double(), expected, rtol=1e-5, atol=atol)


@pytest.mark.parametrize(("k", "seed", "first_chunk"), PLACES)
@pytest.mark.parametrize("kind", [Oporp, KeyedOporp])
def test_codes_invert_the_map(gpu, kind, k, seed, first_chunk):
    oporp = kind(k, seed)
    sources, lanes, signs = (x.cpu() for x in gpu.codes(oporp, first_chunk, 2, DEVICE))
    rows, run_lanes, run_signs = oporp.codes(first_chunk, 2)
    assert torch.equal(rows.gather(1, sources), torch.arange(oporp.rows).expand(2, -1))
    assert torch.equal(lanes, run_lanes.gather(1, sources))
    assert torch.equal(signs, run_signs.gather(1, sources[..., None].expand_as(signs)))


@pytest.mark.parametrize(("k", "seed", "first_chunk"), PLACES)
def test_codes_equal_plain_integers(gpu, k, seed, first_chunk):
    oporp = Oporp(k, seed)
    sources, lanes, signs = (x.cpu() for x in gpu.codes(oporp, first_chunk, 2, DEVICE))
    for c in range(2):
        for row in {0, 1, oporp.rows // 3, oporp.rows - 1}:
            place, *code = plain_code(oporp, first_chunk + c, row)
            assert [int(sources[c, place]), int(lanes[c, place]), *signs[c, place].tolist()] == [row, *code]


@pytest.mark.parametrize(
    ("k", "first_chunk", "n"), [(256, 5, 256 * 40), (1024, 2**28 - 9, 1024 * 9), (65_536, 2**21, 70_001)]
)
def test_a_sketch_is_the_signed_sum_over_bins(gpu, k, first_chunk, n):
    check(gpu, Oporp(k, 5), torch.randn(2, n), first_chunk)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients_are_summed_exactly(gpu, dtype):
    check(gpu, Oporp(256, 5), torch.randn(2, 256 * 10).to(dtype), 5)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="a thousand programs take long in the interpreter")
@pytest.mark.parametrize("k", [256, 4096, 65_536, 1_048_576])
@pytest.mark.parametrize("n_samples", [1, 2, 4, 8])
def test_stretches_of_millions(gpu, k, n_samples):
    check(gpu, Oporp(k, 0), torch.randn(n_samples, 5_000_001).bfloat16(), 1000)


def test_more_chunks_than_partial_sums(gpu, few_parts):
    assert len(gpu.GpuKernel(Oporp(1024, 0), DEVICE).new(1)) == few_parts
    check(gpu, Oporp(1024, 0), torch.randn(3, 14 * 1024 - 5), 3)


@pytest.mark.parametrize("n", [1, 63, 65, 255, 257, 1021])
def test_the_last_chunk_may_be_a_partial_one(gpu, n):
    check(gpu, Oporp(256, 1), torch.randn(3, n), 2)


def test_no_read_beyond_a_stretch(gpu):
    within = torch.full((5, 3000), torch.nan, device=DEVICE)
    gradient_SN = within[1:4, 77:1078]
    gradient_SN.copy_(torch.randn(3, 1001))
    check(gpu, Oporp(512, 1), gradient_SN, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("few_parts")
def test_batched_samples_equal_single_ones(gpu, dtype):
    kernel = gpu.GpuKernel(Oporp(1024, 0), DEVICE)
    gradient_SN = torch.randn(23, 5 * 1024 + 99).to(dtype)  # in groups of 8, 8, 4, 2 and 1
    together = sums(kernel, gradient_SN, 3)
    alone = [sums(kernel, gradient_SN[i : i + 1], 3) for i in (0, 9, 17, 21, 22)]
    assert torch.equal(together[:, [0, 9, 17, 21, 22]], torch.cat(alone, dim=1))
    finished = kernel.finish(together)[[0, 9, 17, 21, 22]]
    assert torch.equal(finished, torch.cat([kernel.finish(out) for out in alone]))


def test_the_same_gradient_gives_the_same_bytes(gpu):
    kernel = gpu.GpuKernel(Oporp(4096, 0), DEVICE)
    gradient_SN = torch.randn(2, 30_000)
    assert torch.equal(sums(kernel, gradient_SN), sums(kernel, gradient_SN))


@pytest.mark.parametrize("cut", [1, 2, 9])
@pytest.mark.usefixtures("few_parts")
def test_stretches_give_the_bytes_of_one_pass(gpu, cut):
    kernel = gpu.GpuKernel(Oporp(1024, 0), DEVICE)
    gradient_SN = torch.randn(2, 10 * 1024 + 100)
    out = kernel.new(2)
    kernel.add(gradient_SN[:, : cut * 1024].to(DEVICE), 7, out)
    kernel.add(gradient_SN[:, cut * 1024 :].to(DEVICE), 7 + cut, out)
    assert torch.equal(out, sums(kernel, gradient_SN, 7))


@pytest.mark.usefixtures("few_parts")
def test_batched_path_gives_equal_sketches_on_either_device(gpu):
    model = build_model("Llama, untied")
    results = []
    for device in (torch.device("cpu"), DEVICE):
        chosen = choose_parameters(model.to(device), r"embed|layers\.1\.(mlp\.down|self_attn\.q|input_layernorm)", None)
        sketcher = GradientSketcher(Oporp(1024, 0), place([(n, tuple(p.shape)) for n, p in chosen], 1024), device)
        if results:
            sketcher.kernel = gpu.GpuKernel(Oporp(1024, 0), device)
            sketcher.together = True
        path = BatchPath(model, chosen, sketcher)
        results.append(path.sketch(ragged_batch("text")))
        path.close()
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours.vector, theirs.vector, rtol=1e-4, atol=1e-4)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-5)
