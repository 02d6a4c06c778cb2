"""Masked templates in layers with ambiguous positions, and the check which refuses unmaskable models."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.gradients import (
    CPU,
    WholeGradients,
    assert_gradients_close,
    exact_gradient,
    random_tokens,
    whole_gradients,
)
from helpers.models import MixesSamples, SharedWeight, UncalledLayer, build_model

from lark_store.errors import CheckpointError
from lark_store.gradients.paths.batched import BatchPath, UnknownLayerError, make_path
from lark_store.gradients.paths.hooks import Sketch, choose_parameters
from lark_store.gradients.paths.masked import MaskedHookPath
from lark_store.gradients.sketch.accumulate import GradientSketcher
from lark_store.gradients.sketch.oporp import Oporp
from lark_store.gradients.sketch.placement import place
from lark_store.modeling.encoded import UnusableSampleError
from lark_store.modeling.tokens import Tokens

# Which dimension of the norms of queries and keys holds the tokens, as the model's own code has it.
NORMS_OF_4_DIMENSIONS = {"Qwen-3": 1, "Gemma-3": 2}


def some_content(tokens, *, without=1):
    """Return the sample with two of three tokens as content."""
    is_content = [i > 0 and i % 3 != without for i in range(len(tokens.input_ids))]
    return Tokens(tokens.input_ids, tokens.is_target, tokens.rule, is_content=is_content)


def masked_path(model, kind=GradientSketcher):
    chosen = choose_parameters(model, None, None)
    sketcher = kind(Oporp(256, 0), place([(n, tuple(p.shape)) for n, p in chosen], 256), CPU)
    path, reason = make_path(model, chosen, sketcher, masked=True)
    return path, reason, sketcher


def each_layer_alone(model, tokens, dim_of_tokens):
    """Zero each layer's output gradient where the template is, and let autograd go back through that layer alone."""
    model = copy.deepcopy(model).double().requires_grad_(True)
    calls, names = [], {id(p): name for name, p in model.named_parameters()}

    def remember(layer, given, out):
        out.retain_grad()
        calls.append((layer, given[0].detach(), out))

    for module in model.modules():
        if list(module.parameters(recurse=False)):
            module.register_forward_hook(remember)
    logits = model(input_ids=torch.tensor([tokens.input_ids])).logits[0]
    losses = [
        -logits[t - 1].log_softmax(dim=-1)[tokens.input_ids[t]]
        for t, is_target in enumerate(tokens.is_target)
        if is_target
    ]
    torch.stack(losses).mean().backward()
    results = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for layer, x, out in calls:
        shape = [1] * out.dim()
        shape[dim_of_tokens if out.dim() == 4 else 1] = len(tokens.input_ids)
        delta = out.grad * torch.tensor(tokens.is_content).view(shape)
        for own, gradient in zip(
            layer.parameters(recurse=False),
            torch.autograd.grad(layer.forward(x), list(layer.parameters(recurse=False)), delta),
            strict=True,
        ):
            results[names[id(own)]] += gradient
    return results


@pytest.mark.parametrize(("name", "dim"), NORMS_OF_4_DIMENSIONS.items())
def test_norms_of_4_dimensions_are_masked_by_the_hooks(name, dim):
    model = build_model(name)
    samples = [some_content(random_tokens(i, n=n)) for i, n in enumerate((9, 24, 17))]
    expected = [each_layer_alone(model, tokens, dim) for tokens in samples]
    hooked = copy.deepcopy(model)
    path, reason, keeper = masked_path(hooked, WholeGradients)
    assert isinstance(path, MaskedHookPath)
    assert reason.startswith("layer `model.layers.1.self_attn.")
    assert reason.endswith("_norm` has unknown token positions, so its template can't be masked")
    assert_gradients_close(whole_gradients(path, keeper, samples), expected)
    norms = [n for n in expected[0] if n.endswith(("q_norm.weight", "k_norm.weight"))]
    assert len(norms) == 4
    for tokens, gradients in zip(samples, expected, strict=True):
        plain = exact_gradient(copy.deepcopy(model).double(), tokens)
        assert all(not torch.allclose(gradients[n], plain[n], rtol=1e-2) for n in norms)


