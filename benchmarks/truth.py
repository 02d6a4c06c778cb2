"""Which score is true on a small model: all evaluations side by side (docs/results/truth.md).

    python benchmarks/truth.py FACTS.jsonl MODEL_FOLDER OUT --facts 60 --half-sets 40

FACTS.jsonl is what benchmarks/facts.py reads; MODEL_FOLDER is the model before fine-tuning. The statements of --facts
facts are trained on, once and twice over (checkpoints base, epoch-1, epoch-2); those of --others facts are candidates
that were never trained on. Every step goes on where it was stopped: run the same command again.

`--evaluate whole` is `causal` once more for --asked queries, by the cosine of whole gradients of weight matrices and of
their sketches: what sketching costs. It holds the queries' gradients, 0.54 GB each of SmolLM2-135M.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from facts import read, statements

from lark_store import Store, evaluate
from lark_store.evaluate.material import load
from lark_store.evaluate.training import Recipe, Start, losses, train
from lark_store.ingest.corrections import Corrector
from lark_store.ingest.factors import corrector_for
from lark_store.ingest.gradients import pick_device
from lark_store.ingest.losses import Batch, sample_losses
from lark_store.ingest.models import load_model, load_tokenizer
from lark_store.ingest.sketchers import placements_of
from lark_store.ingest.sources import Sample
from lark_store.ingest.variants import Renderer, make_variant
from lark_store.schema.catalog import Checkpoint, Sketcher
from lark_store.schema.database import find

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

SKETCHERS: dict[str, dict[str, Any]] = {
    "linear": {"min_ndim": 2},
    "masked": {"min_ndim": 2, "mask_template": True},
    "tensor": {"correction": "tensor"},
    "adam": {"correction": "adam", "min_ndim": 2, "mask_template": True},  # as every store has it
    "adam-unmasked": {"correction": "adam", "min_ndim": 2},
    "adam-262k": {"correction": "adam", "min_ndim": 2, "k": 262_144},
    "adam-1m": {"correction": "adam", "min_ndim": 2, "k": 1_048_576},
    "adam2": {"correction": "adam2", "min_ndim": 2, "mask_template": True},
    "kfac": {"correction": "kfac"},
    "ekfac": {"correction": "ekfac"},
}
RATE = 1e-4
TEXT, ANSWER = "text", "answer"  # variants: the loss on all tokens of a statement, on the answer's of a query


def write(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Write rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def data(options: argparse.Namespace) -> dict[str, Path]:
    """Draw facts; returns the files of statements that are trained on, of others, and of queries."""
    everything = read(options.facts_file)
    drawn = random.Random(options.seed).sample(everything, options.facts + options.others)  # noqa: S311 (no secret)
    trained, others = drawn[: options.facts], drawn[options.facts :]
    queries = [
        {"id": f["id"], "prompt": f["query"], "response": f["answer"], "fact": f["id"], "relation": f["relation"]}
        for f in trained
    ]
    rows = {"finetune": statements(trained), "others": statements(others), "queries": queries}
    return {name: write(options.out / "data" / f"{name}.jsonl", some) for name, some in rows.items()}


def checkpoints(options: argparse.Namespace, files: dict[str, Path]) -> dict[str, Path]:
    """Fine-tune; returns the folders of the checkpoints, base first."""
    folders = {"base": options.model} | {f"epoch-{n}": options.out / f"epoch-{n}" for n in (1, 2)}
    if all((folder / "config.json").exists() for folder in folders.values()):
        return folders
    model, tokenizer = load_model(options.model, pick_device(options.device), "float32"), load_tokenizer(options.model)
    renderers = {TEXT: Renderer(make_variant(TEXT, "raw", "text", 128), tokenizer)}
    renderers[ANSWER] = Renderer(make_variant(ANSWER, "raw", "response", 128), tokenizer)
    samples = tokens_of(files["finetune"], renderers[TEXT])
    queries = tokens_of(files["queries"], renderers[ANSWER])
    start = Start(model)
    print(f"the queries' mean loss at base: {losses(model, queries).mean():.3f} nats", flush=True)
    for n in (1, 2):
        train(start, samples, Recipe(epochs=n, learning_rate=RATE), [options.seed])
        model.save_pretrained(folders[f"epoch-{n}"])
        tokenizer.save_pretrained(folders[f"epoch-{n}"])
        print(f"at epoch-{n}: {losses(model, queries).mean():.3f} nats", flush=True)
    return folders


def tokens_of(path: Path, renderer: Renderer) -> list[Any]:
    """Render the rows of a file."""
    parts = ("prompt", "response", "text")
    return [renderer.render(Sample(row["id"], **{part: row.get(part) for part in parts})) for row in read(path)]


def fill(store: Store, options: argparse.Namespace) -> None:
    """Add everything, fit and sketch."""
    files = data(options)
    for n, (name, folder) in enumerate(checkpoints(options, files).items()):
        store.checkpoint_add(name, folder, epoch=n, learning_rate=RATE)
    for name, stage in (("finetune", "finetune"), ("others", "pretrain"), ("queries", "query")):
        store.source_add(name, files[name], stage=stage)
    store.variant_add(TEXT, template="raw", targets="text", max_length=128)
    store.variant_add(ANSWER, template="raw", targets="response", max_length=128)
    units = [("finetune", (TEXT,)), ("others", (TEXT,)), ("queries", (ANSWER,))]
    for checkpoint in options.checkpoints:
        sketch(store, options, checkpoint, units, TEXT)


def sketch(
    store: Store, options: argparse.Namespace, checkpoint: str, units: Iterable[tuple[str, Any]], variant: str
) -> None:
    """Add the sketchers asked for, fit what they need to the fine-tuning samples, and sketch sources in variants."""
    for name in options.sketchers:
        if name in SKETCHERS:
            store.sketcher_add(name, **SKETCHERS[name])
    for kind in ("adam", "kfac", "ekfac"):
        if any(SKETCHERS[name].get("correction") == kind for name in options.sketchers if name in SKETCHERS):
            fitted = store.correction_fit(checkpoint, kind=kind, variant=variant, samples=500, device=options.device)
            print(f"{checkpoint}: {kind} from {fitted.n_samples} samples, {fitted.n_bytes:,} bytes", flush=True)
    for sketcher in options.sketchers:
        started, n = time.perf_counter(), 0
        for source, variants in units:
            report = store.ingest([checkpoint], [source], variants, sketcher=sketcher, device=options.device)
            assert report.n_failed == 0, report.failures
            n += report.units["n_sketched"].sum()
        print(f"{checkpoint}, {sketcher}: {n} sketches, {time.perf_counter() - started:.0f} s", flush=True)


def scores(options: argparse.Namespace) -> list[str]:
    """Return the scores to compare, the paper's first."""
    at = options.checkpoints
    found = [f"{name}:cosine@{checkpoint}" for name in options.sketchers for checkpoint in at]
    if len(at) > 1:
        both = "+".join(at)
        found += [f"{name}:cosine@{both}" for name in options.sketchers]
    best = "adam" if "adam" in options.sketchers else options.sketchers[-1]
    for name in dict.fromkeys(["lark", best]):
        found += [f"{name}:{method}@{at[-1]}" for method in ("whitened", "centred", "hybrid", "dot")]
        if len(at) > 1:
            found.append(f"{name}:hybrid@{'+'.join(at)}")
    return [*found, *options.rivals]


