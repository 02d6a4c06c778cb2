"""Batched per-sample gradients, against plain autograd one sample at a time."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf
from test_gradients import CPU, exact_gradient, sample, sketch_exact

from lark_store.ingest.batched import BatchPath, make_path
from lark_store.ingest.gradients import (
    HookPath,
    Sketch,
    SketchPath,
    choose_parameters,
    is_out_of_memory,
    recompute_activations,
)
from lark_store.ingest.oporp import GradientSketcher, Oporp, place
from lark_store.ingest.variants import Tokens, UnusableSampleError

SMALL = {"vocab_size": 300, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA_LIKE = SMALL | {"intermediate_size": 80, "num_key_value_heads": 2, "pad_token_id": 0}
CONFIGS = {
    "Llama, tied": hf.LlamaConfig(**LLAMA_LIKE, tie_word_embeddings=True),
    "Llama, untied": hf.LlamaConfig(**LLAMA_LIKE, tie_word_embeddings=False, attention_bias=True, mlp_bias=True),
    "OLMo-2": hf.Olmo2Config(**LLAMA_LIKE),
    "OLMo-3": hf.Olmo3Config(**LLAMA_LIKE, sliding_window=8),
    "GPT-2": hf.GPT2Config(vocab_size=300, n_embd=48, n_layer=2, n_head=4, n_positions=64),
    "GPT-NeoX": hf.GPTNeoXConfig(**SMALL, intermediate_size=80),
    "BLOOM": hf.BloomConfig(vocab_size=300, hidden_size=48, n_layer=2, n_head=4),
    "Phi-3": hf.Phi3Config(**LLAMA_LIKE),
    "Gemma-3": hf.Gemma3TextConfig(**LLAMA_LIKE, head_dim=16, sliding_window=8),
    "Qwen-3": hf.Qwen3Config(**LLAMA_LIKE, head_dim=16),
}


def model_of(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    config = CONFIGS[name]
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases start as ones and zeros: make each its own
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def ragged(rule: str) -> list[Tokens]:
    return [sample(i, n=n, rule=rule) for i, n in enumerate((9, 24, 3, 17))]


class Whole(GradientSketcher):
    """Takes the gradients that a path makes as they are, unsketched."""

    def new(self, n=1):
        self.gradients = [
            {name: torch.zeros(p.numel, dtype=torch.float64) for name, p in self.placements.items()} for _ in range(n)
        ]
        return super().new(n)

    def add(self, name, gradient_SN, out, chunk=0):
        start = chunk * self.oporp.k
        for mine, gradient in zip(self.gradients, gradient_SN, strict=True):
            mine[name][start : start + len(gradient)] += gradient.double()
        super().add(name, gradient_SN, out, chunk)

    def add_rows(self, name, index_T, values_TH, out, s):
        self.gradients[s][name].view(-1, values_TH.shape[1]).index_add_(0, index_T, values_TH.double())
        super().add_rows(name, index_T, values_TH, out, s)


def whole(model) -> tuple[list, Whole]:
    chosen = choose_parameters(model, None, None)
    return chosen, Whole(Oporp(256, 0), place([(name, tuple(p.shape)) for name, p in chosen], 256), CPU)


@pytest.mark.parametrize("rule", ["text", "response"])
@pytest.mark.parametrize("mode", ["right", "left", "checkpointing"])
@pytest.mark.parametrize("name", CONFIGS)
def test_batched_gradients_are_those_of_autograd_one_at_a_time(name, mode, rule):
    model, samples = model_of(name), ragged(rule)
    exact = [exact_gradient(model, tokens) for tokens in samples]
    chosen, sketcher = whole(model)
    if mode == "checkpointing":
        recompute_activations(model)
    path = BatchPath(model, chosen, sketcher, pad_left=mode == "left")
    made = path.sketch(samples)
    for gradients, expected, sketch in zip(sketcher.gradients, exact, made, strict=True):
        assert isinstance(sketch, Sketch)
        scale = max(float(g.abs().max()) for g in expected.values())
        for parameter, gradient in expected.items():
            torch.testing.assert_close(
                gradients[parameter].view_as(gradient).float(),
                gradient,
                rtol=1e-5,
                atol=1e-5 * scale,
                msg=parameter,
            )


def paths(model: torch.nn.Module, k: int = 4096) -> tuple[SketchPath, HookPath, str | None]:
    chosen = choose_parameters(model, None, None)
    sketcher = GradientSketcher(Oporp(k, 0), place([(n, tuple(p.shape)) for n, p in chosen], k), CPU)
    hooked = copy.deepcopy(model)
    path, reason = make_path(model, chosen, sketcher)
    return path, HookPath(hooked, choose_parameters(hooked, None, None), sketcher), reason


def cosines(ours: list[Sketch], theirs: list[Sketch]) -> list[float]:
    assert all(isinstance(sketch, Sketch) for sketch in [*ours, *theirs])
    pairs = zip(ours, theirs, strict=True)
    return [float(torch.nn.functional.cosine_similarity(a.vector, b.vector, dim=0)) for a, b in pairs]


def test_gradient_checkpointing_goes_forward_twice():
    model, calls = model_of("Llama, tied"), []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    recompute_activations(model)
    chosen, sketcher = whole(model)
    BatchPath(model, chosen, sketcher).sketch(ragged("text"))
    assert len(calls) == 2


@pytest.mark.parametrize("name", CONFIGS)
def test_every_model_of_the_list_is_batched(name):
    path, hooks, reason = paths(model_of(name))
    assert isinstance(path, BatchPath), reason
    samples = ragged("predicted")
    assert min(cosines(path.sketch(samples), hooks.sketch(samples))) > 0.9999


def test_a_sample_has_the_same_sketch_alone_and_in_any_batch():
    path, _, _ = paths(model_of("Qwen-3"))
    samples = ragged("text")
    alone = [path.sketch([one])[0] for one in samples]
    assert min(cosines(path.sketch(samples), alone)) > 0.999999
    assert min(cosines(path.sketch(samples[::-1]), alone[::-1])) > 0.999999
    assert all(torch.equal(a.vector, b.vector) for a, b in zip(path.sketch(samples), path.sketch(samples), strict=True))


def test_in_bfloat16_too():
    model = model_of("Llama, untied").bfloat16()
    path, hooks, reason = paths(model)
    assert isinstance(path, BatchPath), reason
    samples = ragged("text")
    assert min(cosines(path.sketch(samples), hooks.sketch(samples))) > 0.999


def test_a_mixture_of_experts_is_sketched_by_the_hooks_and_says_so():
    torch.manual_seed(0)
    config = hf.MixtralConfig(**LLAMA_LIKE, num_local_experts=4, num_experts_per_tok=2)
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    samples = ragged("text")
    exact = [exact_gradient(model, tokens) for tokens in samples]
    path, _, reason = paths(model)
    assert isinstance(path, HookPath)
    assert "MixtralTopKRouter" in reason
    made = path.sketch(samples)
    expected = [sketch_exact(each, 4096) for each in exact]
    for sketch, vector in zip(made, expected, strict=True):
        torch.testing.assert_close(sketch.vector / 64 * sketch.grad_norm, vector, rtol=1e-4, atol=1e-5)


class Elsewhere(torch.nn.Module):
    """Uses its linear layer's weight behind the layer's back."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(48, 48)

    def forward(self, x):
        return self.inner(x) + x @ self.inner.weight


