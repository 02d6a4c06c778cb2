"""Token-level influence, against plain autograd in float64: position by position, and target by target."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.gradients import CPU, exact_gradient, masked_gradient_by_hand, mean_squared_gradient, random_tokens
from helpers.models import SharedWeight, build_model

from lark_store.gradients.corrections import CORRECTIONS, Corrector
from lark_store.gradients.corrections.second_moments import Moments
from lark_store.gradients.corrections.tensor import NormCorrector
from lark_store.gradients.paths.hooks import choose_parameters
from lark_store.gradients.paths.taps import UnknownLayerError
from lark_store.gradients.token_influence import GradientDivider, check_sum, dot
from lark_store.modeling.tokens import Tokens

# Which dimension of a layer's 4-dimensional outputs holds the tokens, as the model's own code has it.
DIM = {"Qwen-3": 1, "Gemma-3": 2}
PLAIN = ["Llama, tied", "Llama, untied", "GPT-NeoX", "GPT-2", "Qwen-3", "Gemma-3", "OLMo-2"]
QUERY, SAMPLE = random_tokens(1, n=8), random_tokens(2, n=9, rule="text")


def losses_of(model, tokens):
    """Return the loss of each target alone, as it is defined."""
    logits = model(input_ids=torch.tensor([tokens.input_ids])).logits[0]
    labels = {
        t: logits[t - 1].argmax() if tokens.rule == "predicted" else tokens.input_ids[t]
        for t, is_target in enumerate(tokens.is_target)
        if is_target
    }
    return {t: -logits[t - 1].log_softmax(dim=-1)[label] for t, label in labels.items()}


def mean_or_sum(losses, tokens):
    total = torch.stack(list(losses.values())).sum()
    return total if tokens.is_summed else total / len(losses)


def product(gradient, direction):
    return sum(float((gradient[name] * along).sum()) for name, along in direction.items())


def targets_by_hand(model, tokens, direction):
    """Return ⟨G, gradient of one target's loss⟩ for each: a backward pass each."""
    model = copy.deepcopy(model).double().requires_grad_(True)
    names = {name: p for name, p in model.named_parameters() if name in direction}
    losses = losses_of(model, tokens)
    weight = 1 if tokens.is_summed else 1 / len(losses)
    parts = torch.zeros(len(tokens.input_ids), dtype=torch.float64)
    for t, loss in losses.items():
        gradients = torch.autograd.grad(loss, list(names.values()), retain_graph=True, allow_unused=True)
        pairs = zip(names, gradients, strict=True)
        parts[t] = weight * sum(float((g * direction[name]).sum()) for name, g in pairs if g is not None)
    return parts


def positions_by_hand(model, tokens, direction, dim=1):
    """Return ⟨G, gradient with a layer's output gradient zero at all other positions⟩ for each, summed over layers."""
    model = copy.deepcopy(model).double().requires_grad_(True)
    calls, names = [], {id(p): name for name, p in model.named_parameters()}

    def remember(layer, given, out):
        out.retain_grad()
        calls.append((layer, given[0].detach(), out))

    for module in model.modules():
        if list(module.parameters(recurse=False)):
            module.register_forward_hook(remember)
    mean_or_sum(losses_of(model, tokens), tokens).backward()
    parts = torch.zeros(len(tokens.input_ids), dtype=torch.float64)
    for layer, x, out in calls:
        own = [p for p in layer.parameters(recurse=False) if names[id(p)] in direction]
        for t in range(len(parts) if own else 0):
            place = dim if out.dim() == 4 else 1 if out.shape[0] == 1 and out.dim() == 3 else 0
            delta = torch.zeros_like(out)
            delta.select(place, t).copy_(out.grad.select(place, t))
            gradients = torch.autograd.grad(layer.forward(x), own, delta)
            parts[t] += sum(float((g * direction[names[id(p)]]).sum()) for p, g in zip(own, gradients, strict=True))
    return parts


def divided(model, corrector=None, *, masked=False, query=QUERY, sample=SAMPLE, chosen=None):
    divider = GradientDivider(
        model, chosen or choose_parameters(model, None, None), corrector or Corrector(), masked=masked
    )
    gradients = [divider.gradient(tokens) for tokens in (query, sample)]
    total = dot(gradients[0].corrected, gradients[1].corrected)
    scale = gradients[0].norm * gradients[1].norm
    sides = [
        divider.divide(query, divider.direction(gradients[0], gradients[1])),
        divider.divide(sample, divider.direction(gradients[1], gradients[0])),
    ]
    for division in sides:
        check_sum(division, total, scale)
    return sides, total, scale


