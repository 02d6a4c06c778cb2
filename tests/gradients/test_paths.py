"""Unit tests of the paths from tokens to sketches, and of corrections."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers.gradients import CPU, WholeGradients, exact_gradient, ragged_batch, random_tokens
from helpers.models import build_model

from lark_store.core.device import pick_device
from lark_store.errors import InputError
from lark_store.gradients.corrections.kronecker import (
    EkfacCorrector,
    KfacCorrector,
    Kronecker,
    by_blocks,
    curvature_corrector,
    damping_of,
    eigen,
    inverse_power,
)
from lark_store.gradients.corrections.linear_layers import _head_size, _heads
from lark_store.gradients.paths import hooks, layers, products
from lark_store.gradients.paths.batched import BatchPath, UnknownLayerError, _difference, _per_sample
from lark_store.gradients.paths.hooks import HookPath, Sketch, choose_parameters, recompute_activations
from lark_store.gradients.paths.masked import _mask
from lark_store.gradients.sketch import oporp
from lark_store.gradients.sketch.accumulate import GradientSketcher
from lark_store.gradients.sketch.oporp import Oporp
from lark_store.gradients.sketch.placement import place
from lark_store.modeling.encoded import UnusableSampleError
from lark_store.modeling.losses import Batch
from lark_store.modeling.tokens import Tokens


def shuffled(n, *, seed=0, blocks=1):
    """A symmetric positive matrix for each block, (blocks, n, n) float64."""
    generator = torch.Generator().manual_seed(seed)
    result = torch.randn(blocks, n, 2 * n, generator=generator, dtype=torch.float64)
    return result @ result.mT / (2 * n)


def dense(blocks):
    return torch.block_diag(*blocks)


def power_of(matrix, power):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values**power) @ vectors.T


# --- where a layer's positions are ---------------------------------------------------------------------------------

CONTENT = Tokens(
    [1, 2, 3, 4, 5], [False, False, False, True, True], "text", is_content=[False, True, False, True, True]
)


@pytest.mark.parametrize(
    ("shape", "dim", "kept"),
    [
        ((1, 2, 7), 1, [1]),  # of the two positions which predict a target the second is content
        ((1, 2), 1, [1]),
        ((1, 5, 7), 1, [1, 3, 4]),
        ((1, 5), 1, [1, 3, 4]),
        ((5, 7), 0, [1, 3, 4]),
        ((5, 3, 7), 0, [1, 3, 4]),
        ((1, 5, 4, 7), 1, [1, 3, 4]),
        ((1, 4, 5, 7), 2, [1, 3, 4]),
        ((1, 2, 5, 7), 2, [1, 3, 4]),  # two heads are no two targets
        ((1, 5, 2, 7), 1, [1, 3, 4]),
    ],
)
def test_layer_positions_follow_from_its_shape(shape, dim, kept):
    mask = _mask("layer", torch.zeros(shape), Batch([CONTENT], CPU))
    assert mask.dtype == torch.bool
    assert mask.shape == tuple(size if d == dim else 1 for d, size in enumerate(shape))
    assert mask.flatten().nonzero().flatten().tolist() == kept


@pytest.mark.parametrize(
    "shape", [(1, 5, 5, 7), (1, 4, 3, 7), (1, 1, 7), (1, 3, 7), (4, 4), (2, 2, 5), (1, 1, 5, 5, 1), (5, 4, 3, 7)]
)
def test_ambiguous_positions_are_an_error(shape):
    with pytest.raises(RuntimeError) as refused:
        _mask("the layer", torch.zeros(shape), Batch([CONTENT], CPU))
    assert str(refused.value) == f"layer `the layer` gives {shape}, with unknown token positions"


@pytest.mark.parametrize("pad_left", [False, True])
def test_layer_values_are_split_into_samples(pad_left):
    samples = [random_tokens(0, n=6), Tokens([1, 2, 3], [False, True, True], "text")]
    batch = Batch(samples, CPU, pad_left)
    short = slice(3, 6) if pad_left else slice(0, 3)
    values = torch.randn(2, 6, 4)
    for given in (values, values.flatten(0, 1), values[:, None]):
        axis, parts = _per_sample("layer", given, batch)
        assert axis == "tokens"
        assert torch.equal(parts[0], values[0])
        assert torch.equal(parts[1], values[1, short])
    one_target = Batch([Tokens([1, 2, 3], [False, False, True], "text")], CPU)
    assert _per_sample("layer", torch.randn(1, 1, 3, 4), one_target)[0] == "tokens"  # one head, not one target
    axis, parts = _per_sample("layer", targets := torch.randn(1, 7, 4), batch)
    assert (axis, [len(part) for part in parts]) == ("targets", [5, 2])
    assert torch.equal(torch.cat(parts), targets[0])
    heads = torch.randn(2, 6, 3, 4)  # as many heads as tokens: nothing is cut off
    axis, parts = _per_sample("layer", heads, batch)
    assert axis is None
    assert torch.equal(torch.stack(parts), heads)
    with pytest.raises(UnknownLayerError, match=r"layer `layer` mixes samples: its tensors have shape \(3, 6, 4\)"):
        _per_sample("layer", torch.randn(3, 6, 4), batch)


# --- paths ---------------------------------------------------------------------------------------------------------


def unsketched(model, corrector=None):
    chosen = choose_parameters(model, None, None)
    return chosen, WholeGradients(Oporp(256, 0), place([(n, tuple(p.shape)) for n, p in chosen], 256), CPU, corrector)


def assert_exact(actual, expected):
    for gradients_of, exact in zip(actual, expected, strict=True):
        for name, gradient in exact.items():
            close = {"rtol": 1e-4, "atol": 1e-5 * float(gradient.abs().max()), "msg": name}
            torch.testing.assert_close(gradients_of[name].view_as(gradient), gradient.double(), **close)


@pytest.mark.parametrize("held", [1, 3000, 1 << 23])
@pytest.mark.parametrize("together", [False, True])
def test_gradients_are_independent_of_product_and_memory_limits(monkeypatch, together, held):
    model, samples = build_model("Llama, untied"), ragged_batch("text")
    expected = [exact_gradient(model, tokens) for tokens in samples]
    monkeypatch.setattr(products, "_HELD", held)
    chosen, keeper = unsketched(model)
    keeper.together = together  # as on a GPU
    path = BatchPath(model, chosen, keeper)
    assert all(isinstance(sketch, Sketch) for sketch in path.sketch(samples))
    assert_exact(keeper.gradients, expected)
    path.close()
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("held", [1, 15_000, 1 << 23])
def test_correction_of_full_weights_gets_each_samples_gradient(monkeypatch, held):
    model, samples = build_model("Llama, untied"), ragged_batch("text")
    weights = dict(choose_parameters(model, r"mlp.*weight", None))
    exact = [exact_gradient(model, tokens) for tokens in samples]
    bases = {
        name: Kronecker(*(torch.eye(n)[None] for n in p.shape), torch.full(p.shape, 2.0)) for name, p in weights.items()
    }
    monkeypatch.setattr(products, "_HELD", held)
    placements = place([(n, tuple(p.shape)) for n, p in weights.items()], 256)
    path = BatchPath(
        model, list(weights.items()), GradientSketcher(Oporp(256, 0), placements, CPU, EkfacCorrector(bases))
    )
    for sketches, gradient_of in zip(path.sketch(samples), exact, strict=True):
        plain = GradientSketcher(Oporp(256, 0), placements, CPU)
        out = plain.new()
        for name in weights:
            plain.add(name, 2 * gradient_of[name].view(1, -1), out)
        expected = plain.finish(out)[0]
        assert sketches.grad_norm == pytest.approx(float(expected.norm()), rel=1e-4)
        torch.testing.assert_close(sketches.vector / 16 * sketches.grad_norm, expected, rtol=1e-3, atol=1e-4)


def test_the_hooks_take_one_sample_at_a_time():
    model = build_model("GPT-2")
    chosen, keeper = unsketched(model)
    assert HookPath(model, chosen, keeper).largest == 1
    assert BatchPath(model, chosen, keeper).largest is None


def test_unsketched_parameters_have_no_gradient():
    model = build_model("GPT-2")
    chosen = choose_parameters(model, r"h\.1\.mlp", None)
    path = HookPath(
        model, chosen, GradientSketcher(Oporp(256, 0), place([(n, tuple(p.shape)) for n, p in chosen], 256), CPU)
    )
    assert isinstance(path.sketch(ragged_batch("text")[:1])[0], Sketch)
    assert path.seen == {name for name, _ in chosen}
    assert all(p.grad is None for p in model.parameters())
    path.close()
    assert not any(p.requires_grad for p in model.parameters())


def test_a_lost_device_ends_the_run(monkeypatch):
    class AcceleratorError(RuntimeError):
        pass

    model = build_model("GPT-2")
    chosen, keeper = unsketched(model)
    monkeypatch.setattr(hooks.torch, "AcceleratorError", AcceleratorError)
    hook = model.transformer.h[1].register_forward_pre_hook(
        lambda *_: (_ for _ in ()).throw(AcceleratorError("an illegal memory access"))
    )
    for path in (HookPath(model, chosen, keeper), BatchPath(model, chosen, keeper)):
        with pytest.raises(AcceleratorError, match="illegal memory access"):
            path.sketch(ragged_batch("text"))
        path.close()
    hook.remove()


def test_model_without_checkpointing_is_reported():
    def refuse(_):
        raise ValueError("Toy does not support gradient checkpointing.")

    with pytest.raises(
        InputError, match="the model does not support gradient checkpointing: Toy does not support"
    ) as refused:
        recompute_activations(SimpleNamespace(gradient_checkpointing_enable=refuse))
    assert refused.value.hint == "run without gradient checkpointing"


@pytest.mark.parametrize(("cuda", "mps", "device"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_auto_selects_the_fastest_device(monkeypatch, cuda, mps, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert pick_device("auto").type == device


def test_a_hint_names_a_few_parameters():
    model = torch.nn.ParameterDict({f"p{i}": torch.zeros(1) for i in range(9)})
    with pytest.raises(InputError, match="matches none of the model's 9 parameters") as none:
        choose_parameters(model, "nothing", None)
    assert none.value.hint == "its parameters include `p0`, `p2`, `p4`, `p6`, `p8`"


def test_scratch_memory_is_reused_if_size_and_type_fit():
    sketcher = GradientSketcher(Oporp(256, 0), place([("a", (4, 4))], 256), CPU)
    first = sketcher.scratch((2, 3), torch.float32)
    assert first.shape == (2, 3)
    assert sketcher.scratch((3, 2), torch.float32).data_ptr() == first.data_ptr()
    assert sketcher.scratch((5,), torch.float32).data_ptr() == first.data_ptr()
    assert sketcher.scratch((2, 4), torch.float32).shape == (2, 4)
    assert sketcher.scratch((2, 3), torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("k", [0, 128, 255, 257, 3 << 10, 1 << 21, -256])
def test_a_sketch_has_a_power_of_two_of_bins(k):
    with pytest.raises(InputError) as refused:
        oporp.check_k(k)
    assert refused.value.fact == f"k = {k} is not a power of two from 256 to 1048576"


def test_parameters_are_placed_one_after_the_other():
    placed = place([("a", (256,)), ("b", (257,)), ("c", (2, 3, 4)), ("d", ())], 256)
    assert [(p.first_chunk, p.n_chunks, p.numel) for p in placed] == [(0, 1, 256), (1, 2, 257), (3, 1, 24), (4, 1, 1)]
    most = (oporp._MASK + 1) * oporp.LANES
    assert place([("a", (most - 256,))], 256)[0].n_chunks == most // 256 - 1
    with pytest.raises(InputError, match="the map's limit"):
        place([("a", (most - 256,)), ("b", (1,))], 256)


# --- corrections ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("blocks", [1, 3])
def test_power_of_damped_blocks_equals_the_matrix_power(power, blocks):
    a = shuffled(4, blocks=blocks)
    result = inverse_power(a, 0.3, power)
    torch.testing.assert_close(dense(result), power_of(dense(a) + 0.3 * torch.eye(4 * blocks), -power))
    assert inverse_power(a.float(), 0.3, power).dtype == torch.float32


def test_eigenvalues_are_never_below_0():
    values, vectors = eigen(torch.tensor([[[1.0, 2.0], [2.0, 1.0]]]))
    assert values.tolist() == [[0.0, pytest.approx(3.0)]]  # that of −1 is rounding alone, or nothing to divide by
    assert vectors.dtype == torch.float64


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_block_product_equals_the_matrix_product(blocks, dtype):
    a, x = shuffled(4, blocks=blocks), torch.randn(5, 4 * blocks).to(dtype)
    result = by_blocks(x, a)
    assert result.dtype == (dtype if dtype in {torch.float32, torch.float64} else torch.float32)
    torch.testing.assert_close(result.double(), x.double() @ dense(a), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_factors_know_their_size_and_their_diagonal(rows, columns):
    item = Kronecker(shuffled(4, blocks=rows), shuffled(3, seed=1, blocks=columns))
    shape = (4 * rows, 3 * columns)
    g = torch.kron(dense(item.rows), dense(item.columns))
    assert item.numel == len(g)
    assert item.diagonal() == pytest.approx(float(g.trace()))
    assert item.fits(shape)
    for other in (shape[::-1], (shape[0] + 1, shape[1]), (shape[0], shape[1] - 1), (*shape, 1), shape[:1], (1, 1)):
        assert not item.fits(other), other
    values = Kronecker(item.rows, item.columns, torch.arange(float(len(g))).view(shape))
    assert values.diagonal() == pytest.approx(len(g) * (len(g) - 1) / 2)
    assert values.fits(shape)
    assert not Kronecker(item.rows, item.columns, torch.ones(shape[::-1] if rows != columns else (1, 1))).fits(shape)
    assert not Kronecker(item.rows[0], item.columns).fits(shape)
    assert not Kronecker(item.rows[:, :2], item.columns).fits((2 * rows, shape[1]))


def test_damping_uses_the_mean_of_all_diagonals():
    a, b = Kronecker(2 * torch.eye(3)[None], torch.eye(2)[None]), Kronecker(torch.eye(1)[None], 5 * torch.eye(4)[None])
    assert damping_of({"a": a, "b": b}, 0.5) == pytest.approx(0.5 * (6 * 2 + 4 * 5) / 10)
    nothing = Kronecker(torch.zeros(1, 3, 3), torch.eye(2)[None])
    assert damping_of({"a": nothing}, 0.5) == 0.5
    assert damping_of({}, 0.5) == 0.5


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_kfac_damps_both_sides_by_the_ratio_of_means(power):
    rows, columns, gradient = shuffled(3, blocks=2), shuffled(4, seed=1), torch.randn(6, 4, dtype=torch.float64)
    corrector = curvature_corrector({"w": Kronecker(rows, columns)}, 0.2, power, CPU)
    assert type(corrector) is KfacCorrector
    left, right = dense(rows), dense(columns)
    total = 0.2 * float(left.trace() * right.trace()) / 24
    ratio = (float(left.trace()) / 6 / (float(right.trace()) / 4)) ** 0.5
    expected = (
        power_of(left + total**0.5 * ratio * torch.eye(6), -power)
        @ gradient
        @ power_of(right + total**0.5 / ratio * torch.eye(4), -power)
    )
    torch.testing.assert_close(corrector.whole("w", gradient), expected)
    deltas, inputs = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    actual = corrector.left("w", deltas).T @ corrector.right("w", inputs)
    torch.testing.assert_close(actual, corrector.whole("w", deltas.T @ inputs))
    assert corrector.left("w", deltas.bfloat16()).dtype == torch.bfloat16
    assert corrector.right("w", inputs.half()).dtype == torch.float32


def test_kfac_with_a_zero_side_is_damped_alike():
    result = curvature_corrector({"w": Kronecker(torch.zeros(1, 2, 2), torch.eye(2)[None])}, 0.5, 1.0, CPU)
    torch.testing.assert_close(result.roots["w"].rows[0], torch.eye(2) / 0.5**0.5)
    torch.testing.assert_close(result.roots["w"].columns[0], torch.eye(2) / (1 + 0.5**0.5))


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_ekfac_divides_along_its_eigenvectors(power):
    _, left = eigen(shuffled(3, blocks=2))
    _, right = eigen(shuffled(4, seed=1))
    values, gradient = torch.rand(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    corrector = curvature_corrector({"w": Kronecker(left, right, values)}, 0.2, power, CPU)
    assert type(corrector) is EkfacCorrector
    basis_l, basis_r = dense(left), dense(right)
    along = (basis_l.T @ gradient @ basis_r) / (values + 0.2 * values.mean()) ** power
    torch.testing.assert_close(corrector.whole("w", gradient), basis_l @ along @ basis_r.T)
    deltas, inputs = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    torch.testing.assert_close(corrector.product("w", deltas, inputs), corrector.whole("w", deltas.T @ inputs))


def test_head_size_comes_from_attention_config_or_division():
    config = SimpleNamespace(hidden_size=48, num_attention_heads=4)
    assert _head_size(torch.nn.Module(), config) == 12
    assert _head_size(torch.nn.Module(), SimpleNamespace(**vars(config), head_dim=16)) == 16
    assert _head_size(torch.nn.Module(), SimpleNamespace(**vars(config), head_dim=None, head_size=8)) == 8
    assert _head_size(torch.nn.Module(), SimpleNamespace(**vars(config), head_dim=0)) == 12
    attention = torch.nn.Module()
    attention.head_size = 6
    assert _head_size(attention, SimpleNamespace(**vars(config), head_dim=16)) == 6


class Told:
    """A path with predefined results."""

    def __init__(self, dtype, *made, met=("a",)):
        self.made, self.seen, self.model = list(made), set(met), torch.nn.Linear(1, 1).to(dtype)

    def sketch(self, _):
        return self.made

    def close(self):
        pass


def rotated(degrees, norm=1.0):
    """A sketch at an angle to that of 0 degrees."""
    angle = torch.deg2rad(torch.tensor(float(degrees)))
    return Sketch(torch.stack([angle.cos(), angle.sin()]), norm, 1.0)


UNUSABLE = UnusableSampleError("too long")


@pytest.mark.parametrize(
    ("dtype", "ours", "theirs", "reason"),
    [
        (torch.float32, [rotated(0.5), rotated(0)], [rotated(0), rotated(0)], None),  # a cosine of .99996
        (torch.float32, [rotated(0), rotated(1)], [rotated(0), rotated(0)], "(cosine 0.9998)"),
        (torch.bfloat16, [rotated(2)], [rotated(0)], None),  # .9994
        (torch.bfloat16, [rotated(3)], [rotated(0)], "(cosine 0.9986)"),
        (torch.float32, [rotated(0, 2.009)], [rotated(0, 2.0)], None),
        (torch.float32, [rotated(0, 2.011)], [rotated(0, 2.0)], "do not add up to the model's (cosine 1.0000)"),
        (torch.float32, [rotated(0, 1.989)], [rotated(0, 2.0)], "do not add up to the model's (cosine 1.0000)"),
        (torch.bfloat16, [rotated(0, 2.09)], [rotated(0, 2.0)], None),
        (torch.bfloat16, [rotated(0, 2.11)], [rotated(0, 2.0)], "do not add up"),
        (torch.float32, [UNUSABLE], [rotated(0)], "it fails in a batch but not alone: too long"),
        (torch.float32, [rotated(9), rotated(0)], [UNUSABLE, rotated(0)], None),
    ],
)
def test_path_is_trusted_if_it_equals_the_hooks(dtype, ours, theirs, reason):
    result = _difference(Told(dtype, *ours), lambda: Told(dtype, *theirs), [])
    assert result is None if reason is None else reason in result


def test_path_missing_a_parameter_is_not_trusted():
    result = _difference(Told(torch.float32), lambda: Told(torch.float32, met=("a", "c", "b")), [])
    assert result == "`b` is used outside its layer"
    assert _difference(Told(torch.float32, met=("a", "b")), lambda: Told(torch.float32), []) is None


class Attention(torch.nn.Module):
    """An attention by its name; its heads have 4 coordinates."""

    head_dim = 4


@pytest.mark.parametrize(
    ("path", "shape", "inputs", "blocks"),
    [
        ("attention.q_proj", (8, 12), "columns", (1, 2)),
        ("attention.q_proj", (12, 8), "rows", (1, 2)),  # Conv1D
        ("attention.o_proj", (12, 8), "columns", (2, 1)),
        ("attention.o_proj", (8, 12), "rows", (2, 1)),
        ("attention.q_proj", (6, 12), "columns", (1, 1)),  # no whole number of heads
        ("attention.o_proj", (12, 6), "columns", (1, 1)),
        ("attention.gate", (8, 12), "columns", (1, 1)),
        ("mlp.q_proj", (8, 12), "columns", (1, 1)),
    ],
)
def test_projection_is_split_into_heads(path, shape, inputs, blocks):
    model = torch.nn.ModuleDict({"attention": Attention(), "mlp": torch.nn.Module()})
    model.config = SimpleNamespace(hidden_size=48, num_attention_heads=4)
    assert _heads(model, path, torch.Size(shape), inputs) == blocks


def test_sample_fails_alone_in_an_untrusted_batch():
    model = build_model("GPT-2")
    chosen, keeper = unsketched(model)
    model.transformer.h[1].register_forward_pre_hook(
        lambda _, given: None if given[0].shape[1] != 9 else (_ for _ in ()).throw(RuntimeError("nine"))
    )
    path = BatchPath(model, chosen, keeper)
    sketches = path.sketch([random_tokens(0, n=9), random_tokens(1, n=4)])
    assert isinstance(sketches[0], UnusableSampleError)
    assert str(sketches[0]) == "the model fails on its 9 tokens: nine"
    assert isinstance(sketches[1], Sketch)


def test_layer_that_can_not_be_tested_does_not_count_as_scaling():
    class TwoInputs(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(4))

        def forward(self, left, right):
            return self.weight * left * right

    class Scaling(TwoInputs):
        def forward(self, inputs):
            return self.weight * inputs

    assert layers._scales_its_input(Scaling())
    assert not layers._scales_its_input(TwoInputs())
