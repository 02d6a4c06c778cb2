"""Sketches of real models' gradients, against exact full gradients made by plain autograd."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from lark_store.errors import InputError
from lark_store.ingest.gradients import HookPath, Sketch, choose_parameters, pick_device
from lark_store.ingest.losses import Batch, sample_losses
from lark_store.ingest.oporp import GradientSketcher, Oporp, fold, place
from lark_store.ingest.variants import Tokens, UnusableSampleError

CPU = torch.device("cpu")


def llama(seed: int = 0, *, tied: bool = True, hidden: int = 64, vocab: int = 300) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=64, n_layer=2, n_head=4, n_positions=64)).eval()


def gpt_neox() -> GPTNeoXForCausalLM:
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=300, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
    )
    return GPTNeoXForCausalLM(config).eval()


def sample(seed: int, n: int = 24, rule: str = "text", vocab: int = 300) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab, (n,), generator=generator).tolist()
    targets = [rule != "response" and i > 0 for i in range(n)]
    if rule == "response":
        targets[-2:] = [True, True]
    return Tokens(ids, targets, rule)


def exact_gradient(model: torch.nn.Module, tokens: Tokens) -> dict[str, torch.Tensor]:
    """Plain autograd of the loss as it is defined, with nothing of the code under test."""
    model.requires_grad_(True)
    model.zero_grad()
    ids = torch.tensor([tokens.input_ids])
    logits = model(input_ids=ids).logits[0]
    losses = []
    for t, is_target in enumerate(tokens.is_target):
        if is_target:
            label = logits[t - 1].argmax() if tokens.rule == "predicted" else ids[0, t]
            losses.append(-logits[t - 1].log_softmax(dim=-1)[label])
    torch.stack(losses).mean().backward()
    gradient = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return gradient


def path_for(model: torch.nn.Module, k: int, seed: int = 0, include: str | None = None) -> HookPath:
    chosen = choose_parameters(model, include, None)
    placements = place([(name, tuple(p.shape)) for name, p in chosen], k)
    return HookPath(model, chosen, GradientSketcher(Oporp(k, seed), placements, CPU))


def sketch_exact(gradient: dict[str, torch.Tensor], k: int, seed: int = 0) -> torch.Tensor:
    placements = place([(n, tuple(g.shape)) for n, g in gradient.items()], k)
    return sketch_with(GradientSketcher(Oporp(k, seed), placements, CPU), gradient)


def sketch_with(sketcher: GradientSketcher, gradient: dict[str, torch.Tensor]) -> torch.Tensor:
    out = sketcher.new()
    for name, g in gradient.items():
        sketcher.add(name, g.reshape(1, -1), out)
    return sketcher.finish(out)[0]


MODELS = {"tied Llama": llama, "untied Llama": lambda: llama(tied=False), "GPT-2": gpt2, "GPT-NeoX": gpt_neox}


@pytest.mark.parametrize("rule", ["text", "response", "predicted"])
@pytest.mark.parametrize("name", MODELS)
def test_hooks_sketch_the_exact_gradient(name, rule):
    model = MODELS[name]()
    tokens = sample(1, rule=rule)
    expected = sketch_exact(exact_gradient(model, tokens), 4096)
    path = path_for(model, 4096)
    (made,) = path.sketch([tokens])
    assert isinstance(made, Sketch)
    torch.testing.assert_close(made.vector / 64 * made.grad_norm, expected, rtol=1e-4, atol=1e-5)
    assert made.grad_norm == pytest.approx(float(expected.norm()), rel=1e-5)
    assert float(made.vector.norm()) == pytest.approx(64)


def relatives(n: int) -> list[Tokens]:
    """Samples that share a part of their tokens, from nearly none to nearly all: their gradients' cosines spread."""
    whole, vocab = sample(0, vocab=2048).input_ids, 2048
    made = []
    for i in range(n):
        fresh = sample(i + 1, vocab=vocab).input_ids
        ids = [a if t < len(whole) * i // n else b for t, (a, b) in enumerate(zip(whole, fresh, strict=True))]
        made.append(Tokens(ids, [t > 0 for t in range(len(ids))], "text"))
    return made


@pytest.mark.parametrize("k", [1024, 65_536])
def test_cosines_agree_with_exact_ones_as_the_variance_formula_says(k):
    model = llama(hidden=256, vocab=2048)
    cosine = torch.nn.functional.cosine_similarity
    gradients = [exact_gradient(model, tokens) for tokens in relatives(20)]
    flat = [torch.cat([g.flatten() for g in gradient.values()]).double() for gradient in gradients]
    placements = place([(name, tuple(p.shape)) for name, p in choose_parameters(model, None, None)], k)
    squares, expected, exact = [], [], []
    for seed in range(10):
        sketcher = GradientSketcher(Oporp(k, seed), placements, CPU)
        made = [sketch_with(sketcher, gradient).double() for gradient in gradients]
        for a in range(10, 20):
            b = (a + 1 + seed) % 20
            rho, estimate = (float(cosine(x[a], x[b], dim=0)) for x in (flat, made))
            exact.append(rho)
            squares.append((estimate - rho) ** 2)
            expected.append((1 - rho**2) ** 2 / k)
    assert len(squares) == 100
    assert min(exact) < 0.2
    assert max(exact) > 0.8
    ratio = (sum(squares) / sum(expected)) ** 0.5
    assert ratio == pytest.approx(1, abs=0.15)


def test_a_folded_sketch_still_estimates_the_cosine():
    model = llama()
    gradients = [exact_gradient(model, sample(i)) for i in range(2)]
    x, y = (fold(sketch_exact(g, 65_536), 4096) for g in gradients)
    u, v = (torch.cat([g.flatten() for g in gradient.values()]) for gradient in gradients)
    cosine = torch.nn.functional.cosine_similarity
    assert float(cosine(x, y, dim=0)) == pytest.approx(float(cosine(u, v, dim=0)), abs=6 / 64)


def test_no_gradient_stays_on_the_model_and_samples_do_not_mix():
    model = llama()
    path = path_for(model, 1024)
    alone = path.sketch([sample(2)])[0]
    again = path.sketch([sample(1), sample(2)])[1]
    assert torch.equal(alone.vector, again.vector)
    assert all(p.grad is None for p in model.parameters())


def test_only_the_chosen_parameters_are_sketched():
    model = llama()
    tokens = sample(3)
    gradient = {n: g for n, g in exact_gradient(model, tokens).items() if "layers.2." in n}
    (made,) = path_for(model, 1024, include=r"layers\.2\.").sketch([tokens])
    torch.testing.assert_close(made.vector / 32 * made.grad_norm, sketch_exact(gradient, 1024), rtol=1e-4, atol=1e-6)


def test_tied_weights_count_once():
    names = [name for name, _ in choose_parameters(llama(tied=True), None, None)]
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    assert "lm_head.weight" in [name for name, _ in choose_parameters(llama(tied=False), None, None)]


def test_exclude_takes_parameters_out_again():
    names = [name for name, _ in choose_parameters(llama(), r"layers\.1\.", "norm")]
    assert len(names) == 7
    assert not any("norm" in name for name in names)


def test_an_expression_that_takes_nothing_is_an_error():
    with pytest.raises(InputError, match="none of the model's"):
        choose_parameters(llama(), "nothing like this", None)
    with pytest.raises(InputError, match="no regular expression"):
        choose_parameters(llama(), "(", None)


def test_logits_are_made_for_the_targets_only_with_the_same_loss():
    model = llama()
    tokens = sample(4, rule="response")
    seen = []
    model.lm_head.register_forward_hook(lambda _m, _i, out: seen.append(out.shape[1]))
    loss = float(sample_losses(model, Batch([tokens], CPU)).detach())
    assert seen == [2]
    logits = model(input_ids=torch.tensor([tokens.input_ids])).logits[0].log_softmax(dim=-1)
    expected = -sum(logits[t - 1, tokens.input_ids[t]] for t in (22, 23)) / 2
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)


