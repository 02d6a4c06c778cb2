"""How near cheap scores come to the exact influence on a small model, as the multi-stage paper's Table 1 asks.

A small GPT-NeoX or Llama with random weights is trained on statements of facts for some epochs; then scores are held
against conjugate gradient with exact Gauss–Newton products. With `--kronfluence` its EK-FAC is one of them.

    python benchmarks/inverse.py FACTS.jsonl FOLDER [--kind llama] [--kronfluence PYTHON]

FACTS.jsonl is what facts.py reads. PYTHON is that of kronfluence's own environment (README.md beside this file).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import torch
from facts import main as write_facts
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lark_store import Store, evaluate
from lark_store.evaluate.material import gather, load
from lark_store.evaluate.rivals.curvature import GaussNewton
from lark_store.evaluate.rivals.gradients import parameters_of
from lark_store.evaluate.training import Recipe, Start, train

if TYPE_CHECKING:
    from lark_store.evaluate.material import Material

DAMPING = 0.1
SHAPE = {"vocab_size": 1024, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2}
SCORES = ["lark:dot@m", "linear:dot@m", "kfac:dot@m", "ekfac:dot@m", "cka:ekfac@m", "arnoldi:20,sketcher=ekfac@m"]


def small_model(kind: str, texts: list[str], folder: Path) -> None:
    """Save a random model and a tokenizer of the texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1024, special_tokens=["<e>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    ends = {"bos_token": "<e>", "eos_token": "<e>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends).save_pretrained(folder)
    torch.manual_seed(0)
    shape: dict[str, Any] = SHAPE | {"num_attention_heads": 4, "max_position_embeddings": 128}
    made = GPTNeoXForCausalLM(GPTNeoXConfig(**shape)) if kind == "neox" else LlamaForCausalLM(LlamaConfig(**shape))
    made.save_pretrained(folder)


def trained_store(kind: str, facts: Path, folder: Path, epochs: int) -> Store:
    """Train the model on all statements and make a store of its last checkpoint."""
    write_facts(facts, folder)
    rows = pl.read_ndjson(folder / "finetune.jsonl")
    small_model(kind, rows["text"].to_list(), folder / "random")
    store = Store.create(folder / "lark.store")
    store.checkpoint_add("random", folder / "random")
    store.source_add("finetune", folder / "finetune.jsonl", stage="finetune")
    store.source_add("queries", folder / "queries.jsonl", stage="query")
    loaded = load(store, "random", "cpu")
    samples = loaded.tokens(material_of(store).samples)
    train(Start(loaded.model), samples, Recipe(epochs, learning_rate=3e-3, batch_size=16), [0])
    loaded.model.save_pretrained(folder / "trained")
    loaded.tokenizer.save_pretrained(folder / "trained")
    store.checkpoint_add("m", folder / "trained")
    store.sketcher_add("linear", dtype="float32", parameters=r"layers\..*weight", min_ndim=2)
    for correction in ("kfac", "ekfac"):
        store.sketcher_add(correction, dtype="float32", correction=correction, damping=DAMPING)
    for sketcher in ("lark", "linear", "kfac", "ekfac"):
        store.ingest(["m"], ["finetune", "queries"], ["raw"], sketcher=sketcher)
    return store


def material_of(store: Store, n: int | None = None) -> Material:
    """Return the first queries, and all statements."""
    return gather(store, sources=["finetune"], variants=["raw"], queries="queries", query_variant="raw", max_queries=n)


def by_kronfluence(store: Store, python: str, folder: Path, n: int) -> evaluate.Scorer:
    """Return kronfluence's EK-FAC as a score, with the λ of conjugate gradient."""
    loaded, material = load(store, "m", "cpu"), material_of(store, n)
    texts = {"queries": loaded.tokens(material.queries), "samples": loaded.tokens(material.samples)}
    rows = {k: [{"input_ids": t.input_ids, "is_target": t.is_target} for t in some] for k, some in texts.items()}
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    ridge = DAMPING * GaussNewton(parameters_of(store, loaded, "ekfac"), texts["samples"]).diagonal_mean(0)
    script, out = Path(__file__).with_name("kronfluence_scores.py"), folder / "kronfluence.npy"
    command = [python, script, folder / "trained", folder / "rows.json", out, "--damping", str(ridge)]
    subprocess.run([str(word) for word in command], check=True)  # noqa: S603 (the user's own Python)
    return evaluate.Scorer("kronfluence ekfac", lambda _: np.load(out))


def main() -> None:
    """Train, score, and print the table of mean rank correlations with conjugate gradient."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("facts", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kind", choices=["neox", "llama"], default="neox")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--queries", type=int, default=6)
    parser.add_argument("--kronfluence", metavar="PYTHON")
    asked = parser.parse_args()
    with trained_store(asked.kind, asked.facts, asked.folder, asked.epochs) as store:
        scores: list[Any] = list(SCORES)
        if asked.kronfluence:
            scores.append(by_kronfluence(store, asked.kronfluence, asked.folder, asked.queries))
        how = {"variants": ["raw"], "query_variant": "raw", "max_queries": asked.queries, "out": asked.folder / "out"}
        tables: list[tuple[Any, list[Any]]] = [(f"cg:{DAMPING},sketcher=ekfac@m", scores)]
        if asked.kronfluence:
            tables.append((scores[-1], [name for name in scores[:-1] if "fac:" in name]))
        for reference, some in tables:
            found = evaluate.spearman(store, some, reference=reference, device="cpu", **how)
            print(f"against {reference if isinstance(reference, str) else reference.name}")
            print(found.table.select("method", "value", "low", "high"), *found.notes, sep="\n")


if __name__ == "__main__":
    sys.exit(main())
