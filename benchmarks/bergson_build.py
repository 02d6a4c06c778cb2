"""Time bergson's build of its index of projected gradients; prints one JSON object.

Runs in bergson's environment (see README.md) and imports nothing from lark-store. The steps are those of `bergson
build`, called one by one to exclude loading the model:

    python benchmarks/bergson_build.py MODEL_FOLDER SAMPLES.jsonl

A sample is {"text": …}, or {"input_ids": […], "labels": […]} with -100 for non-targets. The timer covers
`collect_gradients`: forward, backward, projection, and writing the index to disk. A warm-up on one sample, with a
separate index, creates the projection matrices.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no downloads


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a model and tokenizer as transformers saves them")
    parser.add_argument("samples", type=Path, help="samples, one JSON object per line (.jsonl)")
    parser.add_argument(
        "--projection-dim", type=int, default=16, help="p: each module's gradient becomes p × p; 0: off"
    )
    parser.add_argument("--token-batch-size", type=int, default=2048, help="tokens per batch, padding included")
    parser.add_argument("--loss-reduction", choices=["mean", "sum"], default="mean", help="over a sample's targets")
    return parser.parse_args()


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Build an index in `folder` and return its figures."""
    import torch
    from bergson.build import (
        allocate_batches,
        collect_gradients,
        create_processor,
        setup_data_pipeline,
        setup_model_and_peft,
    )
    from bergson.collector.collector import HookCollectorBase
    from bergson.config.config import DataConfig, DistributedConfig, IndexConfig

    settings = {
        "projection_dim": options.projection_dim,
        "token_batch_size": options.token_batch_size,
        "loss_reduction": options.loss_reduction,
        "precision": "fp32",
    }
    index = IndexConfig(
        run_path=str(folder / "index"),
        model=str(options.model),
        data=DataConfig(dataset=str(options.samples)),
        distributed=DistributedConfig(nproc_per_node=1),
        **settings,
    )
    first = replace(index, run_path=str(folder / "first"))
    for config in (index, first):
        config.partial_run_path.mkdir(parents=True)
    data, _ = setup_data_pipeline(index)
    start = time.perf_counter()
    model, modules = setup_model_and_peft(index)
    loaded = time.perf_counter() - start
    processor = create_processor(model, index, modules)
    batches = allocate_batches(data["length"][:], index.token_batch_size)

    def collect(config: IndexConfig, selection: list[list[int]]) -> tuple[float, float]:
        start, cpu = time.perf_counter(), time.process_time()
        collect_gradients(model, data, processor, config, batches=selection, target_modules=modules)
        return time.perf_counter() - start, time.process_time() - cpu

    warm_up, _ = collect(first, [batches[-1][-1:]])
    seconds, cpu_seconds = collect(index, batches)
    covered = HookCollectorBase.discover_targets(model.base_model, modules)
    samples = sum(len(batch) for batch in batches)
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "samples": samples,
        "seconds_per_sample": seconds / samples,
        "tokens": sum(data["length"][:]),
        "batch_sizes": [len(batch) for batch in batches],
        "warm_up_seconds": warm_up,
        "load_seconds": loaded,
        "bytes_per_sample": (index.partial_run_path / "gradients.bin").stat().st_size / len(data),
        "n_modules": len(covered),
        "n_covered": sum(shape.numel() for _, shape, _ in covered.values()),
        "n_parameters": sum(p.numel() for p in model.parameters()),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "mean_loss": sum(_losses(index)) / samples,
        "settings": settings
        | {"device": str(model.device), "threads": torch.get_num_threads(), "torch": torch.__version__},
    }


def _losses(index: Any) -> list[float]:
    from datasets import load_from_disk

    return [float(loss) for loss in load_from_disk(str(index.partial_run_path / "data.hf"))["loss"]]


def main() -> None:
    """Run the benchmark; reserve stdout for the JSON object, since bergson prints there."""
    options = arguments()
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("HF_DATASETS_CACHE", f"{folder}/cache")
        with contextlib.redirect_stdout(sys.stderr):
            figures = measure(options, Path(folder))
    from importlib.metadata import version

    figures["settings"]["bergson"] = version("bergson")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
