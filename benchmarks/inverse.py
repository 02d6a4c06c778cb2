"""How near cheap scores come to the exact influence on a small model, as the multi-stage paper's Table 1 asks.

A small GPT-NeoX with random weights is trained on statements of facts; then scores, by sketches and by whole gradients,
are held against conjugate gradient with exact Gauss–Newton products, at three dampings. With `--kronfluence` its EK-FAC
is one of them, and ours are held against it too.

    python benchmarks/inverse.py FACTS.jsonl FOLDER [--kronfluence PYTHON]

FACTS.jsonl is what facts.py reads. PYTHON is that of kronfluence's own environment (README.md beside this file).
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from facts import read, statements
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from lark_store import Store, evaluate
from lark_store.evaluate.material import gather, load
from lark_store.evaluate.rivals.curvature import GaussNewton
from lark_store.evaluate.rivals.gradients import parameters_of
from lark_store.evaluate.training import Recipe, Start, losses, train
from lark_store.ingest.factors import corrector_for
from lark_store.ingest.sketchers import placements_of
from lark_store.schema.catalog import Checkpoint, Sketcher
from lark_store.schema.database import find

if TYPE_CHECKING:
    from lark_store.evaluate.material import Material

FACTS, VOCABULARY, DAMPINGS = 60, 1024, (0.1, 10, 1000)
SHAPE = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
LINEAR = {"parameters": r"layers\..*weight", "min_ndim": 2, "dtype": "float32"}  # what kfac and ekfac take
SKETCHERS: dict[str, dict[str, Any]] = {
    "linear": LINEAR,
    "adam-linear": LINEAR | {"correction": "adam"},
    "adam2-linear": LINEAR | {"correction": "adam2"},
}
SKETCHERS |= {
    f"{kind}-{damping}": {"dtype": "float32", "correction": kind, "damping": damping}
    for kind in ("kfac", "ekfac")
    for damping in DAMPINGS
}
RIVALS = ["cka:linear@m", "arnoldi:20,sketcher=linear@m", "trak:256,damping=0.1,sketcher=linear@m", "bm25", "random"]
HOW: dict[str, Any] = {"sources": ["finetune"], "variants": ["text"], "queries": "queries", "query_variant": "answer"}


def write_facts(source: Path, folder: Path) -> list[str]:
    """Write the samples, two statements of each fact, and a query of each; returns the statements."""
    drawn = random.Random(0).sample(read(source), FACTS)  # noqa: S311 (no secret)
    queries = [{"id": fact["id"], "prompt": fact["query"], "response": fact["answer"]} for fact in drawn]
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("finetune", statements(drawn)), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return [row["text"] for row in statements(drawn)]


def small_model(texts: list[str], folder: Path) -> None:
    """Save a random GPT-NeoX and a tokenizer of the texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<e>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    ends = {"bos_token": "<e>", "eos_token": "<e>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends).save_pretrained(folder)
    torch.manual_seed(0)
    config = GPTNeoXConfig(vocab_size=VOCABULARY, max_position_embeddings=128, **SHAPE)
    GPTNeoXForCausalLM(config).save_pretrained(folder)


def trained_store(facts: Path, folder: Path, epochs: int) -> Store:
    """Train the model on all statements and make a store of its last checkpoint, `m`."""
    small_model(write_facts(facts, folder), folder / "random")
    store = Store.create(folder / "lark.store")
    store.checkpoint_add("random", folder / "random")
    store.source_add("finetune", folder / "finetune.jsonl", stage="finetune")
    store.source_add("queries", folder / "queries.jsonl", stage="query")
    store.variant_add("text", template="raw", targets="text")  # `raw` takes the model's own predictions for labels
    store.variant_add("answer", template="raw", targets="response")
    loaded, material = load(store, "random", "cpu"), gather(store, **HOW)
    samples, queries = loaded.tokens(material.samples), loaded.tokens(material.queries)
    train(Start(loaded.model), samples, Recipe(epochs, learning_rate=3e-3, batch_size=16), [0])
    means = [float(losses(loaded.model, some).mean()) for some in (samples, queries)]
    print(f"after {epochs} epochs: the mean loss of samples is {means[0]:.2f} nats, of queries {means[1]:.2f}")
    loaded.model.save_pretrained(folder / "trained")
    loaded.tokenizer.save_pretrained(folder / "trained")
    store.checkpoint_add("m", folder / "trained")
    for kind in ("adam", "kfac", "ekfac"):
        store.correction_fit("m", kind=kind, variant="text")
    for name, settings in SKETCHERS.items():
        store.sketcher_add(name, **settings)
    for name in ("lark", *SKETCHERS):
        store.ingest(["m"], ["finetune"], ["text"], sketcher=name)
        store.ingest(["m"], ["queries"], ["answer"], sketcher=name)
    return store


def whole(store: Store, material: Material) -> dict[str, evaluate.Scorer]:
    """Return the dot products of whole gradients, corrected as each sketcher does, as scores by its name."""
    loaded, made = load(store, "m", "cpu"), {}
    held = parameters_of(store, loaded, "linear")
    texts = [*loaded.tokens(material.queries), *loaded.tokens(material.samples)]
    names, gradients, n = [name for name, _ in held.chosen], [held.parts(text) for text in texts], len(material.queries)
    for name in SKETCHERS:
        with store._db.session() as session:  # noqa: SLF001 - the factors have no public face
            checkpoint, sketcher = find(session, Checkpoint, "m"), find(session, Sketcher, name)
        placements = placements_of(sketcher, loaded.model)
        corrector, _ = corrector_for(store._db, sketcher, checkpoint, placements, held.device)  # noqa: SLF001
        parts = [[corrector.whole(*pair).flatten() for pair in zip(names, each, strict=True)] for each in gradients]
        corrected = torch.stack([torch.cat(each) for each in parts])
        matrix = (corrected[:n] @ corrected[n:].T).numpy()
        made[name] = evaluate.Scorer(f"{name}, whole", lambda _, matrix=matrix: matrix)  # type: ignore[misc]
    return made


def by_kronfluence(
    store: Store, python: str, folder: Path, material: Material, seed: int
) -> dict[float, evaluate.Scorer]:
    """Return kronfluence's EK-FAC as a score by damping, each with the λ of conjugate gradient; `seed` draws labels."""
    loaded = load(store, "m", "cpu")
    texts = {"queries": loaded.tokens(material.queries), "samples": loaded.tokens(material.samples)}
    rows = {k: [{"input_ids": t.input_ids, "is_target": t.is_target} for t in some] for k, some in texts.items()}
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    mean = GaussNewton(parameters_of(store, loaded, "linear"), texts["samples"]).diagonal_mean(0)
    script, out = Path(__file__).with_name("kronfluence_scores.py"), folder / "kronfluence.npy"
    command = [python, script, folder / "trained", folder / "rows.json", out, "--seed", seed]
    command += ["--damping", *(damping * mean for damping in DAMPINGS)]
    subprocess.run([str(word) for word in command], check=True)  # noqa: S603 (the user's own Python)
    matrices = dict(zip(DAMPINGS, np.load(out), strict=True))
    name = "kronfluence" if seed == 0 else "kronfluence, labels drawn anew"
    return {x: evaluate.Scorer(name, lambda _, matrix=matrix: matrix) for x, matrix in matrices.items()}  # type: ignore[misc]


def show(store: Store, scores: list[Any], reference: Any, **options: Any) -> None:
    """Print the mean rank correlations of scores with a reference."""
    started = time.perf_counter()
    found = evaluate.spearman(store, scores, reference=reference, device="cpu", **options)
    name = reference if isinstance(reference, str) else reference.name
    print(f"\nagainst {name}: {time.perf_counter() - started:.0f} s", *found.notes, sep="\n")
    for row in found.table.iter_rows(named=True):
        print(f"{row['method']:<40} {row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]", flush=True)


def main() -> None:
    """Train, score, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("facts", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--queries", type=int, default=16)
    parser.add_argument("--tolerance", type=float, default=0.03, help="of conjugate gradient")
    parser.add_argument("--kronfluence", metavar="PYTHON")
    asked = parser.parse_args()
    how = HOW | {"max_queries": asked.queries}
    with trained_store(asked.facts, asked.folder, asked.epochs) as store:
        material = gather(store, **how)
        theirs: list[dict[float, evaluate.Scorer]] = []
        if asked.kronfluence:
            theirs = [by_kronfluence(store, asked.kronfluence, asked.folder, material, seed) for seed in (0, 1)]
        exact, how["out"] = whole(store, material), asked.folder / "out"
        for damping in DAMPINGS:
            names = ["linear", "adam-linear", "adam2-linear", f"kfac-{damping}", f"ekfac-{damping}"]
            ours = [each for name in names for each in (f"{name}:dot@m", exact[name])]
            held = [each[damping] for each in theirs]
            if held:
                show(store, [*ours, *held[1:]], held[0], **how)
            scores = ["lark:cosine@m", "lark:dot@m", *ours, *held[:1], *RIVALS]
            show(store, scores, f"cg:{damping},sketcher=linear,tolerance={asked.tolerance}@m", **how)


if __name__ == "__main__":
    main()
