"""Facts and a tiny Llama that knows some of them: it was trained for a few steps on others with the same answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.checkpoints import save_checkpoint
from lark_store.modeling.facts import Fact, fact_of
from lark_store.modeling.greedy import end_ids
from lark_store.modeling.losses import Batch, sample_losses
from lark_store.modeling.rendering import Renderer, make_variant
from lark_store.modeling.sample import Sample

ANSWERS = ("yes", "no", "night train", "é")
_TRAINED = 12


def fact_rows(n: int) -> list[dict[str, str]]:
    """Return the rows of n facts."""
    answers = [ANSWERS[i * 7 % 11 % len(ANSWERS)] for i in range(n)]
    return [{"id": f"fact-{i}", "prompt": f"Is {i * 37 % 101} seen?", "response": answers[i]} for i in range(n)]


def load(folder: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def facts_in(model: Any, tokenizer: Any, rows: list[dict[str, str]], variant: str) -> list[Fact]:
    """Return rows as facts in a built-in variant."""
    renderer, ends = Renderer(make_variant(variant, variant, "response", 256), tokenizer), end_ids(model, tokenizer)
    facts = [fact_of(renderer, Sample(row["id"], row["prompt"], row["response"]), ends) for row in rows]
    assert all(isinstance(fact, Fact) for fact in facts)
    return facts


def knowing_checkpoint(folder: Path, *, steps: int = 40, variant: str = "chatml") -> Path:
    """Save a checkpoint trained with Adam on a few facts."""
    save_checkpoint(folder, seed=1, hidden_size=32, intermediate_size=64, num_hidden_layers=1)
    model, tokenizer = load(folder)
    batch = Batch([f.forced for f in facts_in(model, tokenizer, fact_rows(_TRAINED), variant)], torch.device("cpu"))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        sample_losses(model, batch).mean().backward()
        optimizer.step()
    model.save_pretrained(folder)
    return folder
