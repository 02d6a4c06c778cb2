"""The cost of sketching, compared with plain forward and backward, with baselines, and by model size and k.

    python benchmarks/ingest.py MODEL_FOLDER                       # the floor, memory and baselines
    python benchmarks/ingest.py MODEL_FOLDER --bergson PYTHON      # bergson too, in its own environment
    python benchmarks/ingest.py --growth                           # model size and k, on random models

Every table is one run and gives medians and ratios. Its rows are measured in turn, round by round, so a busy moment
affects them all. Texts are random tokens: time does not depend on their content.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as in the command line, for every method

import torch
from rivals import batch_loss, bergson, pack, plain_floor, rapidin, trak

from lark_store.gradients.paths.batched import BatchPath, make_path
from lark_store.gradients.paths.hooks import HookPath, choose_parameters
from lark_store.gradients.sketch.accumulate import GradientSketcher
from lark_store.gradients.sketch.oporp import Oporp
from lark_store.gradients.sketch.placement import place
from lark_store.ingest.plan import PeakMemory
from lark_store.modeling.loading import load_model
from lark_store.modeling.tokens import Tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lark_store.gradients.paths.hooks import SketchPath

K = 65_536


def tokens(n: int, length: int, vocabulary: int, *, targets: int | None = None) -> list[Tokens]:
    """Return samples of random tokens; the loss covers the last `targets` tokens, or all."""
    generator = torch.Generator().manual_seed(0)
    first = 1 if targets is None else length - targets
    is_target = [t >= first for t in range(length)]
    return [
        Tokens(torch.randint(0, vocabulary, (length,), generator=generator).tolist(), is_target, "text")
        for _ in range(n)
    ]


def path_for(model: Any, kind: str, k: int = K, include: str | None = None) -> SketchPath:
    """Return a sketch path: `batched`, `hooks`, or an ingest's choice (`auto`)."""
    parameters = choose_parameters(model, include, None)
    device = next(model.parameters()).device
    sketcher = GradientSketcher(Oporp(k, 0), place([(name, tuple(p.shape)) for name, p in parameters], k), device)
    if kind == "auto":
        return make_path(model, parameters, sketcher)[0]
    return (BatchPath if kind == "batched" else HookPath)(model, parameters, sketcher)


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Time one call."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def sketched(model: Any, batches: Sequence[Sequence[Tokens]], kind: str, include: str | None = None) -> float:
    """Return seconds per sample of sketching these batches, after a warm-up on one sample."""
    path = path_for(model, kind, include=include)
    path.sketch(batches[0][:1])
    spent = seconds(lambda: [path.sketch(batch) for batch in batches], next(model.parameters()).device)
    path.close()
    return spent / sum(len(batch) for batch in batches)


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def table(title: str, header: list[str], rows: list[list[Any]]) -> None:
    """Print a Markdown table."""
    print(f"\n### {title}\n\n| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(_cell(v) for v in row)} |")
    print(flush=True)


def in_turn(ways: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Measure each method once per round."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            times[name].append(way())
            gc.collect()
    return times


def against_others(model: Any, folder: Path, options: argparse.Namespace) -> None:
    """Compare with the floor and the baselines, at each requested length."""
    vocabulary = len(model.get_input_embeddings().weight)
    for length in options.lengths:
        samples = tokens(options.samples, length, vocabulary)
        batches = pack(samples, options.batch_tokens)
        ways: dict[str, Callable[[], float]] = {
            "plain forward and backward, batched": lambda b=batches: plain_floor(model, b).whole,
            "**lark-store, batched**": lambda b=batches: sketched(model, b, "batched"),
            "lark-store, hooks, batch 1": lambda s=samples: sketched(model, [[sample] for sample in s[:2]], "hooks"),
            "RapidIn's way, batch 1": lambda s=samples: rapidin(model, s[:2]).whole,
            "lark-store, linear layers of the decoder": lambda b=batches: sketched(
                model, b, "batched", r"layers\.\d+\..*_proj\.weight"
            ),
        }
        if options.bergson:
            ways["bergson 2.5 (linear layers of the decoder, p = 16)"] = lambda s=samples: (
                bergson(options.bergson, folder, s, n_tokens=options.batch_tokens).whole
            )
        times = in_turn(ways, options.rounds)
        floor, ours = (statistics.median(times[name]) for name in list(times)[:2])
        rows = []
        for name, seconds_each in times.items():
            middle = statistics.median(seconds_each)
            rows.append(
                [name, middle, f"{min(seconds_each):.3g} – {max(seconds_each):.3g}", middle / floor, middle / ours]
            )
        title = f"{length} tokens, {options.samples} samples, {options.batch_tokens} tokens a batch"
        table(title, ["way", "s/sample, median", "range", "over plain", "over lark-store"], rows)


def per_coordinate(model: Any) -> None:
    """Compare the projection alone with TRAK's, per coordinate of a sample's gradient."""
    samples = tokens(8, 32, len(model.get_input_embeddings().weight))
    device = next(model.parameters()).device
    kernel = GradientSketcher(Oporp(K, 0), place([("w", (1 << 23,))], K), device)
    rows = []
    for n in (1, 8):
        gradient, out = torch.randn(n, 1 << 23, device=device), kernel.new(n)
        kernel.add("w", gradient, out)
        our_time = statistics.median(seconds(lambda g=gradient, o=out: kernel.add("w", g, o), device) for _ in range(7))
        our_time /= gradient.numel()
        trak_time = trak(model, samples[:n], batch_size=n)
        ratio = trak_time.per_coordinate / our_time
        rows.append([n, our_time * 1e9, trak_time.per_coordinate * 1e9, ratio])
    title = f"Projection alone: ours at k = {K:,}, TRAK's BasicProjector at k = 2,048"
    table(title, ["gradients at once", "ours, ns/coordinate", "TRAK, ns/coordinate", "ratio"], rows)


def memory(options: argparse.Namespace) -> None:
    """Compare peak memory, each method in its own process to exclude the memory of the others."""
    rows: list[list[Any]] = []
    for way, meaning in WAYS_OF_BACKWARD.items():
        command = [sys.executable, __file__, str(options.model), f"--peak-of={way}", f"--lengths={options.lengths[-1]}"]
        command += [
            f"--{name}={getattr(options, name.replace('-', '_'))}"
            for name in ("samples", "batch-tokens", "device", "precision")
        ]
        ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)  # noqa: S603 - this very script
        peak = float(ran.stdout)
        rows.append([meaning, peak / 2**20, peak / rows[0][1] / 2**20 if rows else 1.0])
    size = f"{options.batch_tokens // options.lengths[-1]} × {options.lengths[-1]} tokens"
    table(f"Peak memory, a batch of {size}", ["", "MiB", "ratio"], rows)


