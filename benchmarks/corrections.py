"""What corrected sketches cost, and how well their scores agree with a real step of Adam.

    python benchmarks/corrections.py cost MODEL_FOLDER
    python benchmarks/corrections.py step MODEL_FOLDER FACTS_FOLDER      # as benchmarks/facts.py writes it

`cost` sketches the same made-up tokens in each way in turn, round by round, and gives medians and ratios of CPU time,
which other work on the machine hardly touches; every fifth token is taken for the template's. `step`: V, the mean
squared gradient of the statements that are fine-tuned on, is measured whole. For each candidate statement one step of
AdamW without decay is made from the model's weights, with V as the optimizer's second moment and the statement's
gradient as its first; the truth is how much the loss of each query falls. Scores are of sketches at k = 65,536, as
lark-store makes them; each query's rank correlation (Spearman) with its truth over the candidates is averaged over the
queries.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from ingest import K, in_turn, table, tokens
from rivals import pack, plain_floor

from lark_store.evaluate.agree import spearman
from lark_store.evaluate.steps import Stepper, second_moments
from lark_store.evaluate.training import losses
from lark_store.ingest.batched import make_path
from lark_store.ingest.corrections import CURVATURES, DEFAULT_DAMPING, Corrector, Moments, corrector_of
from lark_store.ingest.curvature import curvature_corrector, linear_weights, stand_in
from lark_store.ingest.fisher import CurvatureSums, EigenvalueSums, kronecker_of
from lark_store.ingest.gradients import Sketch, choose_parameters
from lark_store.ingest.models import load_model, load_tokenizer
from lark_store.ingest.moments import MomentPass, tensors_of
from lark_store.ingest.oporp import GradientSketcher, Oporp, place
from lark_store.ingest.sources import Sample
from lark_store.ingest.variants import Renderer, Tokens, make_variant
from lark_store.query.compare import intervals

CPU = torch.device("cpu")
WAYS: dict[str, tuple[str, int, bool]] = {  # kind, least dimensions, template masked
    "none: the paper's": ("none", 0, False),
    "none, matrices alone": ("none", 2, False),
    "none, matrices alone, template masked": ("none", 2, True),
    "adam, all parameters": ("adam", 0, False),
    "adam, matrices alone": ("adam", 2, False),
    "adam, matrices alone, template masked": ("adam", 2, True),
    "adam2, matrices alone": ("adam2", 2, False),
    "adam2, all parameters": ("adam2", 0, False),
    "kfac, linear layers": ("kfac", 2, False),
    "kfac, linear layers, template masked": ("kfac", 2, True),
    "tensor (hooks, batch 1)": ("tensor", 0, False),
    "ekfac, linear layers": ("ekfac", 2, False),
}


def path_for(model: Any, way: tuple[str, int, bool], corrector: Corrector | None = None) -> Any:
    """Return the path that an ingest takes."""
    kind, least, masked = way
    chosen = choose_parameters(model, None, None, least)
    if kind in CURVATURES:
        chosen = linear_weights(model, chosen)
    placements = place([(name, tuple(p.shape)) for name, p in chosen], K)
    sketcher = GradientSketcher(Oporp(K, 0), placements, CPU, corrector or stand_in(kind, placements, CPU, model))
    return make_path(model, chosen, sketcher, masked=masked)[0]


# --- what it costs -------------------------------------------------------------------------------------------------


def seconds(work: Any) -> float:
    """Time one call, in seconds of this process's CPU time."""
    started = time.process_time()
    work()
    return time.process_time() - started