def whole(store: Store, options: argparse.Namespace) -> list[Any]:
    """Return scores by whole gradients, plain and in Adam's geometry, and by their sketches."""
    made: dict[str, Any] = {}

    def scorer(kind: str) -> evaluate.Scorer:
        def score(material: Any) -> Any:
            made.update(made or cosines(store, options, material))
            return made[kind]

        return evaluate.Scorer(f"{kind}, whole", score)

    at = options.checkpoints[0]
    return [scorer("linear"), scorer("adam"), f"linear:cosine@{at}", f"adam-unmasked:cosine@{at}"]


def cosines(store: Store, options: argparse.Namespace, material: Any) -> dict[str, Any]:
    """Return the cosines of matrices' whole gradients, (queries, samples): plain, and corrected as the store does."""
    at = options.checkpoints[0]
    device = pick_device(options.device)
    loaded = load(store, at, options.device)
    with store._db.session() as session:  # noqa: SLF001 - the factors have no public face
        checkpoint, sketcher = find(session, Checkpoint, at), find(session, Sketcher, "adam-unmasked")
    placements = placements_of(sketcher, loaded.model)
    corrector, _ = corrector_for(store._db, sketcher, checkpoint, placements, device)  # noqa: SLF001
    queries = [matrices(loaded.model, tokens) for tokens in loaded.tokens(material.queries)]
    columns: dict[str, list[list[float]]] = {"linear": [], "adam": []}
    for tokens in loaded.tokens(material.samples):
        sample = matrices(loaded.model, tokens)
        for kind, corrected in (("linear", Corrector()), ("adam", corrector)):
            columns[kind].append([cosine(corrected, query, sample) for query in queries])
    return {kind: torch.tensor(rows).T.numpy() for kind, rows in columns.items()}


