"""Which score is true on a small model: all evaluations side by side (docs/results/truth.md).

    python benchmarks/truth.py FACTS.jsonl MODEL_FOLDER OUT --facts 60 --half-sets 40

FACTS.jsonl is what benchmarks/facts.py reads; MODEL_FOLDER is the model before fine-tuning. The statements of --facts
facts are trained on, once and twice over (checkpoints base, epoch-1, epoch-2); those of --others facts are candidates
that were never trained on. Every step goes on where it was stopped: run the same command again.

`--evaluate whole` is `causal` once more for --asked queries, by the cosine of whole gradients and of their sketches, of
sketchers that mask nothing (and are not `tensor`): what sketching costs. It holds the gradients of the queries, 0.54 GB
each of SmolLM2-135M.
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

    from lark_store.ingest.corrections import Corrector

SKETCHERS: dict[str, dict[str, Any]] = {
    "linear": {"min_ndim": 2},
    "masked": {"min_ndim": 2, "mask_template": True},
    "tensor": {"correction": "tensor"},
    "adam": {"correction": "adam", "min_ndim": 2, "mask_template": True},  # as every store has it
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
    """Return the scores of sketchers without a mask by whole gradients, and by their sketches."""
    made: dict[str, Any] = {}

    def scorer(name: str) -> evaluate.Scorer:
        def score(material: Any) -> Any:
            made.update(made or cosines(store, options, material))
            return made[name]

        return evaluate.Scorer(f"{name}, whole", score)

    sketched = [f"{name}:cosine@{options.checkpoints[0]}" for name in options.sketchers]
    return [*map(scorer, options.sketchers), *sketched]


def cosines(store: Store, options: argparse.Namespace, material: Any) -> dict[str, Any]:
    """Return the cosines of whole gradients, (queries, samples), of what each sketcher takes, corrected as it does."""
    at = options.checkpoints[0]
    loaded = load(store, at, options.device)
    takers: dict[str, tuple[Corrector, list[str]]] = {}
    with store._db.session() as session:  # noqa: SLF001 - the factors have no public face
        checkpoint = find(session, Checkpoint, at)
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
            own, *others = products(*taker, sample, queries)
            columns[name].append(torch.stack(others) / (own * squares[name]).sqrt())
    return {name: torch.stack(rows).T.numpy() for name, rows in columns.items()}


def gradients(model: Any, tokens: Any) -> dict[str, torch.Tensor]:
    """Return a text's whole gradient, by parameter."""
    model.requires_grad_(True)
    sample_losses(model, Batch([tokens], model.device)).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    model.requires_grad_(False)
    return found


def products(
    corrector: Corrector, taken: list[str], sample: dict[str, torch.Tensor], queries: list[dict[str, torch.Tensor]]
) -> torch.Tensor:
    """Return ⟨C g, C g⟩ of a sample's gradient g, and ⟨C q, C g⟩ = ⟨q, C² g⟩ of each query's q; C is symmetric."""
    sums = torch.zeros(1 + len(queries), dtype=torch.float64)
    for name in taken:
        twice = corrector.whole(name, corrector.whole(name, sample[name]))
        sums += torch.stack([(twice * other[name]).sum(dtype=torch.float64).cpu() for other in (sample, *queries)])
    return sums


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
