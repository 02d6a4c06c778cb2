"""Validate scores on a small model: all evaluations side by side (docs/results/truth.md).

    python benchmarks/truth.py FACTS.jsonl MODEL_FOLDER OUT --facts 60 --half-sets 40

FACTS.jsonl is the input of benchmarks/facts.py; MODEL_FOLDER is the model before fine-tuning. The statements of --facts
facts are trained on for one and two epochs (checkpoints base, epoch-1, epoch-2); those of --others facts are untrained
candidates. Every step is resumable: run the same command again.

`--evaluate whole` repeats `causal` for --asked queries, by the cosine of full gradients and of their sketches, for
sketchers without a mask (and not `tensor`): the cost of sketching. It keeps the gradients of the queries in memory,
0.54 GB each for SmolLM2-135M.
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
from lark_store.core.device import pick_device
from lark_store.evaluate.dataset import load
from lark_store.evaluate.retrain import Start, train
from lark_store.gradients.sketch.layout import placements_of
from lark_store.ingest.correction_store import corrector_for
from lark_store.modeling.loading import load_model, load_tokenizer
from lark_store.modeling.losses import Batch, losses, sample_losses
from lark_store.modeling.rendering import Renderer, make_variant
from lark_store.modeling.sample import Sample
from lark_store.schema.catalog import Checkpoint, Sketcher
from lark_store.schema.database import find
from lark_store.specs import TrainingSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from lark_store.gradients.corrections import Corrector

SKETCHERS: dict[str, dict[str, Any]] = {
    "linear": {"min_ndim": 2},
    "masked": {"min_ndim": 2, "mask_template": True},
    "tensor": {"correction": "tensor"},
    "adam": {"correction": "adam", "min_ndim": 2, "mask_template": True},  # as in every store
    "adam-unmasked": {"correction": "adam", "min_ndim": 2},
    "adam-d1": {"correction": "adam", "min_ndim": 2, "damping": 1},
    "adam-d10": {"correction": "adam", "min_ndim": 2, "damping": 10},
    "adam-layers-d10": {"correction": "adam", "min_ndim": 2, "damping": 10, "exclude": "embed"},
    "adam-262k": {"correction": "adam", "min_ndim": 2, "k": 262_144},
    "adam-1m": {"correction": "adam", "min_ndim": 2, "k": 1_048_576},
    "adam2": {"correction": "adam2", "min_ndim": 2, "mask_template": True},
    "kfac": {"correction": "kfac"},
    "ekfac": {"correction": "ekfac"},
}
RATE = 1e-4
TEXT, ANSWER = "text", "answer"  # variants: the loss on all tokens of a statement, or on a query's answer


def write(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Write rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def data(options: argparse.Namespace) -> dict[str, Path]:
    """Draw facts; return the files of training statements, other statements, and queries."""
    everything = read(options.facts_file)
    drawn = random.Random(options.seed).sample(everything, options.facts + options.others)  # noqa: S311 (no secret)
    trained, untrained = drawn[: options.facts], drawn[options.facts :]
    queries = [
        {"id": f["id"], "prompt": f["query"], "response": f["answer"], "fact": f["id"], "relation": f["relation"]}
        for f in trained
    ]
    rows = {"finetune": statements(trained), "others": statements(untrained), "queries": queries}
    return {name: write(options.out / "data" / f"{name}.jsonl", selected) for name, selected in rows.items()}


def checkpoints(options: argparse.Namespace, files: dict[str, Path]) -> dict[str, Path]:
    """Fine-tune; return the checkpoint folders, base first."""
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
        train(start, samples, TrainingSpec(epochs=n, learning_rate=RATE), [options.seed])
        model.save_pretrained(folders[f"epoch-{n}"])
        tokenizer.save_pretrained(folders[f"epoch-{n}"])
        print(f"at epoch-{n}: {losses(model, queries).mean():.3f} nats", flush=True)
    return folders


def tokens_of(path: Path, renderer: Renderer) -> list[Any]:
    """Render a file's rows."""
    parts = ("prompt", "response", "text")
    return [renderer.render(Sample(row["id"], **{part: row.get(part) for part in parts})) for row in read(path)]


def fill(store: Store, options: argparse.Namespace) -> None:
    """Add all rows to the store, fit and sketch."""
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
    """Add the requested sketchers, fit their corrections to the fine-tuning samples, and sketch sources in variants."""
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
    checkpoints = options.checkpoints
    specs = [f"{name}:cosine@{checkpoint}" for name in options.sketchers for checkpoint in checkpoints]
    if len(checkpoints) > 1:
        summed = "+".join(checkpoints)
        specs += [f"{name}:cosine@{summed}" for name in options.sketchers]
    best = "adam" if "adam" in options.sketchers else options.sketchers[-1]
    for name in dict.fromkeys(["lark", best]):
        specs += [f"{name}:{method}@{checkpoints[-1]}" for method in ("whitened", "centred", "hybrid", "dot")]
        if len(checkpoints) > 1:
            specs.append(f"{name}:hybrid@{'+'.join(checkpoints)}")
    return [*specs, *options.rivals]