@pytest.mark.parametrize("name", NORMS_OF_4_DIMENSIONS)
@pytest.mark.parametrize("n_tokens", [2, 4])  # 2 heads of keys, 4 of queries
def test_ambiguous_heads_and_tokens_are_refused(name, n_tokens):
    path, _, _ = masked_path(build_model(name))
    (sketch,) = path.sketch([some_content(random_tokens(0, n=n_tokens), without=2)])
    assert isinstance(sketch, UnusableSampleError)
    assert f"gives (1, {n_tokens}, {n_tokens}, 16), with unknown token positions" in str(sketch)
    (sketch,) = path.sketch([some_content(random_tokens(0, n=n_tokens + 1), without=2)])
    assert isinstance(sketch, Sketch)


class Sideways(torch.nn.Module):
    """Holds its parameters in a layer that gives (1, width, tokens)."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Conv1d(48, 48, 1)

    def forward(self, x):
        return self.inner(x.mT).mT


@pytest.mark.parametrize(
    ("odd", "reason"),
    [
        (Sideways, r"layer `model\.layers\.1\.mlp\.inner` gives \(1, 48, 5\), with unknown token positions"),
        (SharedWeight, r"the layers' gradients do not add up to the model's \(cosine 0\.\d+\)"),
        (UncalledLayer, r"`model\.layers\.1\.mlp\.inner\.weight` is used outside its layer"),
    ],
)
def test_unmaskable_model_is_refused_with_the_reason(odd, reason):
    model = build_model("Llama, tied")
    model.model.layers[1].mlp = odd()
    with pytest.raises(CheckpointError, match=rf"the template can't be masked in this model: .*{reason}") as refused:
        masked_path(model)
    assert refused.value.hint == "use a sketcher without `--mask-template`"
    hooks = [m._forward_hooks for m in model.modules()] + [p._post_accumulate_grad_hooks for p in model.parameters()]
    assert not any(hooks)  # nothing of the trial stays on the model


def test_samples_that_see_each_other_are_masked_one_at_a_time():
    model = build_model("Llama, tied")
    model.model.layers[1].mlp = MixesSamples()
    path, reason, _ = masked_path(model)
    assert isinstance(path, MaskedHookPath)
    assert "do not add up" in reason


@pytest.mark.parametrize("slip", [1, -1])
def test_batch_masking_other_positions_than_the_hooks_is_rejected(monkeypatch, slip):
    cut = BatchPath._cut

    def slipped(self, name, values, batch):
        rolled = copy.copy(batch)
        rolled.__dict__["content"] = [(rows + slip).clamp(0, 4) for rows in batch.content]
        return cut(self, name, values, rolled)

    model = build_model("Llama, tied")
    assert isinstance(masked_path(copy.deepcopy(model))[0], BatchPath)
    monkeypatch.setattr(BatchPath, "_cut", slipped)
    path, reason, _ = masked_path(model)
    assert isinstance(path, MaskedHookPath)
    assert "do not add up" in reason


def test_only_masking_needs_a_layers_positions():
    model = build_model("Qwen-3")
    chosen = choose_parameters(model, None, None)
    sketcher = GradientSketcher(Oporp(256, 0), place([(n, tuple(p.shape)) for n, p in chosen], 256), CPU)
    path = BatchPath(model, chosen, sketcher)
    assert all(isinstance(sketch, Sketch) for sketch in path.sketch([random_tokens(0), random_tokens(1)]))
    path.close()
    with pytest.raises(UnknownLayerError, match=r"_norm` has unknown token positions, so its template can't be masked"):
        BatchPath(model, chosen, sketcher, masked=True).sketch([random_tokens(0)])
