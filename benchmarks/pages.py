"""Seconds that each page of the explorer takes on a store of 100,000 sketches, warm.

    python benchmarks/pages.py FOLDER [--rows 100000]

The sketches are random vectors of 1,024 bins, imported at two checkpoints (a tiny random Llama under two names), half
of the rows at each; 64 queries are scored. The store is made once and stays in FOLDER. Each page is asked four times in
this process; the first is left out, and the median of the others printed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import polars as pl
from starlette.testclient import TestClient

from lark_store import Store
from lark_store.ui.app import application
from lark_store.ui.explorer import Explorer
from lark_store.ui.jobs import Jobs

BINS, QUERIES, CHECKPOINTS = 1024, 64, ("epoch-1", "epoch-2")
SOURCES = {"finetune": ("finetune", 0.2), "medical": ("pretrain", 0.4), "songs": ("pretrain", 0.4)}
SKETCHER, VARIANT, ASKED = "random", "raw", 4
TOKEN, HOST = "a-token-for-the-benchmark", "127.0.0.1:8000"
PAGES = (
    "/",
    "/queries",
    "/query/query-7",
    "/checkpoints/query-7",
    "/plot/histogram.svg?query=query-7",
    "/plot/trajectory.svg?query=query-7",
    "/sample/finetune/finetune-7",
    "/samples/finetune",
    "/map",
    "/map?by=topic",
    "/dominance",
    "/plot/dominance.svg",
    "/ask",
    "/compare",
    "/sql?query=SELECT+source,+avg(loss)+FROM+sketches+GROUP+BY+ALL",
)


def model(folder: Path) -> Path:
    """Save a tiny random Llama, which no page loads."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    if not (folder / "config.json").is_file():
        tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))  # noqa: S106
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")  # noqa: S106
        fast.save_pretrained(folder)
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes)).save_pretrained(folder)
    return folder


def make(folder: Path, rows: int) -> Path:
    """Make the store, and score its queries."""
    path = folder / "lark.store"
    if (folder / "made").is_file():
        return path
    generator = np.random.default_rng(0)
    with Store.create(path) as store:
        for epoch, name in enumerate(CHECKPOINTS, start=1):
            store.checkpoint_add(name, model(folder / "model"), epoch=epoch)
        sizes = {name: round(rows / len(CHECKPOINTS) * share) for name, (_, share) in SOURCES.items()}
        for name, n in (sizes | {"query": QUERIES}).items():
            samples = [
                {"id": f"{name}-{i}", "text": f"Text {i} of {name} about topic {i % 20}.", "topic": f"topic {i % 20}"}
                for i in range(n)
            ]
            file = folder / f"{name}.jsonl"
            file.write_text("".join(f"{json.dumps(sample)}\n" for sample in samples), encoding="utf-8")
            store.source_add(name, file, stage=SOURCES[name][0] if name in SOURCES else "query")
            for checkpoint in CHECKPOINTS:
                vectors = folder / "vectors.parquet"
                numbers = generator.standard_normal((n, BINS), np.float32)
                ids = [sample["id"] for sample in samples]
                loss = generator.random(n, np.float32)
                frame = pl.DataFrame(
                    {"sample_id": ids, "loss": loss, "vector": pl.Series(numbers, dtype=pl.Array(pl.Float32, BINS))}
                )
                frame.write_parquet(vectors)
                store.sketcher_import(SKETCHER, vectors, checkpoint=checkpoint, source=name, variant=VARIANT)
        store.attribute(list(CHECKPOINTS), queries="query", sketcher=SKETCHER)
    (folder / "made").touch()
    return path


def seconds(client: TestClient, page: str) -> list[float]:
    """Ask for a page, and return the seconds of each time."""
    taken = []
    for _ in range(ASKED):
        start = time.perf_counter()
        response = client.get(page)
        taken.append(time.perf_counter() - start)
        assert response.status_code == 200, (page, response.text)
    return taken


def main() -> None:
    """Print a row per page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=100_000)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    path = make(options.folder, options.rows)
    with Store.open(path) as store:
        explorer = Explorer(store, Jobs(str(path), None))
        app = application(explorer, hosts={HOST}, token=TOKEN, cookie="explorer")
        client = TestClient(app, base_url=f"http://{HOST}", cookies={"explorer": TOKEN})
        print("| page | seconds, warm | first |\n|---|---|---|")
        for page in PAGES:
            first, *rest = seconds(client, page)
            print(f"| `{page}` | {statistics.median(rest):.2f} | {first:.2f} |", flush=True)


if __name__ == "__main__":
    main()
