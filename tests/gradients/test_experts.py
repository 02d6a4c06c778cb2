"""Routers and stacked experts of a mixture: their rules, in a batched backward pass."""

from __future__ import annotations

import pytest
import torch
from helpers.gradients import (
    CPU,
    WholeGradients,
    assert_gradients_close,
    exact_gradient,
    ragged_batch,
    random_tokens,
    sketch_cosines,
    whole_gradients,
)
from helpers.models import MIXTURES, build_model
from torch import nn
from torch.nn import functional
from transformers.integrations.moe import use_experts_implementation

from lark_store.gradients.corrections import CORRECTIONS
from lark_store.gradients.corrections.kronecker import EkfacCorrector
from lark_store.gradients.corrections.second_moments import Moments
from lark_store.gradients.paths import products
from lark_store.gradients.paths.batched import BatchPath, UnknownLayerError, make_path
from lark_store.gradients.paths.hooks import HookPath, Sketch, choose_parameters
from lark_store.gradients.paths.layers import rule_for
from lark_store.gradients.paths.products import StackFactors, add_products, add_stack, runs
from lark_store.gradients.sketch.accumulate import GradientSketcher
from lark_store.gradients.sketch.oporp import Oporp
from lark_store.gradients.sketch.placement import place

IMPLEMENTATIONS = ["eager", "batched_mm", "grouped_mm"]


def batched(model, corrector=None, *, include=None, exclude=None, kind=WholeGradients, k=256):
    chosen = choose_parameters(model, include, exclude)
    sketcher = kind(Oporp(k, 0), place([(n, tuple(p.shape)) for n, p in chosen], k), CPU, corrector)
    return BatchPath(model, chosen, sketcher), sketcher


def experts_of(model):
    return [layer for layer in model.modules() if hasattr(layer, "down_proj") and hasattr(layer, "num_experts")]


# --- models --------------------------------------------------------------------------------------------------------


def test_experts_with_biases_and_transposed_weights():
    """The attention's sinks have no rule."""
    model, samples, without = build_model("gpt-oss"), ragged_batch("text"), "sinks"
    expected = [
        {name: g for name, g in exact_gradient(model, tokens).items() if without not in name} for tokens in samples
    ]
    assert sum("proj_bias" in name for name in expected[0]) == 4
    assert_gradients_close(whole_gradients(*batched(model, exclude=without), samples), expected)