def cost(model: Any, options: argparse.Namespace) -> None:
    """Time each way on the same batches."""
    made = tokens(options.samples, options.length, len(model.get_input_embeddings().weight))
    content = [i > 0 and i % 5 > 0 for i in range(options.length)]
    samples = [Tokens(t.input_ids, t.is_target, t.rule, is_content=content) for t in made]
    batches = pack(samples, options.batch_tokens)

    def sketched(way: tuple[str, int, bool]) -> float:
        path = path_for(model, way)
        spent = seconds(lambda: [path.sketch(batch) for batch in batches])
        path.close()
        return spent / len(samples)

    def fitting(kind: Any) -> float:
        one = kind(model, CPU)
        if kind is EigenvalueSums:
            one.restore(_bases(model), 0)
        spent = seconds(lambda: [one.take(sample, seed) for seed, sample in enumerate(samples[:4])])
        one.close()
        return spent / len(samples[:4])

    ways: dict[str, Any] = {
        "plain forward and backward, batched": lambda: plain_floor(model, batches).cpu_seconds / len(samples)
    }
    ways |= {name: (lambda w=way: sketched(w)) for name, way in WAYS.items()}
    ways["correction fit --kind adam, a sample"] = lambda: fitting(MomentPass)
    ways["correction fit --kind kfac, a sample"] = lambda: fitting(CurvatureSums)
    ways["correction fit --kind ekfac, second pass, a sample"] = lambda: fitting(EigenvalueSums)
    base = "none: the paper's"
    ways = {name: way for name, way in ways.items() if name == base or re.search(options.only, name)}
    found = in_turn(ways, options.rounds)
    ours = statistics.median(found[base])
    rows: list[list[Any]] = []
    for name, each in found.items():
        middle = statistics.median(each)
        ratios = [mine / theirs for mine, theirs in zip(each, found[base], strict=True)]
        rows.append([name, middle, f"{min(each):.3g} – {max(each):.3g}", middle / ours, statistics.median(ratios)])
    title = f"{options.length} tokens, {options.samples} samples, {options.rounds} rounds"
    table(title, ["way", "CPU s/sample, median", "range", "over none", "median of the rounds' ratios"], rows)
    once(model)
    for least, what in ((0, "all parameters"), (2, "matrices alone")):
        chosen = choose_parameters(model, None, None, least)
        held = tensors_of({name: Moments.of(torch.ones(p.shape)) for name, p in chosen})
        print(f"adam's factors of {what}: {_size(held):.2f} MiB")
    bases = _bases(model)
    print(f"ekfac's factors: {_size(bases):,.0f} MiB")
    print(f"kfac's factors: {_size({n: t for n, t in bases.items() if not n.endswith('/values')}):,.0f} MiB")


def _bases(model: Any) -> dict[str, torch.Tensor]:
    """Return tensors of the shapes of EK-FAC's factors."""
    chosen = linear_weights(model, choose_parameters(model, None, None))
    placements = place([(name, tuple(p.shape)) for name, p in chosen], K)
    made: Any = stand_in("ekfac", placements, CPU, model)
    found = {}
    for name, base in made.bases.items():
        found |= {f"{name}/rows": base.rows, f"{name}/columns": base.columns, f"{name}/values": base.values}
    return found


def _size(tensors: dict[str, torch.Tensor]) -> float:
    return sum(4 * each.numel() for each in tensors.values()) / 2**20  # they are kept in float32


def once(model: Any) -> None:
    """Time what is done once: the inverse roots of K-FAC when an ingest begins, of the last block's weights."""
    names = {name.rpartition("/")[0] for name in _bases(model)}
    last = max(int(part) for name in names for part in name.split(".") if part.isdigit())
    shapes = {n: kronecker_of(_bases(model), n) for n in names if f".{last}." in n}
    made = {}
    for name, each in shapes.items():
        sides = [torch.randn(side.shape) for side in (each.rows, each.columns)]
        made[name] = type(each)(*(side @ side.mT / side.shape[1] for side in sides))
    spent = seconds(lambda: curvature_corrector(made, DEFAULT_DAMPING, 0.5, CPU))
    print(f"kfac's inverse roots, once an ingest: {spent:.2f} s for one block, × {last + 1} blocks")


# --- a real step ---------------------------------------------------------------------------------------------------


def rendered(folder: Path, name: str, renderer: Renderer) -> dict[str, Tokens]:
    """Render a file of rows as text, the loss on all tokens or on the response."""
    made = {}
    for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        parts = {part: row.get(part) for part in ("prompt", "response", "text")}
        made[row["id"]] = renderer.render(Sample(row["id"], **parts))
    return made


def truth(model: Any, some: list[Tokens], queries: list[Tokens], fitted: list[Tokens], rate: float) -> Any:
    """Return how much a step on each candidate lowers each query's loss, (queries, candidates), and V."""
    stepper = Stepper(model, rate)
    stepper.moments = second_moments(stepper.start, fitted, lambda _: None)
    before, made = losses(model, queries), []
    for n, candidate in enumerate(some):
        made.append(stepper.effect([candidate], queries, before))
        if n % 20 == 0:
            print(f"  step {n} of {len(some)}", flush=True)
    names = [name for name, _ in stepper.start.chosen]
    return torch.stack(made, dim=1).numpy(), dict(zip(names, stepper.moments, strict=True))


def agreement(score: torch.Tensor, real: Any) -> str:
    """Return the mean over queries of the rank correlation, with a 95% bootstrap interval over them."""
    each = spearman(score.numpy(), real)
    (low,), (high,) = intervals(each[:, None])
    return f"{each.mean():.3f} [{low:.3f}, {high:.3f}]"


def sketches(model: Any, way: tuple[str, int, bool], corrector: Corrector | None, some: list[Tokens]) -> torch.Tensor:
    """Return sketches with their own norms, (N, K)."""
    path = path_for(model, way, corrector)
    made: list[Any] = []
    for start in range(0, len(some), 16):
        made += path.sketch(some[start : start + 16])
    path.close()
    return torch.stack([s.vector / K**0.5 * s.grad_norm for s in made if isinstance(s, Sketch)])


