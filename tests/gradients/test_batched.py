"""Batched per-sample gradients, against plain autograd one sample at a time."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf
from helpers.gradients import (
    CPU,
    WholeGradients,
    exact_gradient,
    ragged_batch,
    random_tokens,
    sketch_cosines,
    sketch_exact,
)
from helpers.models import CONFIGS, MIXTURES, MixesSamples, SharedWeight, UncalledLayer, build_model

from lark_store.gradients.paths.batched import BatchPath, make_path
from lark_store.gradients.paths.hooks import (
    HookPath,
    Sketch,
    SketchPath,
    choose_parameters,
    is_out_of_memory,
    recompute_activations,
)
from lark_store.gradients.sketch.accumulate import GradientSketcher
from lark_store.gradients.sketch.oporp import Oporp
from lark_store.gradients.sketch.placement import place
from lark_store.modeling.encoded import UnusableSampleError
from lark_store.modeling.tokens import Tokens


def whole(model) -> tuple[list, WholeGradients]:
    chosen = choose_parameters(model, None, None)
    return chosen, WholeGradients(Oporp(256, 0), place([(name, tuple(p.shape)) for name, p in chosen], 256), CPU)


@pytest.mark.parametrize("rule", ["text", "response"])
@pytest.mark.parametrize("mode", ["right", "left", "checkpointing"])
@pytest.mark.parametrize("name", CONFIGS)
def test_batched_gradients_equal_autograd_per_sample(name, mode, rule):
    model, samples = build_model(name), ragged_batch(rule)
    exact = [exact_gradient(model, tokens) for tokens in samples]
    chosen, sketcher = whole(model)
    if mode == "checkpointing":
        recompute_activations(model)
    path = BatchPath(model, chosen, sketcher, pad_left=mode == "left")
    sketches = path.sketch(samples)
    for gradients, expected, sketch in zip(sketcher.gradients, exact, sketches, strict=True):
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


def test_gradient_checkpointing_runs_forward_twice():
    model, calls = build_model("Llama, tied"), []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    recompute_activations(model)
    chosen, sketcher = whole(model)
    BatchPath(model, chosen, sketcher).sketch(ragged_batch("text"))
    assert len(calls) == 2


@pytest.mark.parametrize("name", CONFIGS)
def test_every_listed_model_is_batched(name):
    path, hooks, reason = paths(build_model(name))
    assert isinstance(path, BatchPath), reason
    samples = ragged_batch("predicted")
    assert min(sketch_cosines(path.sketch(samples), hooks.sketch(samples))) > 0.9999


def test_sketch_is_independent_of_the_batch():
    path, _, _ = paths(build_model("Qwen-3"))
    samples = ragged_batch("text")
    alone = [path.sketch([one])[0] for one in samples]
    assert min(sketch_cosines(path.sketch(samples), alone)) > 0.999999
    assert min(sketch_cosines(path.sketch(samples[::-1]), alone[::-1])) > 0.999999
    assert all(torch.equal(a.vector, b.vector) for a, b in zip(path.sketch(samples), path.sketch(samples), strict=True))


@pytest.mark.parametrize("name", ["Llama, untied", *MIXTURES])
def test_in_bfloat16_too(name):
    model = build_model(name).bfloat16()
    path, hooks, reason = paths(model)
    assert isinstance(path, BatchPath), reason
    samples = ragged_batch("text")
    assert min(sketch_cosines(path.sketch(samples), hooks.sketch(samples))) > 0.999


def test_unknown_layers_fall_back_to_hooks():
    model, samples = build_model("gpt-oss"), ragged_batch("text")
    exact = [exact_gradient(model, tokens) for tokens in samples]
    path, _, reason = paths(model)
    assert isinstance(path, HookPath)
    assert reason == "`model.layers.0.self_attn.sinks` is in a layer of kind GptOssAttention"
    sketches = path.sketch(samples)
    expected = [sketch_exact(item, 4096) for item in exact]
    for sketch, vector in zip(sketches, expected, strict=True):
        torch.testing.assert_close(sketch.vector / 64 * sketch.grad_norm, vector, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("odd", [SharedWeight, MixesSamples])
def test_incomplete_layer_gradients_are_detected(odd):
    model = build_model("Llama, tied")
    model.model.layers[1].mlp = odd()
    path, _, reason = paths(model)
    assert isinstance(path, HookPath)
    assert "do not add up" in reason


def test_parameters_with_tiny_gradients_are_kept():
    model = build_model("Llama, tied")
    model.model.layers[1].mlp = UncalledLayer()
    path, _, reason = paths(model)
    assert isinstance(path, HookPath)
    assert reason == "`model.layers.1.mlp.inner.weight` is used outside its layer"


@pytest.mark.parametrize("length", [4, 2])  # Gemma's heads, and key-value heads, stand where tokens do elsewhere
def test_heads_are_not_mistaken_for_tokens(length):
    path, hooks, _ = paths(build_model("Gemma-3"))
    samples = [random_tokens(0, n=length), random_tokens(1, n=2)]
    assert min(sketch_cosines(path.sketch(samples), hooks.sketch(samples))) > 0.99999


def test_gradient_checkpointing_disables_dropout():
    torch.manual_seed(0)
    config = hf.OPTConfig(
        vocab_size=300, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, ffn_dim=80, word_embed_proj_dim=48
    )
    assert config.dropout == 0.1
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    path, _, reason = paths(model)
    samples = ragged_batch("text")
    expected = path.sketch(samples)
    recompute_activations(model)
    assert min(sketch_cosines(path.sketch(samples), expected)) > 0.99999, reason


class OutOfMemory:
    """A device with memory for so many tokens of a batch."""

    def __init__(self, model: torch.nn.Module, tokens: int) -> None:
        self.tokens, self.tried = tokens, []
        model.model.layers[1].register_forward_pre_hook(self)

    def __call__(self, _, given):
        tokens = given[0].shape[0] * given[0].shape[1]
        self.tried.append(tokens)
        if tokens > self.tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_batch_is_halved_when_memory_runs_out():
    model = build_model("Llama, tied")
    path, hooks, _ = paths(model)
    device = OutOfMemory(model, 40)
    samples = ragged_batch("text")
    sketches = path.sketch(samples)
    assert device.tried[:2] == [96, 48]
    assert path.largest == 24
    assert min(sketch_cosines(sketches, hooks.sketch(samples))) > 0.9999


@pytest.mark.parametrize(
    "text",
    ["[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried", "MPS backend out of memory (9 GB)"],
)
def test_out_of_memory_is_recognised_on_other_devices(text):
    assert is_out_of_memory(RuntimeError(text))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_changed_layer_shape_fails_only_its_sample():
    model = build_model("Llama, untied")
    path, hooks, _ = paths(model)
    inner = model.model.layers[1].mlp.down_proj
    cut = torch.nn.Module.register_forward_pre_hook
    cut(inner, lambda _, given: (given[0].reshape(1, -1, 80),) if given[0].shape[1] > 20 else None)
    model.model.layers[1].mlp.register_forward_hook(
        lambda _m, given, out: out.reshape(given[0].shape) if out.shape != given[0].shape else None
    )
    samples = [random_tokens(0, n=9), random_tokens(1, n=9)]
    assert min(sketch_cosines(path.sketch(samples), hooks.sketch(samples))) > 0.9999
    sketches = path.sketch([random_tokens(2, n=24), random_tokens(3, n=9)])
    assert isinstance(sketches[1], Sketch)


def test_too_large_sample_fails_alone():
    model = build_model("Llama, tied")
    path, hooks, _ = paths(model)
    OutOfMemory(model, 20)
    samples = ragged_batch("text")
    sketches = path.sketch(samples)
    assert [isinstance(one, UnusableSampleError) for one in sketches] == [False, True, False, False]
    assert "out of memory" in str(sketches[1])
    kept = [0, 2, 3]
    assert min(sketch_cosines([sketches[i] for i in kept], hooks.sketch([samples[i] for i in kept]))) > 0.9999


@pytest.mark.parametrize("bad", [[0], [1], [3], [0, 2], [1, 2, 3], [0, 1, 2, 3]])
def test_unknown_token_fails_its_sample_before_the_forward_pass(bad):
    """On a GPU such a token would break every later sample too."""
    model = build_model("GPT-2")
    path, hooks, _ = paths(model)
    samples, seen = ragged_batch("text"), []
    for i in bad:
        samples[i] = Tokens([1, 2, 300 + i], [False, True, True], "text")
    model.get_input_embeddings().register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    sketches = path.sketch(samples)
    good = [i for i in range(4) if i not in bad]
    assert [str(sketches[i]) for i in bad] == [f"token {300 + i} is outside the model's vocabulary of 300" for i in bad]
    assert [len(ids) for ids in seen] == [len(good)] * bool(good)
    assert all(int(ids.max()) < 300 for ids in seen)
    right = hooks.sketch([samples[i] for i in good])
    assert all(value > 0.9999 for value in sketch_cosines([sketches[i] for i in good], right))


def test_nonfinite_gradient_fails_only_its_sample():
    model = build_model("Llama, untied")
    path, hooks, _ = paths(model)
    samples = [random_tokens(i, n=12) for i in range(3)]
    samples[1] = Tokens([299, *samples[1].input_ids[1:]], samples[1].is_target, "text")
    assert all(299 not in samples[i].input_ids for i in (0, 2))
    model.model.embed_tokens.weight.data[299] = float("nan")
    first, bad, third = path.sketch(samples)
    assert isinstance(bad, UnusableSampleError)
    assert "not finite" in str(bad)
    assert min(sketch_cosines([first, third], hooks.sketch([samples[0], samples[2]]))) > 0.9999


def test_backward_stops_below_the_last_sketched_layer():
    model = build_model("Llama, untied")
    chosen = choose_parameters(model, r"layers\.1\.|norm", r"layers\.0\.")
    path = BatchPath(
        model, chosen, GradientSketcher(Oporp(256, 0), place([(n, tuple(p.shape)) for n, p in chosen], 256), CPU)
    )
    graphs = []
    model.model.layers[0].register_forward_hook(lambda _m, _i, out: graphs.append(out.requires_grad))
    assert isinstance(path.sketch(ragged_batch("text"))[0], Sketch)
    assert graphs == [False]
