"""The cost of corrected sketches: each variant in turn on the same tokens.

    python benchmarks/corrections.py MODEL_FOLDER

Each round sketches the same random tokens with every variant. Figures are medians and ratios of CPU time, which other
work on the machine hardly affects. Every fifth token counts as a template token.
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

from lark_store.gradients.corrections import CORRECTIONS, DEFAULT_DAMPING, Corrector
from lark_store.gradients.corrections.fisher import CurvatureSums, EigenvalueSums, kronecker_of
from lark_store.gradients.corrections.kronecker import curvature_corrector
from lark_store.gradients.corrections.linear_layers import linear_weights
from lark_store.gradients.corrections.second_moments import MomentPass, Moments, tensors_of
from lark_store.gradients.paths.batched import make_path
from lark_store.gradients.paths.hooks import choose_parameters
from lark_store.gradients.sketch.accumulate import GradientSketcher
from lark_store.gradients.sketch.oporp import Oporp
from lark_store.gradients.sketch.placement import place
from lark_store.modeling.loading import load_model
from lark_store.modeling.tokens import Tokens

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
    """Return the sketch path of an ingest."""
    kind, least, masked = way
    parameters = choose_parameters(model, None, None, least)
    if CORRECTIONS[kind].powers:
        parameters = linear_weights(model, parameters)
    placements = place([(name, tuple(p.shape)) for name, p in parameters], K)
    sketcher = GradientSketcher(
        Oporp(K, 0), placements, CPU, corrector or CORRECTIONS[kind].stand_in(placements, model, CPU)
    )
    return make_path(model, parameters, sketcher, masked=masked)[0]


# --- cost ----------------------------------------------------------------------------------------------------------


def seconds(work: Any) -> float:
    """Time one call, in seconds of this process's CPU time."""
    started = time.process_time()
    work()
    return time.process_time() - started


def cost(model: Any, options: argparse.Namespace) -> None:
    """Time each variant on the same batches."""
    unmasked = tokens(options.samples, options.length, len(model.get_input_embeddings().weight))
    content = [i > 0 and i % 5 > 0 for i in range(options.length)]
    samples = [Tokens(t.input_ids, t.is_target, t.rule, is_content=content) for t in unmasked]
    batches = pack(samples, options.batch_tokens)

    def sketched(way: tuple[str, int, bool]) -> float:
        path = path_for(model, way)
        spent = seconds(lambda: [path.sketch(batch) for batch in batches])
        path.close()
        return spent / len(samples)

    def fitting(kind: Any) -> float:
        pass_ = kind(model, CPU)
        if kind is EigenvalueSums:
            pass_.restore(_bases(model), 0)
        spent = seconds(lambda: [pass_.take(sample, seed) for seed, sample in enumerate(samples[:4])])
        pass_.close()
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
    times = in_turn(ways, options.rounds)
    usual = statistics.median(times[base])
    rows: list[list[Any]] = []
    for name, spent in times.items():
        middle = statistics.median(spent)
        ratios = [variant / plain for variant, plain in zip(spent, times[base], strict=True)]
        rows.append([name, middle, f"{min(spent):.3g} – {max(spent):.3g}", middle / usual, statistics.median(ratios)])
    title = f"{options.length} tokens, {options.samples} samples, {options.rounds} rounds"
    table(title, ["way", "CPU s/sample, median", "range", "over none", "median of the rounds' ratios"], rows)
    once(model)
    for least, label in ((0, "all parameters"), (2, "matrices alone")):
        parameters = choose_parameters(model, None, None, least)
        tensors = tensors_of({name: Moments.of(torch.ones(p.shape)) for name, p in parameters})
        print(f"adam's factors of {label}: {_size(tensors):.2f} MiB")
    bases = _bases(model)
    print(f"ekfac's factors: {_size(bases):,.0f} MiB")
    print(f"kfac's factors: {_size({n: t for n, t in bases.items() if not n.endswith('/values')}):,.0f} MiB")


def _bases(model: Any) -> dict[str, torch.Tensor]:
    """Return tensors shaped like EK-FAC's factors."""
    parameters = linear_weights(model, choose_parameters(model, None, None))
    placements = place([(name, tuple(p.shape)) for name, p in parameters], K)
    corrector: Any = CORRECTIONS["ekfac"].stand_in(placements, model, CPU)
    tensors = {}
    for name, base in corrector.bases.items():
        tensors |= {f"{name}/rows": base.rows, f"{name}/columns": base.columns, f"{name}/values": base.values}
    return tensors


def _size(tensors: dict[str, torch.Tensor]) -> float:
    return sum(4 * tensor.numel() for tensor in tensors.values()) / 2**20  # stored as float32


def once(model: Any) -> None:
    """Time the work at the start of an ingest: K-FAC's inverse roots, for the last block's weights."""
    names = {name.rpartition("/")[0] for name in _bases(model)}
    last = max(int(part) for name in names for part in name.split(".") if part.isdigit())
    shapes = {n: kronecker_of(_bases(model), n) for n in names if f".{last}." in n}
    factors = {}
    for name, shape in shapes.items():
        sides = [torch.randn(side.shape) for side in (shape.rows, shape.columns)]
        factors[name] = type(shape)(*(side @ side.mT / side.shape[1] for side in sides))
    spent = seconds(lambda: curvature_corrector(factors, DEFAULT_DAMPING, 0.5, CPU))
    print(f"kfac's inverse roots, once an ingest: {spent:.2f} s for one block, × {last + 1} blocks")


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a folder made by save_pretrained")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--only", default="", help="only variants matching this regular expression")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    options = parser.parse_args()
    model = load_model(options.model, CPU, "float32")
    model.requires_grad_(False)
    print(f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    cost(model, options)


if __name__ == "__main__":
    main()