def test_biases_of_experts_are_corrected_like_matrices():
    model, without = build_model("gpt-oss"), "sinks"
    samples = [random_tokens(i, n=24) for i in range(2)]
    gradients = [exact_gradient(model, tokens) for tokens in samples]
    moments = {name: Moments.of((g.double() ** 2 + gradients[1][name] ** 2) / 2) for name, g in gradients[0].items()}
    corrector = CORRECTIONS["adam"].corrector(moments, 0.1, 0.0, CPU)
    expected = [
        {name: corrector.whole(name, g) for name, g in gradient.items() if without not in name}
        for gradient in gradients
    ]
    assert_gradients_close(whole_gradients(*batched(model, corrector, exclude=without), samples), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", [*MIXTURES, "gpt-oss"])
def test_logits_are_unchanged_by_a_path(name, implementation):
    model = build_model(name)
    model.set_experts_implementation(implementation)
    ids = torch.tensor([random_tokens(0).input_ids, random_tokens(1).input_ids])
    before = model(input_ids=ids).logits
    path, _ = batched(model, exclude="sinks")
    during = []
    model.lm_head.register_forward_hook(lambda _m, _i, out: during.append(out))
    path._batch = object()
    model(input_ids=ids)
    path._batch = None
    torch.testing.assert_close(during[0], before, rtol=1e-5, atol=1e-5)
    assert torch.equal(model(input_ids=ids).logits, before)  # no gradients are taken: nothing is replaced
    path.close()
    assert not any("forward" in vars(layer) for layer in model.modules())
    assert torch.equal(model(input_ids=ids).logits, before)


@pytest.mark.parametrize("name", MIXTURES)
def test_router_losses_of_training_are_left_out(name):
    """The loss is the language model's alone, whatever the config adds in training."""
    model, samples = build_model(name), ragged_batch("text")
    plain, _ = batched(model, kind=GradientSketcher)
    expected = plain.sketch(samples)
    plain.close()
    model.config.output_router_logits, model.config.router_aux_loss_coef = True, 10.0
    path, _ = batched(model, kind=GradientSketcher)
    cosines = sketch_cosines(path.sketch(samples), expected)
    path.close()
    chosen = choose_parameters(model, None, None)
    placements = place([(n, tuple(p.shape)) for n, p in chosen], 256)
    hooks = HookPath(model, chosen, GradientSketcher(Oporp(256, 0), placements, CPU))
    assert min(cosines + sketch_cosines(hooks.sketch(samples), expected)) > 0.99999


def test_experts_in_another_precision_than_the_rest():
    model, samples = build_model("Mixtral"), ragged_batch("text")
    for experts in experts_of(model):
        experts.bfloat16()
    chosen = choose_parameters(model, None, None)
    placements = place([(n, tuple(p.shape)) for n, p in chosen], 4096)
    hooks = HookPath(model, chosen, GradientSketcher(Oporp(4096, 0), placements, CPU))
    expected = hooks.sketch(samples)
    hooks.close()
    path, _ = batched(model, kind=GradientSketcher, k=4096)
    assert min(sketch_cosines(path.sketch(samples), expected)) > 0.999


@pytest.mark.parametrize("include", ["gate.weight", "experts.down_proj", "experts.gate_up_proj", r"layers\.0\.mlp"])
def test_parts_of_a_mixture_are_sketched_alone(include):
    model, samples = build_model("OLMoE"), ragged_batch("response")
    expected = [
        {name: gradient[name] for name, _ in choose_parameters(model, include, None)}
        for gradient in [exact_gradient(model, tokens) for tokens in samples]
    ]
    assert_gradients_close(whole_gradients(*batched(model, include=include), samples), expected)


@pytest.mark.parametrize("held", [1, 3000, 1 << 23])
@pytest.mark.parametrize("together", [False, True])
def test_gradients_of_experts_are_independent_of_product_and_memory_limits(monkeypatch, together, held):
    model, samples = build_model("Qwen-3 MoE"), ragged_batch("text")
    expected = [exact_gradient(model, tokens) for tokens in samples]
    monkeypatch.setattr(products, "_HELD", held)
    path, keeper = batched(model)
    keeper.together = together  # as on a GPU
    assert_gradients_close(whole_gradients(path, keeper, samples), expected)


class LargestStretch(GradientSketcher):
    largest = 0

    def add(self, name, gradient_SN, out, chunk=0):
        if gradient_SN.is_contiguous() and ".experts." in name:
            type(self).largest = max(self.largest, gradient_SN.numel())
        super().add(name, gradient_SN, out, chunk)


def test_memory_for_gradients_of_experts_is_bounded(monkeypatch):
    model, samples = build_model("Mixtral"), ragged_batch("text")
    monkeypatch.setattr(products, "_HELD", 20_000)
    path, _ = batched(model, kind=LargestStretch)
    path.sketch(samples)
    stack = experts_of(model)[0].gate_up_proj.numel()
    assert 10_000 < LargestStretch.largest <= 20_000 < len(samples) * stack


def test_two_paths_are_closed_in_any_order():
    model, samples = build_model("OLMoE"), ragged_batch("text")
    exact = [exact_gradient(model, tokens) for tokens in samples]
    first, _ = batched(model, kind=GradientSketcher)
    second, _ = batched(model, kind=GradientSketcher)
    expected = second.sketch(samples)
    first.close()
    assert min(sketch_cosines(second.sketch(samples), expected)) > 0.99999
    second.close()
    third, keeper = batched(model)
    assert_gradients_close(whole_gradients(third, keeper, samples), exact)


# --- experts -------------------------------------------------------------------------------------------------------


@use_experts_implementation(has_gate=False)
class UngatedExperts(nn.Module):
    """Experts without a gate, as in Nemotron-H."""

    def __init__(self, config):
        super().__init__()
        self.num_experts = config.num_local_experts
        self.up_proj = nn.Parameter(torch.randn(4, 12, 48, generator=torch.Generator().manual_seed(0)) / 7)
        self.down_proj = nn.Parameter(torch.randn(4, 48, 12, generator=torch.Generator().manual_seed(1)) / 3)
        self.act_fn = nn.SiLU()

    def forward(self, hidden_states, top_k_index, top_k_weights):
        raise NotImplementedError


@use_experts_implementation(has_post_expert_norm=True)
class NormedExperts(UngatedExperts):
    """Experts with a norm on each one's output."""


def with_experts(kind):
    model = build_model("Mixtral")
    for layer in model.model.layers:
        layer.mlp.experts = kind(model.config)
    return model


def test_experts_without_a_gate():
    model, samples = with_experts(UngatedExperts), ragged_batch("text")
    expected = [exact_gradient(model, tokens) for tokens in samples]
    assert_gradients_close(whole_gradients(*batched(model), samples), expected)


def test_experts_with_more_than_two_products_have_no_rule():
    assert rule_for(NormedExperts(build_model("Mixtral").config)) is None
    experts = UngatedExperts(build_model("Mixtral").config)
    assert rule_for(experts) is not None
    experts.extra = nn.Parameter(torch.ones(3))
    assert rule_for(experts) is None


def test_experts_called_in_another_way_fall_back():
    model = build_model("Mixtral")
    experts = model.model.layers[0].mlp.experts
    experts._is_expert_parallel = True
    chosen = choose_parameters(model, None, None)
    placements = place([(n, tuple(p.shape)) for n, p in chosen], 256)
    path, reason = make_path(model, chosen, GradientSketcher(Oporp(256, 0), placements, CPU))
    assert isinstance(path, HookPath)
    assert reason == "experts `model.layers.0.mlp.experts` are called in an unknown way"
    assert not any("forward" in vars(layer) for layer in model.modules())


def test_correction_of_full_products_does_not_batch_experts():
    model = build_model("Mixtral")
    with pytest.raises(UnknownLayerError, match="the correction needs whole gradients of stacked experts"):
        batched(model, EkfacCorrector({}))
    assert not any("forward" in vars(layer) or layer._forward_hooks for layer in model.modules())


def test_kfac_leaves_stacked_experts_out():
    model = build_model("Mixtral")
    chosen = CORRECTIONS["kfac"].parameters(model, choose_parameters(model, None, None))
    assert {name.split(".")[-2] for name, _ in chosen} == {"q_proj", "k_proj", "v_proj", "o_proj"}


@pytest.mark.parametrize("together", [False, True])
def test_samples_without_tokens_of_a_matrix_are_skipped(together):
    counts = [[2, 0, 1], [0, 0, 4], [0, 0, 0], [1, 3, 0]]
    left, right = torch.randn(11, 4), torch.randn(11, 64)
    added = []

    class Recorder(GradientSketcher):
        def add(self, name, gradient_SN, out, chunk=0):
            added.append((len(gradient_SN), chunk))
            super().add(name, gradient_SN, out, chunk)

    sketcher = Recorder(Oporp(256, 0), place([("w", (4, 4, 64))], 256), CPU)
    sketcher.together = together
    dense, start = torch.zeros(3, 4, 4, 64), 0
    for e, row in enumerate(counts):
        for b, count in enumerate(row):
            dense[b, e] = left[start : start + count].T @ right[start : start + count]
            start += count
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "_HELD", 1)  # one matrix at a time
        add_stack("w", StackFactors(left, right, counts), sketcher, out := sketcher.new(3))
    assert added == [(1, 0), (1, 0), (1, 1), (2, 3)]
    add_to = GradientSketcher.add
    add_to(sketcher, "w", dense.view(3, -1), expected := sketcher.new(3))
    torch.testing.assert_close(sketcher.finish(out), sketcher.finish(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("held", [1, 2 * 768, 3 * 768, 5 * 768, 1 << 23])
def test_stretches_of_a_stack_may_cross_its_matrices(monkeypatch, held, together):
    """30 rows of six matrices, 4, 8, 12, 20 or all at a time."""
    counts = torch.randint(0, 3, (6, 3), generator=torch.Generator().manual_seed(0)).tolist()
    n = sum(map(sum, counts))
    left, right, dense, start = torch.randn(n, 5), torch.randn(n, 64), torch.zeros(3, 6, 5, 64), 0
    for e, row in enumerate(counts):
        for b, count in enumerate(row):
            dense[b, e] = left[start : start + count].T @ right[start : start + count]
            start += count
    sketcher = GradientSketcher(Oporp(256, 0), place([("w", (6, 5, 64))], 256), CPU)
    sketcher.together = together
    monkeypatch.setattr(products, "_HELD", held)
    add_stack("w", StackFactors(left, right, counts), sketcher, out := sketcher.new(3))
    sketcher.add("w", dense.view(3, -1), expected := sketcher.new(3))
    torch.testing.assert_close(sketcher.finish(out), sketcher.finish(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("held", [1, 3 * 768, 5 * 768, 1 << 23])
def test_products_are_added_some_rows_at_a_time(monkeypatch, held, together):
    lefts, rights = ([torch.randn(n, width) for n in (4, 1, 3)] for width in (31, 64))
    dense = torch.stack([left.T @ right for left, right in zip(lefts, rights, strict=True)])
    sketcher = GradientSketcher(Oporp(256, 0), place([("v", (3, 64)), ("w", (31, 64))], 256), CPU)
    sketcher.together = together
    monkeypatch.setattr(products, "_HELD", held)
    add_products("w", lefts, rights, sketcher, out := sketcher.new(3))
    sketcher.add("w", dense.view(3, -1), expected := sketcher.new(3))
    torch.testing.assert_close(sketcher.finish(out), sketcher.finish(expected), rtol=1e-4, atol=1e-4)


def test_runs_of_samples():
    assert list(runs([False, True, True, False, True])) == [range(1, 3), range(4, 5)]
    assert list(runs([False, False])) == []


# --- routers -------------------------------------------------------------------------------------------------------


class Router(nn.Module):
    """A layer with a weight that `product` uses."""

    def __init__(self, product, bias=None):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 5, generator=torch.Generator().manual_seed(0)))
        self.bias = None if bias is None else nn.Parameter(bias)
        self.product = product

    def forward(self, x):
        return self.product(self, x)


ONE_PRODUCT = {
    "logits": lambda layer, x: functional.linear(x, layer.weight),
    "scores": lambda layer, x: functional.linear(x, layer.weight).softmax(dim=-1).topk(2),
    "in float64": lambda layer, x: (functional.linear(x.double(), layer.weight.double()).sigmoid(), None),
    "flat": lambda layer, x: functional.linear(x.reshape(-1, 5), layer.weight).exp(),
}
OTHER_USES = {
    "weight normalised": lambda layer, x: functional.linear(x, functional.normalize(layer.weight)),
    "input normalised": lambda layer, x: functional.linear(functional.normalize(x)[None], layer.weight),
    "used twice": lambda layer, x: functional.linear(x, layer.weight) + functional.linear(2 * x, layer.weight),
    "used elsewhere": lambda layer, x: functional.linear(x, layer.weight) + layer.weight.sum(),
    "matrix product": lambda layer, x: x @ layer.weight.T,
    "fails": lambda layer, x: functional.linear(x, layer.missing),
    "no gradient": lambda layer, x: functional.linear(x, layer.weight).argmax(dim=-1),
}


@pytest.mark.parametrize("use", ONE_PRODUCT)
@pytest.mark.parametrize("bias", [None, torch.ones(6)])
def test_layer_with_one_product_has_a_rule(use, bias):
    product = ONE_PRODUCT[use]
    if bias is not None:
        product = lambda layer, x: functional.linear(x, layer.weight, layer.bias).softmax(dim=-1)  # noqa: E731
    assert rule_for(Router(product, bias)) is not None


@pytest.mark.parametrize("use", OTHER_USES)
def test_other_uses_of_a_weight_have_no_rule(use):
    assert rule_for(Router(OTHER_USES[use])) is None


def test_router_that_stops_multiplying_fails_its_sample():
    model = build_model("OLMoE")
    path, _ = batched(model, kind=GradientSketcher)
    path.trusted = True
    samples = ragged_batch("text")
    assert all(isinstance(sketch, Sketch) for sketch in path.sketch(samples))
    gate = model.model.layers[1].mlp.gate
    weight = gate.weight
    gate._parameters["weight"] = nn.Parameter(weight.T.contiguous())
    (failed,) = path.sketch(samples[:1])
    assert "the model fails on its 9 tokens" in str(failed)
    gate._parameters["weight"] = weight
