"""Batched per-sample gradients, against plain autograd one sample at a time."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from test_gradients import CPU, exact_gradient, sample

from lark_store.ingest.batched import BatchPath, UnknownLayerError, make_path
from lark_store.ingest.gradients import HookPath, Sketch, choose_parameters, recompute_activations
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


def model_of(name: str, **changes: object) -> torch.nn.Module:
    torch.manual_seed(0)
    config = CONFIGS[name]
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases start as ones and zeros: make each its own
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def ragged(rule: str) -> list[Tokens]:
    return [sample(i, n=n, rule=rule) for i, n in enumerate((9, 24, 3, 17))]


def parts(model, k=256, **options):
    chosen = choose_parameters(model, None, None)
    placements = place([(name, tuple(p.shape)) for name, p in chosen], k)
    return chosen, GradientSketcher(Oporp(k, 0), placements, CPU), options


class Whole(GradientSketcher):
    """Takes the gradients that a path makes as they are, unsketched."""

    def new(self, n=1):
        self.gradients = [{name: torch.zeros(p.numel, dtype=torch.float64) for name, p in self.placements.items()} for _ in range(n)]
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
                gradients[parameter].view_as(gradient).float(), gradient, rtol=1e-5, atol=1e-5 * scale, msg=lambda m: f"{parameter}: {m}"
            )
