"""What corrected sketches cost: each way in turn on the same tokens.

    python benchmarks/corrections.py MODEL_FOLDER

The same made-up tokens are sketched in each way in turn, round by round; the figures are medians and ratios of CPU
time, which other work on the machine hardly touches. Every fifth token is taken for the template's.
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from ingest import K, in_turn, table, tokens
from rivals import pack, plain_floor

from lark_store.ingest.batched import make_path
from lark_store.ingest.corrections import CURVATURES, DEFAULT_DAMPING, Corrector, Moments
from lark_store.ingest.curvature import curvature_corrector, linear_weights, stand_in
from lark_store.ingest.fisher import CurvatureSums, EigenvalueSums, kronecker_of
from lark_store.ingest.gradients import choose_parameters
from lark_store.ingest.models import load_model
from lark_store.ingest.moments import MomentPass, tensors_of
from lark_store.ingest.oporp import GradientSketcher, Oporp, place
from lark_store.ingest.variants import Tokens

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


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a folder made by save_pretrained")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--only", default="", help="ways whose names match this regular expression")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    options = parser.parse_args()
    model = load_model(options.model, CPU, "float32")
    model.requires_grad_(False)
    print(f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    cost(model, options)


if __name__ == "__main__":
    main()
