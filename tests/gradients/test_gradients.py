"""Sketches of real models' gradients, against exact full gradients made by plain autograd."""

from __future__ import annotations

import pytest
import torch
from helpers.gradients import CPU, exact_gradient, hook_path, random_tokens, sketch_exact, sketch_gradient
from helpers.models import random_llama
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
)

from lark_store.core.device import pick_device
from lark_store.errors import InputError
from lark_store.gradients.paths.hooks import HookPath, Sketch, choose_parameters
from lark_store.gradients.sketch.accumulate import GradientSketcher
from lark_store.gradients.sketch.oporp import Oporp
from lark_store.gradients.sketch.placement import place
from lark_store.modeling.encoded import UnusableSampleError
from lark_store.modeling.losses import Batch, sample_losses
from lark_store.modeling.tokens import Tokens
from lark_store.schema.sign_codes import fold


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=64, n_layer=2, n_head=4, n_positions=64)).eval()


def gpt_neox() -> GPTNeoXForCausalLM:
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=300, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
    )
    return GPTNeoXForCausalLM(config).eval()


MODELS = {
    "tied Llama": random_llama,
    "untied Llama": lambda: random_llama(tied=False),
    "GPT-2": gpt2,
    "GPT-NeoX": gpt_neox,
}


@pytest.mark.parametrize("rule", ["text", "response", "predicted"])
@pytest.mark.parametrize("name", MODELS)
def test_hooks_sketch_the_exact_gradient(name, rule):
    model = MODELS[name]()
    tokens = random_tokens(1, rule=rule)
    expected = sketch_exact(exact_gradient(model, tokens), 4096)
    path = hook_path(model, 4096)
    (sketch,) = path.sketch([tokens])
    assert isinstance(sketch, Sketch)
    torch.testing.assert_close(sketch.vector / 64 * sketch.grad_norm, expected, rtol=1e-4, atol=1e-5)
    assert sketch.grad_norm == pytest.approx(float(expected.norm()), rel=1e-5)
    assert float(sketch.vector.norm()) == pytest.approx(64)


