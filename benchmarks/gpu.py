"""The cost of sketching on one GPU, for OLMo-3-7B, a 1B Llama and SmolLM2-135M with random bf16 weights.

    bash benchmarks/gpu.sh            # this script and the tests of the compiled kernel, in under ten minutes

For each model: plain batched forward and backward, the batched path, and the batched path with a sketcher dropping the
weight gradients (the difference is the sketch's share); peak memory; the same sample alone and in a batch.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from ingest import in_turn, table, tokens
from rivals import pack, plain_floor
from transformers import AutoModelForCausalLM, LlamaConfig, Olmo3Config

from lark_store.gradients.paths.batched import BatchPath, make_path
from lark_store.gradients.paths.hooks import Sketch, choose_parameters
from lark_store.gradients.sketch.accumulate import GradientSketcher
from lark_store.gradients.sketch.kernels.gpu import GpuKernel
from lark_store.gradients.sketch.oporp import Oporp
from lark_store.gradients.sketch.placement import place

K = 65_536
OLMO3_7B = Olmo3Config(
    vocab_size=100_278, hidden_size=4096, intermediate_size=11_008, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=32, max_position_embeddings=65_536, sliding_window=4096, tie_word_embeddings=False,
)  # fmt: skip
LLAMA_1B = LlamaConfig(
    vocab_size=128_256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
    num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
)  # fmt: skip
SMOLLM2_135M = LlamaConfig(
    vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, tie_word_embeddings=True,
)  # fmt: skip
MODELS = {"OLMo-3-7B": OLMO3_7B, "Llama, 1B": LLAMA_1B, "SmolLM2-135M": SMOLLM2_135M}


class Dropped(GradientSketcher):
    """Drops gradients: a backward pass without the sketch."""

    def add(self, name: str, gradient_SN: torch.Tensor, out: torch.Tensor, chunk: int = 0) -> None:
        """Do nothing."""

    def add_rows(self, name: str, index_T: torch.Tensor, values_TH: torch.Tensor, out: torch.Tensor, s: int) -> None:
        """Do nothing."""


def build(config: Any) -> Any:
    """Make a model with random bf16 weights on the GPU."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def timed(path: BatchPath, batches: list[Any]) -> float:
    """Return ms per sample."""
    path.sketch(batches[0])
    torch.cuda.synchronize()
    start = time.perf_counter()
    for batch in batches:
        path.sketch(batch)
    torch.cuda.synchronize()
    path.close()
    return (time.perf_counter() - start) / sum(map(len, batches)) * 1e3


def measure(name: str, config: Any, length: int, batch_tokens: int, rounds: int) -> list[Any]:
    """Return a row of the table."""
    model = build(config)
    parameters = choose_parameters(model, None, None)
    placements = place([(n, tuple(p.shape)) for n, p in parameters], K)
    batches = pack(tokens(max(16, 2 * (batch_tokens // length)), length, config.vocab_size), batch_tokens)
    weights = torch.cuda.memory_allocated()

    def path(kind: type[GradientSketcher]) -> BatchPath:
        return BatchPath(model, parameters, kind(Oporp(K, 0), placements, torch.device("cuda")))

    ways = {
        "plain": lambda: plain_floor(model, batches).whole * 1e3,
        "ours": lambda: timed(path(GradientSketcher), batches),
        "dropped": lambda: timed(path(Dropped), batches),
    }
    medians = {way: statistics.median(times) for way, times in in_turn(ways, rounds).items()}
    model.zero_grad(set_to_none=True)
    peaks = []
    for kind in (Dropped, GradientSketcher):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        probe = path(kind)
        probe.sketch(batches[0])
        probe.close()
        peaks.append(torch.cuda.max_memory_allocated() / 2**30)
    lowest = invariance(model, parameters, config.vocab_size, length)
    share = 1 - medians["dropped"] / medians["ours"]
    count = sum(p.numel for p in placements)
    ratio = medians["ours"] / medians["plain"]
    size = f"{len(batches[0])} × {length}"
    return [
        name,
        f"{count:,}",
        size,
        medians["plain"],
        medians["ours"],
        ratio,
        share,
        weights / 2**30,
        *peaks,
        f"{lowest:.6f}",
    ]


def invariance(model: Any, parameters: Any, vocabulary: int, length: int) -> float:
    """Return the lowest cosine between samples' sketches alone and in a ragged batch."""
    placements = place([(n, tuple(p.shape)) for n, p in parameters], K)
    path, reason = make_path(model, parameters, GradientSketcher(Oporp(K, 0), placements, torch.device("cuda")))
    assert isinstance(path, BatchPath), reason
    samples = [tokens(1, n, vocabulary)[0] for n in (length, length // 2, length - 7, 33)]
    samples[1] = replace(samples[1], rule="predicted")
    alone, together = [path.sketch([sample])[0] for sample in samples], path.sketch(samples)
    again = path.sketch(samples)
    path.close()
    cosines = []
    for a, b, c in zip(alone, together, again, strict=True):
        assert isinstance(a, Sketch)
        assert isinstance(b, Sketch)
        assert isinstance(c, Sketch)
        assert torch.equal(b.vector, c.vector), "the same batch gave other bytes"
        cosines.append(float(torch.nn.functional.cosine_similarity(a.vector, b.vector, dim=0)))
    return min(cosines)


def kernel_alone() -> None:
    """Print the kernel's time per coordinate and its memory bandwidth."""
    rows = []
    device = torch.device("cuda")
    for k in (1024, 65_536, 1_048_576):
        for n in (1, 4, 8):
            gradient = torch.randn(n, 1 << 22, device=device, dtype=torch.bfloat16)
            kernel = GpuKernel(Oporp(k, 0), device)
            out = kernel.new(n)
            kernel.add(gradient, 0, out)
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(50):
                kernel.add(gradient, 0, out)
            torch.cuda.synchronize()
            per_coordinate = (time.perf_counter() - start) / 50 / gradient.numel()
            rows.append([f"{k:,}", n, per_coordinate * 1e12, gradient.element_size() / per_coordinate / 1e12])
    table("The kernel alone, 4.2M coordinates a sample", ["k", "samples", "ps/coordinate", "TB/s"], rows)


def main() -> None:
    """Run everything and print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--length", type=int, default=400)
    parser.add_argument("--batch-tokens", type=int, default=3200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device found")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bfloat16, {time.strftime('%Y-%m-%d')}")
    kernel_alone()
    rows = []
    for name in options.models:
        rows.append(measure(name, MODELS[name], options.length, options.batch_tokens, options.rounds))
        gc.collect()
        torch.cuda.empty_cache()
    header = [
        "model",
        "coordinates",
        "batch",
        "plain, ms/sample",
        "lark-store, ms/sample",
        "ratio",
        "share of the sketch",
    ]
    header += ["weights, GiB", "peak without sketch, GiB", "peak, GiB", "lowest cosine, alone and in a batch"]
    table(f"{options.length} tokens", header, rows)
    if options.json:
        options.json.write_text(json.dumps([dict(zip(header, row, strict=True)) for row in rows], indent=2))


if __name__ == "__main__":
    main()
