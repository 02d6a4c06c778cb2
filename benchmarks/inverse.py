"""Compare cheap scores with the exact influence on a small model, as in Table 1 of the multi-stage paper.

Trains a small random GPT-NeoX on statements of facts, then compares scores, from sketches and from full gradients, with
conjugate gradient with exact Gauss–Newton products, at three dampings. `--kronfluence` adds its EK-FAC, both as a score
and as a reference for ours.

    python benchmarks/inverse.py FACTS.jsonl FOLDER [--kronfluence PYTHON]

FACTS.jsonl is the input of facts.py. PYTHON is the interpreter of kronfluence's environment (see README.md).
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
from lark_store.evaluate.baselines.full_gradients import parameters_of
from lark_store.evaluate.baselines.gauss_newton import GaussNewton
from lark_store.evaluate.dataset import gather, load
from lark_store.evaluate.retrain import Start, train
from lark_store.gradients.sketch.layout import placements_of
from lark_store.ingest.correction_store import corrector_for
from lark_store.modeling.losses import losses
from lark_store.schema.catalog import Checkpoint, Sketcher
from lark_store.schema.database import find
from lark_store.specs import TrainingSpec

if TYPE_CHECKING:
    from lark_store.evaluate.dataset import Material

FACTS, VOCABULARY, DAMPINGS = 60, 1024, (0.1, 10, 1000)
SHAPE = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
LINEAR = {"parameters": r"layers\..*weight", "min_ndim": 2, "dtype": "float32"}  # the parameters of kfac and ekfac
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
BASELINES = ["cka:linear@m", "arnoldi:20,sketcher=linear@m", "trak:256,damping=0.1,sketcher=linear@m", "bm25", "random"]
DATA: dict[str, Any] = {"sources": ["finetune"], "variants": ["text"], "queries": "queries", "query_variant": "answer"}


def write_facts(source: Path, folder: Path) -> list[str]:
    """Write the samples, two statements per fact, and a query per fact; return the statements."""
    drawn = random.Random(0).sample(read(source), FACTS)  # noqa: S311 (no secret)
    queries = [{"id": fact["id"], "prompt": fact["query"], "response": fact["answer"]} for fact in drawn]
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("finetune", statements(drawn)), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return [row["text"] for row in statements(drawn)]


def small_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer trained on the texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=["<e>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    ends = {"bos_token": "<e>", "eos_token": "<e>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends)


def small_model(texts: list[str], folder: Path) -> None:
    """Save a random GPT-NeoX and a tokenizer trained on the texts."""
    small_tokenizer(texts, VOCABULARY).save_pretrained(folder)
    torch.manual_seed(0)
    config = GPTNeoXConfig(vocab_size=VOCABULARY, max_position_embeddings=128, **SHAPE)
    GPTNeoXForCausalLM(config).save_pretrained(folder)


def trained_store(facts: Path, folder: Path, epochs: int) -> Store:
    """Train the model on all statements and create a store with its last checkpoint, `m`."""
    small_model(write_facts(facts, folder), folder / "random")
    store = Store.create(folder / "lark.store")
    store.checkpoint_add("random", folder / "random")
    store.source_add("finetune", folder / "finetune.jsonl", stage="finetune")
    store.source_add("queries", folder / "queries.jsonl", stage="query")
    store.variant_add("text", template="raw", targets="text")  # `raw` uses the model's own predictions as labels
    store.variant_add("answer", template="raw", targets="response")
    loaded, material = load(store, "random", "cpu"), gather(store, **DATA)
    samples, queries = loaded.tokens(material.samples), loaded.tokens(material.queries)
    train(Start(loaded.model), samples, TrainingSpec(epochs=epochs, learning_rate=3e-3, batch_size=16), [0])
    means = [float(losses(loaded.model, tokens).mean()) for tokens in (samples, queries)]
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
    """Return the dot products of full gradients, corrected like each sketcher, as scorers by sketcher."""
    loaded, scorers = load(store, "m", "cpu"), {}
    parameters = parameters_of(store, loaded, "linear")
    texts = [*loaded.tokens(material.queries), *loaded.tokens(material.samples)]
    names, n = [name for name, _ in parameters.chosen], len(material.queries)
    gradients = [parameters.parts(text) for text in texts]
    for name in SKETCHERS:
        with store._db.session() as session:  # noqa: SLF001 - there is no public API for factors
            checkpoint, sketcher = find(session, Checkpoint, "m"), find(session, Sketcher, name)
        placements = placements_of(sketcher, loaded.model)
        corrector, _ = corrector_for(store._db, sketcher, checkpoint, placements, parameters.device)  # noqa: SLF001
        parts = [[corrector.whole(*pair).flatten() for pair in zip(names, g, strict=True)] for g in gradients]
        corrected = torch.stack([torch.cat(g) for g in parts])
        matrix = (corrected[:n] @ corrected[n:].T).numpy()
        scorers[name] = evaluate.Scorer(f"{name}, whole", lambda _, matrix=matrix: matrix)  # type: ignore[misc]
    return scorers


def by_kronfluence(
    store: Store, python: str, folder: Path, material: Material, seed: int
) -> dict[float, evaluate.Scorer]:
    """Return kronfluence's EK-FAC as a scorer by damping, with the λ of conjugate gradient; `seed` draws labels."""
    loaded = load(store, "m", "cpu")
    texts = {"queries": loaded.tokens(material.queries), "samples": loaded.tokens(material.samples)}
    rows = {k: [{"input_ids": t.input_ids, "is_target": t.is_target} for t in tokens] for k, tokens in texts.items()}
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
    outcome = evaluate.spearman(store, scores, reference=reference, device="cpu", **options)
    name = reference if isinstance(reference, str) else reference.name
    print(f"\nagainst {name}: {time.perf_counter() - started:.0f} s", *outcome.notes, sep="\n")
    for row in outcome.table.iter_rows(named=True):
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
    options = parser.parse_args()
    settings = DATA | {"max_queries": options.queries}
    with trained_store(options.facts, options.folder, options.epochs) as store:
        material = gather(store, **settings)
        kronfluence: list[dict[float, evaluate.Scorer]] = []
        if options.kronfluence:
            kronfluence = [by_kronfluence(store, options.kronfluence, options.folder, material, s) for s in (0, 1)]
        exact, settings["out"] = whole(store, material), options.folder / "out"
        for damping in DAMPINGS:
            names = ["linear", "adam-linear", "adam2-linear", f"kfac-{damping}", f"ekfac-{damping}"]
            lark_scores = [item for name in names for item in (f"{name}:dot@m", exact[name])]
            references = [item[damping] for item in kronfluence]
            if references:
                show(store, [*lark_scores, *references[1:]], references[0], **settings)
            scores = ["lark:cosine@m", "lark:dot@m", *lark_scores, *references[:1], *BASELINES]
            show(store, scores, f"cg:{damping},sketcher=linear,tolerance={options.tolerance}@m", **settings)


if __name__ == "__main__":
    main()