def literal(v: dict[str, Moments], power: float) -> Corrector:
    """Return the correction R^(−p) C^(−p) without Adafactor's mean: one number per matrix is another."""
    whole = corrector_of(v, "adam" if power == 0.25 else "adam2", DEFAULT_DAMPING, CPU)
    scales = {}
    for name, scale in whole.scales.items():
        mean = float(v[name].rows.mean()) * (1 + DEFAULT_DAMPING)
        scales[name] = type(scale)(scale.left / mean**power, scale.right)
    return Corrector(scales)


def curved(model: Any, fitted: list[Tokens], kind: str) -> Corrector:
    """Fit a curvature to statements, as `correction fit` does."""
    result: dict[str, torch.Tensor] = {}
    passes: list[Any] = [CurvatureSums, EigenvalueSums] if kind == "ekfac" else [CurvatureSums]
    for make in passes:
        one = make(model, CPU, result)
        for seed, sample in enumerate(fitted):
            one.take(sample, seed)
        result = one.result()
        one.close()
    names = {key.rpartition("/")[0] for key in result}
    return curvature_corrector({name: kronecker_of(result, name) for name in sorted(names)}, DEFAULT_DAMPING, 0.5, CPU)


def one_step(model: Any, options: argparse.Namespace) -> None:
    """Compare scores with a real step."""
    tokenizer = load_tokenizer(options.model)
    text = Renderer(make_variant("text", "raw", "text", 128), tokenizer)
    answer = Renderer(make_variant("answer", "raw", "response", 128), tokenizer)
    trained = rendered(options.facts, "finetune", text)
    others = list(rendered(options.facts, "others", text).values())
    asked = list(rendered(options.facts, "queries", answer).items())[: options.queries]
    queries = [tokens_ for _, tokens_ in asked]
    own = [f"{name}-{i}" for name, _ in asked for i in range(2)]
    rest = [sample for name, sample in trained.items() if name not in own]
    candidates = [trained[name] for name in own] + rest[: options.candidates // 4] + others
    candidates = candidates[: options.candidates]
    print(f"{len(queries)} queries, {len(candidates)} candidates, rate {options.rate}", flush=True)
    started = time.perf_counter()
    fitted = list(trained.values())[: options.fitted]
    real, v = truth(model, candidates, queries, fitted, options.rate)
    print(f"V of {len(fitted)} statements, and steps: {time.perf_counter() - started:.0f} s", flush=True)
    moments = {name: Moments.of(each) for name, each in v.items()}
    matrices = {name: each for name, each in moments.items() if each.columns is not None}
    del v
    rows = []
    ways: dict[str, tuple[tuple[str, int, bool], Corrector | None]] = {
        "none: the paper's": (("none", 0, False), None),
        "none, matrices alone": (("none", 2, False), None),
        "adam, matrices alone": (("adam", 2, False), corrector_of(matrices, "adam", DEFAULT_DAMPING, CPU)),
        "adam, all parameters": (("adam", 0, False), corrector_of(moments, "adam", DEFAULT_DAMPING, CPU)),
        "adam2, matrices alone": (("adam2", 2, False), corrector_of(matrices, "adam2", DEFAULT_DAMPING, CPU)),
        "adam, matrices, without Adafactor's mean": (("adam", 2, False), literal(matrices, 0.25)),
        "kfac, linear layers": (("kfac", 2, False), curved(model, fitted, "kfac")),
        "ekfac, linear layers": (("ekfac", 2, False), curved(model, fitted, "ekfac")),
    }
    for name, (way, corrector) in ways.items():
        found = sketches(model, way, corrector, [*queries, *candidates])
        q, z = found[: len(queries)].double(), found[len(queries) :].double()
        dot = q @ z.T
        cosine = dot / q.norm(dim=1, keepdim=True) / z.norm(dim=1)
        cells = [agreement(each, real) for each in (cosine, dot)]
        rows.append([name, *cells])
        print(f"  {name}: cosine {cells[0]}, dot {cells[1]}; {time.perf_counter() - started:.0f} s", flush=True)
    table("Agreement with one step of Adam", ["sketched as", "cosine: Spearman [95%]", "dot: Spearman [95%]"], rows)


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["cost", "step"])
    parser.add_argument("model", type=Path, help="a folder made by save_pretrained")
    parser.add_argument("facts", type=Path, nargs="?")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--only", default="", help="of `cost`: ways whose names match this regular expression")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--queries", type=int, default=24)
    parser.add_argument("--candidates", type=int, default=120)
    parser.add_argument("--fitted", type=int, default=100)
    parser.add_argument("--rate", type=float, default=2e-5)
    options = parser.parse_args()
    model = load_model(options.model, CPU, "float32")
    model.requires_grad_(False)
    print(f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    if options.what == "cost":
        cost(model, options)
    else:
        one_step(model, options)


if __name__ == "__main__":
    main()