def assert_parts(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def check_against_autograd(model, sides, directions, dim=1, tokens=(QUERY, SAMPLE)):
    """Compare both sides; `directions` has that of the query's parts, then that of the sample's."""
    for division, own, direction in zip(sides, tokens, directions, strict=True):
        assert_parts(division.by_position, positions_by_hand(model, own, direction, dim))
        assert_parts(division.by_target, targets_by_hand(model, own, direction))


def exact(model, tokens):
    return {n: g for n, g in exact_gradient(copy.deepcopy(model).double(), tokens).items() if g is not None}


@pytest.mark.parametrize("name", PLAIN)
def test_both_divisions_equal_plain_autograd(name):
    model = build_model(name)
    sides, total, _ = divided(model)
    of_query, of_sample = exact(model, QUERY), exact(model, SAMPLE)
    assert total == pytest.approx(product(of_query, of_sample), rel=1e-4)
    check_against_autograd(model, sides, (of_sample, of_query), DIM.get(name, 1))


@pytest.mark.parametrize("name", ["Llama, tied", "GPT-2", "Qwen-3"])
def test_adams_scale_applies_to_both(name):
    model = build_model(name)
    squares = mean_squared_gradient(model, [random_tokens(5), random_tokens(6)])
    moments = {n: Moments.of(v) for n, v in squares.items()}
    sides, total, _ = divided(model, CORRECTIONS["adam"].corrector(moments, 0.1, 0.0, CPU))

    def directed(gradient):  # V^(−1/2) g, with Adafactor's V
        scaled = {}
        for n, v in squares.items():
            mean = v.mean()
            damped = v + 0.1 * mean
            if v.dim() == 2:
                rows, columns = v.mean(1, keepdim=True) + 0.1 * mean, v.mean(0, keepdim=True) + 0.1 * mean
                damped = rows * columns / rows.mean()
            scaled[n] = gradient[n] / damped.sqrt()
        return scaled

    of_query, of_sample = exact(model, QUERY), exact(model, SAMPLE)
    assert total == pytest.approx(product(of_query, directed(of_sample)), rel=1e-3)
    check_against_autograd(model, sides, (directed(of_sample), directed(of_query)), DIM.get(name, 1))


def test_tensors_of_norm_1_are_divided_with_their_norms_fixed():
    model = build_model("Llama, untied")
    sides, total, _ = divided(model, NormCorrector())
    of_query, of_sample = exact(model, QUERY), exact(model, SAMPLE)
    norms = {n: of_query[n].norm() * of_sample[n].norm() for n in of_query}
    along = [{n: g / norms[n] for n, g in gradient.items()} for gradient in (of_sample, of_query)]
    assert total == pytest.approx(product(of_query, along[0]), rel=1e-4)
    check_against_autograd(model, sides, along)


def test_masked_positions_carry_nothing():
    model = build_model("Llama, tied")
    tokens = [
        Tokens(t.input_ids, t.is_target, t.rule, is_content=[i % 3 > 0 for i in range(len(t.input_ids))])
        for t in (QUERY, SAMPLE)
    ]
    sides, total, _ = divided(model, masked=True, query=tokens[0], sample=tokens[1])
    of_query, of_sample = (masked_gradient_by_hand(model, t) for t in tokens)
    assert total == pytest.approx(product(of_query, of_sample), rel=1e-4)
    for division, own, direction in zip(sides, tokens, (of_sample, of_query), strict=True):
        assert_parts(division.by_position, positions_by_hand(model, own, direction) * torch.tensor(own.is_content))
        n = len(own.input_ids)
        alone = [Tokens(own.input_ids, [i == t for i in range(n)], "text", is_content=own.is_content) for t in range(n)]
        by_hand = [product(masked_gradient_by_hand(model, t), direction) / (n - 1) for t in alone[1:]]
        assert_parts(division.by_target, torch.tensor([0, *by_hand], dtype=torch.float64))


@pytest.mark.parametrize("rule", ["response", "predicted"])
def test_other_target_rules_and_a_summed_loss(rule):
    model = build_model("Llama, tied")
    sample = random_tokens(3, n=9, rule=rule)
    sample = Tokens(sample.input_ids, sample.is_target, rule, is_summed=True)
    sides, _, _ = divided(model, sample=sample)
    wide = copy.deepcopy(model).double().requires_grad_(True)
    mean_or_sum(losses_of(wide, sample), sample).backward()
    of_sample = {n: p.grad for n, p in wide.named_parameters()}
    check_against_autograd(model, sides, (of_sample, exact(model, QUERY)), tokens=(QUERY, sample))
    labels = sides[1].labels
    assert [label is not None for label in labels] == sample.is_target
    if rule == "predicted":
        logits = model(input_ids=torch.tensor([sample.input_ids])).logits[0]
        assert labels[1:] == logits.argmax(dim=-1)[:-1].tolist()
    else:
        assert labels[-2:] == sample.input_ids[-2:]


def test_only_the_selected_parameters_count():
    model = build_model("Llama, untied")
    chosen = choose_parameters(model, None, "embed_tokens", 2)
    sides, total, _ = divided(model, chosen=chosen)
    names = {name for name, _ in chosen}
    of_query, of_sample = ({n: g for n, g in exact(model, t).items() if n in names} for t in (QUERY, SAMPLE))
    assert total == pytest.approx(product(of_query, of_sample), rel=1e-4)
    check_against_autograd(model, sides, (of_sample, of_query))


@pytest.mark.parametrize("name", ["Mixtral", "DeepSeek-V3"])
def test_experts_and_routers_of_a_mixture(name):
    model = build_model(name)
    sides, total, scale = divided(model)  # it checks all sums
    assert abs(total) > 1e-4 * scale
    of_query = {n: g for n, g in exact_gradient(copy.deepcopy(model), QUERY).items() if g is not None}
    model = copy.deepcopy(model).requires_grad_(True)
    losses = losses_of(model, SAMPLE)
    by_hand = []
    for loss in losses.values():
        model.zero_grad()
        loss.backward(retain_graph=True)
        pairs = [(p.grad, of_query.get(n)) for n, p in model.named_parameters()]
        by_hand.append(sum(float((g * along).sum()) for g, along in pairs if g is not None and along is not None))
    expected = torch.tensor([0, *by_hand], dtype=torch.float64) / len(losses)
    torch.testing.assert_close(sides[1].by_target, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_without_forward_mode_each_target_has_its_own_backward_pass():
    model = build_model("BLOOM")  # its activation has no forward mode
    sides, _, _ = divided(model)
    assert_parts(sides[1].by_target, targets_by_hand(model, SAMPLE, exact(model, QUERY)))


def test_as_many_tokens_as_heads_are_no_ambiguity():
    model = build_model("Qwen-3")  # 4 heads
    sample = random_tokens(7, n=4)
    sides, _, _ = divided(model, sample=sample)
    assert_parts(sides[1].by_position, positions_by_hand(model, sample, exact(model, QUERY), 1))


def test_padding_token_has_no_row_in_the_embedding_gradient():
    model = build_model("Llama, untied")  # padding_idx 0
    sample = Tokens([5, 0, 7, 0, 9], [False, True, True, True, True], "text")
    query = Tokens([0, 5, 7, 0], [False, True, True, True], "text")
    sides, total, _ = divided(model, query=query, sample=sample)
    assert total == pytest.approx(product(exact(model, query), exact(model, sample)), rel=1e-4)
    assert_parts(sides[1].by_position, positions_by_hand(model, sample, exact(model, query)))


def test_a_weight_used_outside_its_layer_is_noticed():
    model = build_model("Llama, untied")
    model.model.layers[0].mlp = SharedWeight()
    with pytest.raises(UnknownLayerError, match="a parameter is used outside its layer"):
        divided(model)


def test_a_layer_without_known_positions_is_refused():
    class Pools(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(48, 48)

        def forward(self, x):
            return x + self.inner(x.mean(dim=1))[:, None]

    model = build_model("Llama, untied")
    model.model.layers[1].mlp = Pools()
    with pytest.raises(UnknownLayerError, match="with unknown token positions"):
        divided(model)


def test_the_model_is_left_as_it_was():
    model = build_model("Llama, tied")
    before = copy.deepcopy(model.state_dict())
    divided(model)
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