def test_a_gradient_that_is_not_finite_is_a_reason_and_the_next_sample_is_right():
    model = llama()
    path = path_for(model, 1024)
    expected = path.sketch([sample(6)])[0]
    with torch.no_grad():
        row = model.model.embed_tokens.weight[5].clone()
        model.model.embed_tokens.weight[5] = float("nan")
    (bad,) = path.sketch([Tokens([5, 6, 7], [False, True, True], "text")])
    assert isinstance(bad, UnusableSampleError)
    assert "not finite" in str(bad)
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = row
    (good,) = path.sketch([sample(6)])
    assert torch.equal(good.vector, expected.vector)


def test_a_gradient_of_zero_is_a_reason():
    model = llama()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    (made,) = path_for(model, 1024, include=r"layers\.0\.").sketch([sample(0)])
    assert isinstance(made, UnusableSampleError)
    assert "zero" in str(made)


def test_an_absent_device_is_an_error():
    assert pick_device("cpu") == CPU
    for name in ("mps:9", "no-such-device"):
        with pytest.raises(InputError, match="no device"):
            pick_device(name)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_cuda_gives_the_sketches_of_the_cpu():
    tokens = sample(1)
    expected = path_for(llama(), 4096).sketch([tokens])[0]
    model = llama().to("cuda")
    chosen = choose_parameters(model, None, None)
    placements = place([(name, tuple(p.shape)) for name, p in chosen], 4096)
    path = HookPath(model, chosen, GradientSketcher(Oporp(4096, 0), placements, torch.device("cuda")))
    first, second = path.sketch([tokens, tokens])
    assert torch.equal(first.vector, second.vector)
    cosine = float(torch.nn.functional.cosine_similarity(first.vector, expected.vector, dim=0))
    assert cosine > 0.9999