def related_samples(n: int) -> list[Tokens]:
    """Samples sharing between few and nearly all tokens: their gradients' cosines spread."""
    whole, vocab = random_tokens(0, vocab=2048).input_ids, 2048
    results = []
    for i in range(n):
        fresh = random_tokens(i + 1, vocab=vocab).input_ids
        ids = [a if t < len(whole) * i // n else b for t, (a, b) in enumerate(zip(whole, fresh, strict=True))]
        results.append(Tokens(ids, [t > 0 for t in range(len(ids))], "text"))
    return results


@pytest.mark.parametrize("k", [1024, 65_536])
def test_cosine_errors_match_the_variance_formula(k):
    model = random_llama(hidden=256, vocab=2048)
    cosine = torch.nn.functional.cosine_similarity
    gradients = [exact_gradient(model, tokens) for tokens in related_samples(20)]
    flat = [torch.cat([g.flatten() for g in gradient.values()]).double() for gradient in gradients]
    placements = place([(name, tuple(p.shape)) for name, p in choose_parameters(model, None, None)], k)
    squares, expected, exact = [], [], []
    for seed in range(10):
        sketcher = GradientSketcher(Oporp(k, seed), placements, CPU)
        actual = [sketch_gradient(sketcher, gradient).double() for gradient in gradients]
        for a in range(10, 20):
            b = (a + 1 + seed) % 20
            rho, estimate = (float(cosine(x[a], x[b], dim=0)) for x in (flat, actual))
            exact.append(rho)
            squares.append((estimate - rho) ** 2)
            expected.append((1 - rho**2) ** 2 / k)
    assert len(squares) == 100
    assert min(exact) < 0.2
    assert max(exact) > 0.8
    ratio = (sum(squares) / sum(expected)) ** 0.5
    assert ratio == pytest.approx(1, abs=0.15)


def test_a_folded_sketch_still_estimates_the_cosine():
    model = random_llama()
    gradients = [exact_gradient(model, random_tokens(i)) for i in range(2)]
    x, y = (torch.from_numpy(fold(sketch_exact(g, 65_536).numpy()[None], 4096)[0]) for g in gradients)
    u, v = (torch.cat([g.flatten() for g in gradient.values()]) for gradient in gradients)
    cosine = torch.nn.functional.cosine_similarity
    assert float(cosine(x, y, dim=0)) == pytest.approx(float(cosine(u, v, dim=0)), abs=6 / 64)


def test_no_gradient_leaks_to_the_model_or_other_samples():
    model = random_llama()
    path = hook_path(model, 1024)
    alone = path.sketch([random_tokens(2)])[0]
    again = path.sketch([random_tokens(1), random_tokens(2)])[1]
    assert torch.equal(alone.vector, again.vector)
    assert all(p.grad is None for p in model.parameters())


def test_only_the_chosen_parameters_are_sketched():
    model = random_llama()
    tokens = random_tokens(3)
    gradient = {n: g for n, g in exact_gradient(model, tokens).items() if "layers.2." in n}
    (sketch,) = hook_path(model, 1024, include=r"layers\.2\.").sketch([tokens])
    torch.testing.assert_close(
        sketch.vector / 32 * sketch.grad_norm, sketch_exact(gradient, 1024), rtol=1e-4, atol=1e-6
    )


def test_tied_weights_count_once():
    names = [name for name, _ in choose_parameters(random_llama(tied=True), None, None)]
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    assert "lm_head.weight" in [name for name, _ in choose_parameters(random_llama(tied=False), None, None)]


def test_exclude_removes_parameters():
    names = [name for name, _ in choose_parameters(random_llama(), r"layers\.1\.", "norm")]
    assert len(names) == 7
    assert not any("norm" in name for name in names)


def test_expression_matching_nothing_is_an_error():
    with pytest.raises(InputError, match="none of the model's"):
        choose_parameters(random_llama(), "nothing like this", None)
    with pytest.raises(InputError, match="is not a regular expression"):
        choose_parameters(random_llama(), "(", None)


def test_logits_are_computed_for_targets_only():
    model = random_llama()
    tokens = random_tokens(4, rule="response")
    seen = []
    model.lm_head.register_forward_hook(lambda _m, _i, out: seen.append(out.shape[1]))
    loss = float(sample_losses(model, Batch([tokens], CPU)).detach())
    assert seen == [2]
    logits = model(input_ids=torch.tensor([tokens.input_ids])).logits[0].log_softmax(dim=-1)
    expected = -sum(logits[t - 1, tokens.input_ids[t]] for t in (22, 23)) / 2
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)


def test_nonfinite_gradient_fails_only_its_sample():
    model = random_llama()
    path = hook_path(model, 1024)
    expected = path.sketch([random_tokens(6)])[0]
    with torch.no_grad():
        row = model.model.embed_tokens.weight[5].clone()
        model.model.embed_tokens.weight[5] = float("nan")
    (bad,) = path.sketch([Tokens([5, 6, 7], [False, True, True], "text")])
    assert isinstance(bad, UnusableSampleError)
    assert "not finite" in str(bad)
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = row
    (good,) = path.sketch([random_tokens(6)])
    assert torch.equal(good.vector, expected.vector)


def test_zero_gradient_fails_the_sample():
    model = random_llama()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    (sketch,) = hook_path(model, 1024, include=r"layers\.0\.").sketch([random_tokens(0)])
    assert isinstance(sketch, UnusableSampleError)
    assert "zero" in str(sketch)


def test_an_absent_device_is_an_error():
    assert pick_device("cpu") == CPU
    for name in ("mps:9", "no-such-device"):
        with pytest.raises(InputError, match="is not available"):
            pick_device(name)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_cuda_sketches_equal_cpu_sketches():
    tokens = random_tokens(1)
    expected = hook_path(random_llama(), 4096).sketch([tokens])[0]
    model = random_llama().to("cuda")
    chosen = choose_parameters(model, None, None)
    placements = place([(name, tuple(p.shape)) for name, p in chosen], 4096)
    path = HookPath(model, chosen, GradientSketcher(Oporp(4096, 0), placements, torch.device("cuda")))
    first, second = path.sketch([tokens, tokens])
    assert torch.equal(first.vector, second.vector)
    cosine = float(torch.nn.functional.cosine_similarity(first.vector, expected.vector, dim=0))
    assert cosine > 0.9999