WAYS_OF_BACKWARD = {
    "bare": "weights + activations of the backward (gradients dropped immediately)",
    "ours": "**lark-store, batched**",
    "plain": "plain backward, gradients kept",
}


def peak_of(way: str, model: Any, options: argparse.Namespace) -> int:
    """Return the peak bytes of the weights and one backward pass."""
    device = next(model.parameters()).device
    batch = pack(
        tokens(options.samples, options.lengths[-1], len(model.get_input_embeddings().weight)), options.batch_tokens
    )[0]
    path = path_for(model, "batched") if way == "ours" else None
    if path is None:
        model.requires_grad_(True)
    if way == "bare":
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with PeakMemory(device) as peak:
        if path is None:
            batch_loss(model, batch, device).backward()  # type: ignore[no-untyped-call]
        else:
            path.sketch(batch)
    return sum(p.numel() * p.element_size() for p in model.parameters()) + peak.highest - peak.start


def growth(options: argparse.Namespace) -> None:
    """Show samples per second by model size and k, on random Llamas."""
    from transformers import LlamaConfig, LlamaForCausalLM

    rows = []
    for hidden, layers in ((128, 4), (256, 6), (384, 8), (512, 12), (576, 30)):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=1024 if hidden < 512 else 49_152, hidden_size=hidden, num_hidden_layers=layers,
            intermediate_size=hidden * 8 // 3 // 64 * 64, num_attention_heads=hidden // 64, tie_word_embeddings=True,
        )  # fmt: skip
        model = LlamaForCausalLM(config).eval().to(options.device)
        batches = pack(tokens(options.samples, 256, config.vocab_size), options.batch_tokens)
        times = in_turn(
            {
                "plain": lambda m=model, b=batches: plain_floor(m, b).whole,
                "ours": lambda m=model, b=batches: sketched(m, b, "batched"),
            },
            options.rounds,
        )
        plain_time, sketch_time = (statistics.median(times[name]) for name in ("plain", "ours"))
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        rows.append([millions, 1 / plain_time, 1 / sketch_time, sketch_time / plain_time])
    table(
        "Model size, 256 tokens",
        ["parameters, M", "plain, samples/s", "lark-store, samples/s", "time over plain"],
        rows,
    )

    gradient = torch.randn(4, 1 << 22, device=options.device)
    rows = []
    for k in (1024, 4096, 16_384, 65_536, 262_144):
        sketcher = GradientSketcher(Oporp(k, 0), place([("w", (1 << 22,))], k), gradient.device)
        out = sketcher.new(4)
        sketcher.add("w", gradient, out)
        spent = [seconds(lambda s=sketcher, o=out: s.add("w", gradient, o), gradient.device) for _ in range(9)]
        rows.append([f"{k:,}", statistics.median(spent) / gradient.numel() * 1e9])
    table("k, the sketch alone (4 gradients at once)", ["k", "ns per coordinate"], rows)


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, help="a folder made by save_pretrained")
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--bergson", type=Path, help="the Python of an environment with bergson")
    parser.add_argument("--no-trak", action="store_true")
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--peak-of", choices=list(WAYS_OF_BACKWARD), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak_of:
        print(
            peak_of(
                options.peak_of, load_model(options.model, torch.device(options.device), options.precision), options
            )
        )
        return
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, {options.precision}, {time.strftime('%Y-%m-%d')}")
    if options.growth:
        growth(options)
    if options.model:
        memory(options)
        model = load_model(options.model, torch.device(options.device), options.precision)
        against_others(model, options.model, options)
        if not options.no_trak:
            per_coordinate(model)


if __name__ == "__main__":
    main()
