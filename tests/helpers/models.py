"""Small random models of several architectures."""

from __future__ import annotations

import torch
import transformers as hf
from transformers import LlamaConfig, LlamaForCausalLM


def random_llama(seed: int = 0, *, tied: bool = True, hidden: int = 64, vocab: int = 300) -> LlamaForCausalLM:
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
MIXTURES = {
    "Mixtral": hf.MixtralConfig(**LLAMA_LIKE, num_local_experts=4, num_experts_per_tok=2),
    "OLMoE": hf.OlmoeConfig(**SMALL, intermediate_size=24, num_experts=8, num_experts_per_tok=2, eos_token_id=1),
    "Qwen-3 MoE": hf.Qwen3MoeConfig(
        **LLAMA_LIKE, head_dim=16, moe_intermediate_size=24, num_experts=8, num_experts_per_tok=3, norm_topk_prob=True
    ),
    "DeepSeek-V3": hf.DeepseekV3Config(
        **SMALL,
        num_key_value_heads=4,
        intermediate_size=40,
        moe_intermediate_size=24,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=3,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=12,
    ),
}
CONFIGS |= MIXTURES
GPT_OSS = hf.GptOssConfig(
    **SMALL, num_key_value_heads=2, head_dim=16, intermediate_size=24, num_local_experts=4, eos_token_id=1
)


def build_model(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    config = (CONFIGS | {"gpt-oss": GPT_OSS})[name]
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases start as ones and zeros: make each its own
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


class SharedWeight(torch.nn.Module):
    """Uses its linear layer's weight behind the layer's back."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(48, 48)

    def forward(self, x):
        return self.inner(x) + x @ self.inner.weight


class MixesSamples(torch.nn.Module):
    """Lets the samples of a batch see each other."""

    def forward(self, x):
        return x + x.mean(dim=0, keepdim=True)


class UncalledLayer(torch.nn.Module):
    """Has a linear layer which is never called and has a small share of the gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(48, 48, bias=False)

    def forward(self, x):
        return x + 1e-4 * (x @ self.inner.weight)