def matrices(model: Any, tokens: Any) -> dict[str, torch.Tensor]:
    """Return a text's whole gradient, of the weight matrices."""
    model.requires_grad_(True)
    sample_losses(model, Batch([tokens], model.device)).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.dim() > 1}
    model.zero_grad(set_to_none=True)
    model.requires_grad_(False)
    return found


def cosine(corrector: Corrector, left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """Return the cosine of two corrected gradients."""
    sums = torch.zeros(3, dtype=torch.float64)
    for name, mine in left.items():
        a, b = corrector.whole(name, mine), corrector.whole(name, right[name])
        sums += torch.stack([(x * y).sum(dtype=torch.float64).cpu() for x, y in ((a, b), (a, a), (b, b))])
    return float(sums[0] / (sums[1] * sums[2]).sqrt())


def facts(options: argparse.Namespace) -> None:
    """Evaluate on facts: retraining, who states the fact, and one real step."""
    place = options.out / "lark.store"
    with Store.open(place) if place.exists() else Store.create(place) as store:
        fill(store, options)
        names = scores(options)
        for what in options.evaluate:
            call = asked(store, names, what, options)
            show(what, options, call)


def asked(store: Store, names: list[Any], what: str, options: argparse.Namespace) -> Callable[[], Any]:
    """Return the evaluation asked for."""
    how: dict[str, Any] = {"variants": [TEXT], "query_variant": ANSWER, "queries": "queries", "device": options.device}
    how["out"] = options.out / what
    if what == "facts":
        return partial(evaluate.facts, store, names, key="fact", sources=["finetune", "others"], **how)
    if what == "lds":
        again = {"half_sets": options.half_sets, "seeds": options.seeds, "learning_rate": RATE}
        return partial(evaluate.lds, store, names, checkpoint="base", sources=["finetune"], **again, **how)
    how["out"] = options.out / "causal"  # the same steps
    how |= {"max_samples": options.steps, "max_queries": options.asked, "checkpoint": options.checkpoints[0]}
    names = whole(store, options) if what == "whole" else names
    return partial(evaluate.causal, store, names, sources=["finetune", "others"], **how)


def show(what: str, options: argparse.Namespace, call: Callable[[], Any]) -> None:
    """Run an evaluation, print its table and keep it."""
    started = time.perf_counter()
    found = call()
    print(f"\n{what}: {time.perf_counter() - started:.0f} s\n{found.notes}", flush=True)
    found.table.write_csv(options.out / f"{what}.csv")
    for row in found.table.iter_rows(named=True):
        print(f"{row['measure']:>20} {row['method']:<32} {row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]")


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("facts_file", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--facts", type=int, default=60)
    parser.add_argument("--others", type=int, default=30)
    parser.add_argument("--half-sets", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--asked", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--sketchers", nargs="+", default=["lark", *SKETCHERS])
    parser.add_argument("--checkpoints", nargs="+", default=["base", "epoch-1"])
    parser.add_argument("--rivals", nargs="*", default=["bm25", "random", "length", "same:relation"])
    kinds = ["facts", "lds", "causal", "whole"]
    parser.add_argument("--evaluate", nargs="*", default=kinds[:3], choices=kinds)
    facts(parser.parse_args())


if __name__ == "__main__":
    main()
