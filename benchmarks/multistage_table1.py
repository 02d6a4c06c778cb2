"""Table 1 of the multi-stage paper on a small GPT-NeoX trained here: agreement with the exact influence, and times.

Trains a random model with hidden size 256 on short windows of real text, creates a store with its checkpoint `m`, and
runs `lark-store evaluate spearman` with every method of the table (docs/results/multistage.md).

    python benchmarks/multistage_table1.py TEXTS.jsonl FOLDER --trials 10

TEXTS.jsonl has a `text` per row. Running it again reuses the store and the scores in FOLDER. The paper's scale is
`--trials 10 --layers 4 --curvature 500` and takes many hours on CPUs.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import polars as pl
import torch
from facts import read
from inverse import small_tokenizer
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from lark_store import Store

HIDDEN, HEADS, VOCABULARY, MAX_LENGTH = 256, 4, 1024, 32
NAME = "table1"  # of the evaluation and its files
WORDS, POOL, QUERIES, BATCH = 10, 1000, 100, 32
LINEAR = {"parameters": r"layers\..*weight", "min_ndim": 2, "dtype": "float32"}  # of MLP and attention
MLP = LINEAR | {"parameters": r"layers\..*mlp.*weight"}

PAPER = {  # by the start of a score's name: the method, and the paper's Spearman, overhead and pair-wise time
    "lissa": ("LiSSA", ".518", "–", "1.25 h"),
    "gdp": ("GDP", ".219", "–", "5.8 s"),
    "cka": ("CKA", ".184", "–", "6.4 s"),
    "arnoldi": ("Arnoldi", ".071", "3.4 h", ""),
    "trak": ("TRAK", ".013", "18.6 h", ""),
    "ekfac-full": ("EK-FAC", ".612", "1.17 h", "3.6 s"),
    "ekfac-sketch": ("EK-FAC, sketched", "", "", ""),
    "random": ("random", "", "", ""),
    "cg": ("conjugate gradient", "the reference", "", ""),
}


def windows(path: Path) -> list[str]:
    """Return windows of `WORDS` words of all texts, shuffled."""
    texts = []
    for row in read(path):
        words = row["text"].split()
        texts += [" ".join(words[i : i + WORDS]) for i in range(0, len(words) - WORDS + 1, WORDS)]
    texts = list(dict.fromkeys(texts))
    random.Random(0).shuffle(texts)  # noqa: S311 (no secret)
    return texts


def trained(texts: list[str], folder: Path, options: argparse.Namespace) -> float:
    """Train a random model for some minutes, save it with its tokenizer, and return its last mean loss in nats."""
    tokenizer = small_tokenizer(texts, VOCABULARY)
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        num_hidden_layers=options.layers,
        num_attention_heads=HEADS,
        max_position_embeddings=2 * MAX_LENGTH,
    )
    model = GPTNeoXForCausalLM(config)
    optimizer, rng = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.01), random.Random(0)  # noqa: S311
    tokenizer.pad_token = tokenizer.eos_token
    started, recent = time.perf_counter(), [0.0]
    while time.perf_counter() - started < 60 * options.minutes:
        batch = tokenizer(
            rng.sample(texts, BATCH), padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt"
        )
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        recent = [*recent[-49:], float(loss.detach())]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(recent) / len(recent)


def fill(store: Store, folder: Path, texts: list[str], options: argparse.Namespace) -> None:
    """Add the checkpoint, the candidates (trained on) and the queries (not trained on), and sketch them by EK-FAC."""
    store.checkpoint_add("m", folder / "model")
    for name, stage, part in (
        ("train", "finetune", texts[QUERIES : QUERIES + POOL]),
        ("queries", "query", texts[:QUERIES]),
    ):
        rows = [{"id": f"{name}-{i}", "text": text} for i, text in enumerate(part)]
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        store.source_add(name, folder / f"{name}.jsonl", stage=stage)
    store.variant_add("text", template="raw", targets="text", max_length=MAX_LENGTH)
    store.sketcher_add("linear", **LINEAR)
    store.sketcher_add("mlp", **MLP)
    store.sketcher_add("ekfac-sketch", correction="ekfac", damping=options.damping, dtype="float32")
    store.correction_fit("m", kind="ekfac", variant="text", samples=options.curvature)
    store.ingest(["m"], ["train", "queries"], ["text"], sketcher="ekfac-sketch")


def command(options: argparse.Namespace) -> list[str]:
    """Return the command of the table."""
    curvature = f"samples={options.curvature}"
    scores = [
        f"ekfac-full:{options.damping},{curvature},sketcher=linear@m",
        f"ekfac-full:{options.damping},{curvature},sketcher=mlp@m",
        "ekfac-sketch:dot@m",
        f"lissa:{options.damping},change={options.change},steps=5000,{curvature},sketcher=linear@m",
        "gdp:linear@m",
        "cka:linear@m",
        f"arnoldi:20,{curvature},sketcher=linear@m",
        "trak:256,damping=0.1,sketcher=linear@m",
        "random",
    ]
    reference = f"cg:{options.damping},tolerance={options.tolerance},{curvature},sketcher=linear@m"
    words: list[Any] = [word for score in scores for word in ("--score", score)]
    words += ["--reference", reference, "--trials", options.trials, "--max-queries", options.queries]
    words += ["--max-samples", options.candidates, "--source", "train", "--variant", "text", "--query-variant", "text"]
    words += ["--device", "cpu", "--out", options.folder / "table", "--format", "md", "--name", NAME]
    return ["evaluate", "spearman", *map(str, words)]


def side_by_side(path: Path) -> str:
    """Return the table as Markdown, with the paper's figures beside ours, from the CSV file of an evaluation."""
    measures: dict[str, dict[str, Any]] = {}
    for row in pl.read_csv(path).iter_rows(named=True):
        measures.setdefault(row["method"], {})[row["measure"]] = row
    head = ["method", "Spearman, paper", "ours [95%]", "sd of trials"]
    head += ["overhead, paper", "ours, s", "pair-wise, paper", "ours, s"]
    lines = [head, ["---"] * len(head)]
    for name, of in measures.items():
        method, rho, overhead, pairs = PAPER[name.partition(":")[0].partition("@")[0]]
        if "sketcher=mlp" in name:
            method, rho, overhead, pairs = f"{method} of the MLP", ".523", "", ""
        own = of.get("spearman")
        ours = f"{own['value']:.3f} [{own['low']:.3f}, {own['high']:.3f}]" if own else ""
        spread = f"{own['trial_sd']:.3f}" if own and own.get("trial_sd") is not None else ""
        times = [f"{of[f'{part}_seconds']['value']:.3g}" for part in ("overhead", "pairwise")]
        lines.append([method, rho, ours, spread, overhead, times[0], pairs, times[1]])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> None:
    """Train, fill the store, and run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=3, help="of training")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--curvature", type=int, default=64, help="samples of G")
    parser.add_argument("--damping", type=float, default=100, help="λ over the mean of G's diagonal")
    parser.add_argument("--tolerance", type=float, default=0.01, help="of conjugate gradient's residual")
    parser.add_argument("--change", type=float, default=1e-3, help="of LiSSA's solution in its last step")
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--queries", type=int, default=10, help="per trial")
    parser.add_argument("--candidates", type=int, default=500, help="per trial")
    options = parser.parse_args()
    texts, place = windows(options.texts), options.folder / "lark.store"
    options.folder.mkdir(parents=True, exist_ok=True)
    if not (options.folder / "model" / "config.json").exists():
        loss = trained(texts[QUERIES:], options.folder / "model", options)
        print(f"trained for {options.minutes:g} minutes: mean loss {loss:.2f} nats", flush=True)
    started = time.perf_counter()
    with Store.open(place) if place.exists() else Store.create(place) as store:
        fill(store, options.folder, texts, options)
    print(f"filled the store: {time.perf_counter() - started:.0f} s", flush=True)
    words = command(options)
    print(" ".join(["lark-store", *words]), flush=True)
    started = time.perf_counter()
    program = Path(sys.executable).with_name("lark-store")
    subprocess.run([program, "--store", str(place), *words], check=True)  # noqa: S603 (our own command)
    print(side_by_side(options.folder / "table" / f"{NAME}.csv"))
    print(f"evaluated: {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
