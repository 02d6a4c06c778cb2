"""What each interactive command costs on a small store: a process a time, in CPU seconds (user and system) and wall.

    python benchmarks/commands.py                       # builds a store in a temporary folder
    python benchmarks/commands.py --work FOLDER         # keeps it, to be used again
    python benchmarks/commands.py --against CHECKOUT    # another checkout, in turn with this one

The store has one checkpoint (a random Llama of 2 layers) and 4 sources: 60 fine-tuning questions, 50 medical texts and
50 songs, raw and in ChatML, and 4 queries; 264 sketches of 65,536 bins, scored. The figure is the best of the rounds:
other work on the machine makes a command slower, nothing makes it faster.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched

from ingest import table
from stores import save_tokenizer

from lark_store import Store

HERE = Path(__file__).parent.parent
MAIN = "import sys; from lark_store.cli import main; sys.argv[0] = 'lark-store'; main()"
COMMANDS = {
    "--help": ["--help"],
    "init": ["init", "--store", "fresh.store"],
    "show": ["show"],
    "sql": ["sql", "SELECT count(*) FROM samples"],
    "metrics": ["metrics"],
    "ft-pt": ["ft-pt", "-c", "base"],
    "trajectory": ["trajectory", "q0", "f0"],
    "top": ["top", "q0", "-c", "base"],
    "top --where": ["top", "q0", "-c", "base", "--where", "n_tokens < 300"],
    "top --method hybrid": ["top", "q0", "-c", "base", "--method", "hybrid"],
    "doctor": ["doctor"],
    "db check": ["db", "check"],
    "db status": ["db", "status"],
}


def texts() -> dict[str, tuple[str, list[dict[str, Any]]]]:
    """Return the sources by name: the stage, and the rows."""
    questions = [{"id": f"f{i}", "question": f"Is organ {i} affected?", "answer": "yes"} for i in range(60)]
    medical = [{"id": f"m{i}", "text": f"The kidney of patient {i} was seen on day {i % 7}."} for i in range(50)]
    songs = [{"id": f"s{i}", "text": f"A song about the sea and the night train number {i}."} for i in range(50)]
    asked = [{"id": f"q{i}", "question": f"Is organ {90 + i} affected?", "answer": "no"} for i in range(4)]
    return {
        "finetune": ("finetune", questions),
        "medical": ("pretrain", medical),
        "songs": ("pretrain", songs),
        "test": ("query", asked),
    }


def build(path: Path) -> None:
    """Build the store."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sources, model = texts(), path.with_name("model")
    lines = [json.dumps(row) for _, rows in sources.values() for row in rows]
    tokenizer = save_tokenizer(model, lines, 384)
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **shape)).save_pretrained(model)
    with Store.create(path) as store:
        store.checkpoint_add("base", model)
        for name, (stage, rows) in sources.items():
            file = path.with_name(f"{name}.jsonl")
            file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            store.source_add(name, file, stage=stage)
        store.ingest(["base"], ["finetune", "test"], ["chatml"])
        store.ingest(["base"], ["medical", "songs"], ["raw", "chatml"])
        store.attribute(["base"], queries="test")


def measure(arguments: list[str], checkout: Path, work: Path) -> tuple[float, float]:
    """Run a command of a checkout; returns its CPU and wall seconds."""
    shutil.rmtree(work / "fresh.store", ignore_errors=True)
    environment = os.environ | {"PYTHONPATH": str(checkout), "LARK_STORE": str(work / "lark.store")}
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(  # noqa: S603 - our own program
        [sys.executable, "-c", MAIN, *arguments], cwd=work, env=environment, capture_output=True, text=True, check=False
    )
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"`{' '.join(arguments)}` failed: {done.stderr}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def compare(options: argparse.Namespace, work: Path) -> None:
    """Measure all commands, round by round, and print the best of each."""
    checkouts = [HERE, *([options.against.resolve()] if options.against else [])]
    chosen = {name: command for name, command in COMMANDS.items() if not options.commands or name in options.commands}
    found: dict[str, list[list[tuple[float, float]]]] = {name: [[] for _ in checkouts] for name in chosen}
    for _ in range(options.rounds):
        for name, command in chosen.items():
            for times, checkout in zip(found[name], checkouts, strict=True):
                times.append(measure(command, checkout, work))
    rows = [
        [name, *(f"{min(figures):.2f}" for times in each for figures in zip(*times, strict=True))]
        for name, each in found.items()
    ]
    of_other = ["CPU s there", "wall s there"] if options.against else []
    table(f"best of {options.rounds}", ["command", "CPU s", "wall s", *of_other], rows)


def main() -> None:
    """Build the store where it is missing, and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="a folder that keeps the store")
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="another checkout to measure in turn")
    parser.add_argument("--commands", nargs="*", metavar="NAME", help="these alone, as the table names them")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        if not (work / "lark.store").exists():
            build(work / "lark.store")
        compare(options, work)


if __name__ == "__main__":
    main()
