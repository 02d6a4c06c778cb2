"""Facts over two stages of training: multi-stage influence against one stage, GDP, RepSim and BM25.

The first stage trains on statements of facts, the second on questions about some of them. The other facts are then
asked as questions: does a score find the statements of the first stage? Multi-stage influence takes the statements'
gradients after the first stage and the questions' after the second, each in its own curvature, at several dampings.
The table is `lark-store evaluate facts --rerank` (docs/results/multistage.md).

    python benchmarks/multistage_facts.py FACTS.jsonl FOLDER --model MODEL_FOLDER

FACTS.jsonl is the input of facts.py. Without `--model`, a random GPT-NeoX with 98,304 sketched weights is trained: a
quick trial of the steps, not of the scores. Running it again continues.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from facts import read, statements
from inverse import small_model

from lark_store import Store
from lark_store.evaluate.dataset import gather, load
from lark_store.evaluate.retrain import Start, train
from lark_store.modeling.losses import losses
from lark_store.specs import TrainingSpec

FIRST, SECOND = "pretrained", "tuned"
LINEAR = {"parameters": r"layers\..*weight", "min_ndim": 2, "dtype": "float32"}  # the parameters of ekfac
TEXT, ANSWER = "text", "answer"  # variants: the loss on all of a statement, or on a question's answer


def questions(facts: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Return a question per fact."""
    return [
        {
            "id": f["id"],
            "prompt": f["query"],
            "response": f" {f['answer']}",
            "fact": f["id"],
            "relation": f["relation"],
        }
        for f in facts
    ]


def write_facts(options: argparse.Namespace) -> list[str]:
    """Write all statements, the questions of the second stage and the queries; return the statements."""
    everything = read(options.facts)
    drawn = random.Random(options.seed).sample(everything, min(options.n_facts, len(everything)))  # noqa: S311
    asked, tuning = drawn[: options.queries], drawn[options.queries :][: options.tuning]
    rows = {"statements": statements(drawn), "questions": questions(tuning), "queries": questions(asked)}
    for name, part in rows.items():
        lines = [json.dumps(row, ensure_ascii=False) for row in part]
        (options.folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return [row["text"] for row in rows["statements"]]


def add_data(store: Store, folder: Path) -> None:
    """Add the sources and their variants; running it again changes nothing."""
    for name, stage in (("statements", "pretrain"), ("questions", "finetune"), ("queries", "query")):
        store.source_add(name, folder / f"{name}.jsonl", stage=stage)
    store.variant_add(TEXT, template="raw", targets="text", max_length=128)
    store.variant_add(ANSWER, template="raw", targets="response", max_length=128)


def train_stages(store: Store, base: Path, options: argparse.Namespace) -> None:
    """Train both stages one after the other, and add a checkpoint after each."""
    folders = [options.folder / name for name in (FIRST, SECOND)]
    if not all((folder / "config.json").exists() for folder in folders):
        store.checkpoint_add("base", base)
        loaded, shared = load(store, "base", options.device), {"queries": "queries", "query_variant": ANSWER}
        stages = [
            gather(store, sources=[source], variants=[variant], **shared)
            for source, variant in (("statements", TEXT), ("questions", ANSWER))
        ]
        queries = loaded.tokens(stages[0].queries)
        for folder, material, epochs in zip(folders, stages, options.epochs, strict=True):
            recipe = TrainingSpec(epochs=epochs, learning_rate=options.learning_rate, batch_size=16)
            train(Start(loaded.model), loaded.tokens(material.samples), recipe, [options.seed])
            loaded.model.save_pretrained(folder)
            loaded.tokenizer.save_pretrained(folder)
            print(f"{folder.name}: the queries' mean loss is {losses(loaded.model, queries).mean():.2f} nats")
    for epoch, folder in enumerate(folders):
        store.checkpoint_add(folder.name, folder, epoch=epoch)


def sketch(store: Store, options: argparse.Namespace) -> None:
    """Fit each checkpoint's curvature to its own stage's training data, and sketch."""
    for checkpoint, source, variant in ((FIRST, "statements", TEXT), (SECOND, "questions", ANSWER)):
        store.correction_fit(
            checkpoint, kind="ekfac", sources=[source], variant=variant, samples=500, device=options.device
        )
    sketchers: dict[str, dict[str, Any]] = {"plain": LINEAR}
    for damping in options.damping:
        ekfac = {"correction": "ekfac", "damping": damping, "dtype": "float32"}
        sketchers |= {f"one-{damping:g}": ekfac, f"two-{damping:g}": ekfac | {"power": 1}}
    for name, settings in sketchers.items():
        store.sketcher_add(name, **settings)
        samples_at = FIRST if name.startswith("two") else SECOND
        store.ingest([samples_at], ["statements"], [TEXT], sketcher=name, device=options.device)
        store.ingest([SECOND], ["queries"], [ANSWER], sketcher=name, device=options.device)


def command(options: argparse.Namespace) -> list[str]:
    """Return the command of the table."""
    scores = [f"two-{damping:g}:dot@{FIRST}>{SECOND}" for damping in options.damping]
    scores += [f"one-{damping:g}:dot@{SECOND}" for damping in options.damping]
    scores += [f"plain:dot@{SECOND}", f"repsim@{FIRST}>{SECOND}", "bm25-okapi", "random"]
    words: list[Any] = [word for score in scores for word in ("--score", score)]
    words += ["--key", "fact", "--at", 10, "--rerank", "--trials", options.trials]
    words += ["--source", "statements", "--variant", TEXT, "--query-variant", ANSWER, "--device", options.device]
    return ["evaluate", "facts", *map(str, [*words, "--out", options.folder / "table", "--format", "md"])]


def main() -> None:
    """Train, sketch and run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("facts", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", type=Path, help="the model before the first stage")
    parser.add_argument("--n-facts", type=int, default=480)
    parser.add_argument("--queries", type=int, default=200, help="facts that are asked")
    parser.add_argument(
        "--tuning", type=int, default=200, help="other facts, whose questions the second stage trains on"
    )
    parser.add_argument("--epochs", type=int, nargs=2, default=[4, 2], help="of the two stages")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--damping", type=float, nargs="+", default=[0.01, 0.1, 1, 10, 1000])
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    texts, place = write_facts(options), options.folder / "lark.store"
    base = options.model or options.folder / "random"
    if options.model is None and not (base / "config.json").exists():
        small_model(texts, base)
    with Store.open(place) if place.exists() else Store.create(place) as store:
        add_data(store, options.folder)
        train_stages(store, base, options)
        sketch(store, options)
    words = command(options)
    print(" ".join(["lark-store", *words]), flush=True)
    program = Path(sys.executable).with_name("lark-store")
    subprocess.run([program, "--store", str(place), *words], check=True)  # noqa: S603 (our own command)


if __name__ == "__main__":
    main()