class AcrossSamples(torch.nn.Module):
    """Lets the samples of a batch see each other."""

    def forward(self, x):
        return x + x.mean(dim=0, keepdim=True)


@pytest.mark.parametrize("odd", [Elsewhere, AcrossSamples])
def test_a_model_whose_layers_do_not_make_up_its_gradient_is_found_out(odd):
    model = model_of("Llama, tied")
    model.model.layers[1].mlp = odd()
    path, _, reason = paths(model)
    assert isinstance(path, HookPath)
    assert "do not make up" in reason


class Behind(torch.nn.Module):
    """Has a linear layer that is never called, and whose share of the gradient is small."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(48, 48, bias=False)

    def forward(self, x):
        return x + 1e-4 * (x @ self.inner.weight)


def test_a_parameter_is_never_left_out_however_small_its_gradient():
    model = model_of("Llama, tied")
    model.model.layers[1].mlp = Behind()
    path, _, reason = paths(model)
    assert isinstance(path, HookPath)
    assert reason == "`model.layers.1.mlp.inner.weight` is used outside its layer"


@pytest.mark.parametrize("length", [4, 2])  # Gemma's heads, and key-value heads, stand where tokens do elsewhere
def test_heads_are_not_taken_for_tokens(length):
    path, hooks, _ = paths(model_of("Gemma-3"))
    samples = [sample(0, n=length), sample(1, n=2)]
    assert min(cosines(path.sketch(samples), hooks.sketch(samples))) > 0.99999


def test_gradient_checkpointing_drops_nothing_out():
    torch.manual_seed(0)
    config = hf.OPTConfig(
        vocab_size=300, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, ffn_dim=80, word_embed_proj_dim=48
    )
    assert config.dropout == 0.1
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    path, _, reason = paths(model)
    samples = ragged("text")
    expected = path.sketch(samples)
    recompute_activations(model)
    assert min(cosines(path.sketch(samples), expected)) > 0.99999, reason


class OutOfMemory:
    """A device that holds so many tokens of a batch, and no more."""

    def __init__(self, model: torch.nn.Module, tokens: int) -> None:
        self.tokens, self.tried = tokens, []
        model.model.layers[1].register_forward_pre_hook(self)

    def __call__(self, _, given):
        tokens = given[0].shape[0] * given[0].shape[1]
        self.tried.append(tokens)
        if tokens > self.tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_when_memory_runs_out_the_batch_is_halved():
    model = model_of("Llama, tied")
    path, hooks, _ = paths(model)
    device = OutOfMemory(model, 40)
    samples = ragged("text")
    made = path.sketch(samples)
    assert device.tried[:2] == [96, 48]
    assert path.largest == 24
    assert min(cosines(made, hooks.sketch(samples))) > 0.9999


@pytest.mark.parametrize(
    "text",
    ["[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried", "MPS backend out of memory (9 GB)"],
)
def test_other_devices_run_out_of_memory_in_other_words(text):
    assert is_out_of_memory(RuntimeError(text))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_a_layer_that_is_met_in_another_shape_later_fails_its_sample_alone():
    model = model_of("Llama, untied")
    path, hooks, _ = paths(model)
    inner = model.model.layers[1].mlp.down_proj
    cut = torch.nn.Module.register_forward_pre_hook
    cut(inner, lambda _, given: (given[0].reshape(1, -1, 80),) if given[0].shape[1] > 20 else None)
    model.model.layers[1].mlp.register_forward_hook(
        lambda _m, given, out: out.reshape(given[0].shape) if out.shape != given[0].shape else None
    )
    samples = [sample(0, n=9), sample(1, n=9)]
    assert min(cosines(path.sketch(samples), hooks.sketch(samples))) > 0.9999
    made = path.sketch([sample(2, n=24), sample(3, n=9)])
    assert isinstance(made[1], Sketch)


def test_a_sample_that_is_too_large_alone_is_a_reason_and_the_others_are_right():
    model = model_of("Llama, tied")
    path, hooks, _ = paths(model)
    OutOfMemory(model, 20)
    samples = ragged("text")
    made = path.sketch(samples)
    assert [isinstance(one, UnusableSampleError) for one in made] == [False, True, False, False]
    assert "out of memory" in str(made[1])
    kept = [0, 2, 3]
    assert min(cosines([made[i] for i in kept], hooks.sketch([samples[i] for i in kept]))) > 0.9999


def test_a_token_that_the_model_lacks_fails_alone():
    path, _, _ = paths(model_of("GPT-2"))
    samples = ragged("text")
    samples[1] = Tokens([1, 2, 300], [False, True, True], "text")
    made = path.sketch(samples)
    assert isinstance(made[1], UnusableSampleError)
    assert all(isinstance(made[i], Sketch) for i in (0, 2, 3))


def test_a_gradient_that_is_not_finite_spoils_no_other_of_its_batch():
    model = model_of("Llama, untied")
    path, hooks, _ = paths(model)
    samples = [sample(i, n=12) for i in range(3)]
    samples[1] = Tokens([299, *samples[1].input_ids[1:]], samples[1].is_target, "text")
    assert all(299 not in samples[i].input_ids for i in (0, 2))
    model.model.embed_tokens.weight.data[299] = float("nan")
    first, bad, third = path.sketch(samples)
    assert isinstance(bad, UnusableSampleError)
    assert "not finite" in str(bad)
    assert min(cosines([first, third], hooks.sketch([samples[0], samples[2]]))) > 0.9999


def test_backward_stops_where_nothing_more_is_sketched():
    model = model_of("Llama, untied")
    chosen = choose_parameters(model, r"layers\.1\.|norm", r"layers\.0\.")
    path = BatchPath(
        model, chosen, GradientSketcher(Oporp(256, 0), place([(n, tuple(p.shape)) for n, p in chosen], 256), CPU)
    )
    graphs = []
    model.model.layers[0].register_forward_hook(lambda _m, _i, out: graphs.append(out.requires_grad))
    assert isinstance(path.sketch(ragged("text"))[0], Sketch)
    assert graphs == [False]