def whole(store: Store, options: argparse.Namespace) -> list[Any]:
    """Return the scores of sketchers without a mask, by full gradients and by sketches."""
    matrices: dict[str, Any] = {}

    def scorer(name: str) -> evaluate.Scorer:
        def score(material: Any) -> Any:
            matrices.update(matrices or cosines(store, options, material))
            return matrices[name]

        return evaluate.Scorer(f"{name}, whole", score)

    sketched = [f"{name}:cosine@{options.checkpoints[0]}" for name in options.sketchers]
    return [*map(scorer, options.sketchers), *sketched]


def cosines(store: Store, options: argparse.Namespace, material: Any) -> dict[str, Any]:
    """Return the cosines (queries, samples) of each sketcher's full gradients, corrected like its sketches."""
    base = options.checkpoints[0]
    loaded = load(store, base, options.device)
    takers: dict[str, tuple[Corrector, list[str]]] = {}
    with store._db.session() as session:  # noqa: SLF001 - there is no public API for factors
        checkpoint = find(session, Checkpoint, base)
        for name in options.sketchers:
            sketcher = find(session, Sketcher, name)
            placements = placements_of(sketcher, loaded.model)
            corrector, _ = corrector_for(store._db, sketcher, checkpoint, placements, loaded.model.device)  # noqa: SLF001
            takers[name] = corrector, [placement.name for placement in placements]
    queries = [gradients(loaded.model, tokens) for tokens in loaded.tokens(material.queries)]
    squares = {
        name: torch.stack([products(*taker, query, [])[0] for query in queries]) for name, taker in takers.items()
    }
    columns: dict[str, list[torch.Tensor]] = {name: [] for name in takers}
    for tokens in loaded.tokens(material.samples):
        sample = gradients(loaded.model, tokens)
        for name, taker in takers.items():
            square, *cross = products(*taker, sample, queries)
            columns[name].append(torch.stack(cross) / (square * squares[name]).sqrt())
    return {name: torch.stack(rows).T.numpy() for name, rows in columns.items()}


def gradients(model: Any, tokens: Any) -> dict[str, torch.Tensor]:
    """Return a text's full gradient, by parameter."""
    model.requires_grad_(True)
    sample_losses(model, Batch([tokens], model.device)).sum().backward()
    by_parameter = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    model.requires_grad_(False)
    return by_parameter


def products(
    corrector: Corrector, names: list[str], sample: dict[str, torch.Tensor], queries: list[dict[str, torch.Tensor]]
) -> torch.Tensor:
    """Return ⟨C g, C g⟩ of a sample's gradient g, and ⟨C q, C g⟩ = ⟨q, C² g⟩ of each query's q; C is symmetric."""
    sums = torch.zeros(1 + len(queries), dtype=torch.float64)
    for name in names:
        corrected = corrector.whole(name, corrector.whole(name, sample[name]))
        sums += torch.stack([(corrected * v[name]).sum(dtype=torch.float64).cpu() for v in (sample, *queries)])
    return sums


def facts(options: argparse.Namespace) -> None:
    """Evaluate on facts: retraining, finding the facts, and one real step."""
    place = options.out / "lark.store"
    with Store.open(place) if place.exists() else Store.create(place) as store:
        fill(store, options)
        names = scores(options)
        for kind in options.evaluate:
            call = evaluation(store, names, kind, options)
            show(kind, options, call)


def evaluation(store: Store, names: list[Any], kind: str, options: argparse.Namespace) -> Callable[[], Any]:
    """Return the requested evaluation."""
    settings: dict[str, Any] = {"variants": [TEXT], "query_variant": ANSWER, "queries": "queries"}
    settings |= {"device": options.device, "out": options.out / kind}
    if kind == "facts":
        return partial(evaluate.facts, store, names, key="fact", sources=["finetune", "others"], **settings)
    if kind == "lds":
        training = {"half_sets": options.half_sets, "seeds": options.seeds, "learning_rate": RATE}
        return partial(evaluate.lds, store, names, checkpoint="base", sources=["finetune"], **training, **settings)
    settings["out"] = options.out / "causal"  # the same steps
    settings |= {"max_samples": options.steps, "max_queries": options.asked, "checkpoint": options.checkpoints[0]}
    names = whole(store, options) if kind == "whole" else names
    return partial(evaluate.causal, store, names, sources=["finetune", "others"], **settings)


def show(kind: str, options: argparse.Namespace, call: Callable[[], Any]) -> None:
    """Run an evaluation, print its table and save it."""
    started = time.perf_counter()
    outcome = call()
    print(f"\n{kind}: {time.perf_counter() - started:.0f} s\n{outcome.notes}", flush=True)
    outcome.table.write_csv(options.out / f"{kind}.csv")
    for row in outcome.table.iter_rows(named=True):
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
