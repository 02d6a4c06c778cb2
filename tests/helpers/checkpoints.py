"""A tiny random Llama with a real tokenizer, saved as a trainer would save it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

TEMPLATE = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
WORDS = (
    "is the kidney affected by this disease yes no maybe often never seen in most patients a song about the sea and "
    "the night train to the old harbour Context Question Answer user assistant"
)


def save_tokenizer(folder: Path, *, chat_template: str | None = TEMPLATE) -> None:
    """Save a byte-level BPE tokenizer: any text comes back from it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    fast.chat_template = chat_template
    fast.save_pretrained(folder)


def save_checkpoint(folder: Path, *, seed: int = 0, chat_template: str | None = TEMPLATE, **config: object) -> Path:
    """Save a random Llama and its tokenizer as a trainer would."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape = {
        "vocab_size": 384,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "initializer_range": 0.1,
    }
    LlamaForCausalLM(LlamaConfig(**(shape | config))).save_pretrained(folder)
    save_tokenizer(folder, chat_template=chat_template)
    return folder


def save_lora(folder: Path, base: Path, *, seed: int = 0, tokenizer: bool = False, **config: object):
    """Save LoRA adapters with random weights on a base model; returns the saved model."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(seed)
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | config
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    model.save_pretrained(folder)
    if tokenizer:
        save_tokenizer(folder)
    return model.eval()


def sharded(change=lambda _: None):
    def make(folder):
        from transformers import LlamaForCausalLM

        model = LlamaForCausalLM.from_pretrained(folder)
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder, max_shard_size="100KB")
        change(folder)

    return make


def shards_at(target):
    def change(folder):
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        index["weight_map"] = dict.fromkeys(index["weight_map"], target)
        path.write_text(json.dumps(index))

    return change
