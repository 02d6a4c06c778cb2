"""Validate scores on chats: the evaluations of benchmarks/truth.py on PubMedQA and other texts.

    python benchmarks/chats.py TEXTS MODEL_FOLDER OUT --evaluate format causal lds

TEXTS has pubmedqa_train.jsonl and pubmedqa_test.jsonl (`id`, `question`, `context`, `answer`), medquad.jsonl,
brown_entertainment.jsonl and kjv_songs.jsonl (`id`, `text`). Texts are used raw and as ChatML; the queries are
PubMedQA's test items as ChatML. `format` measures how well a score separates formats and sources, `causal` compares it
with a real step at base, `lds` with training on halves of PubMedQA. Each evaluation is resumable. More samples of
PubMedQA alone:

    python benchmarks/chats.py TEXTS MODEL_FOLDER OUT --sources pubmedqa --samples 80 --queries 32 --evaluate lds
"""

from __future__ import annotations

import argparse
import random
from functools import partial
from pathlib import Path
from typing import Any

from facts import read
from truth import RATE, SKETCHERS, show, sketch, write

from lark_store import Store, evaluate

SOURCES = {  # file, stage and domain
    "pubmedqa": ("pubmedqa_train", "finetune", "medical"),
    "medquad": ("medquad", "pretrain", "medical"),
    "brown": ("brown_entertainment", "pretrain", "fiction"),
    "songs": ("kjv_songs", "pretrain", "songs"),
    "test": ("pubmedqa_test", "query", "medical"),
}


def draw(options: argparse.Namespace, file: str, n: int) -> list[dict[str, Any]]:
    """Draw rows of a file; questions become prompts with their answers."""
    everything = read(options.texts / f"{file}.jsonl")
    rows = []
    for row in random.Random(options.seed).sample(everything, n):  # noqa: S311 (no secret)
        if file.startswith("pubmedqa"):
            prompt = f"{row['context']}\n\nQuestion: {row['question']}"
            rows.append({"id": row["id"], "prompt": prompt, "response": row["answer"]})
        else:
            rows.append({"id": row["id"], "text": row["text"]})
    return rows


def variants(options: argparse.Namespace) -> tuple[str, str]:
    """Return the names of the two variants: raw and ChatML."""
    return f"raw-{options.targets}-{options.max_length}", f"chatml-{options.targets}-{options.max_length}"


def fill(store: Store, options: argparse.Namespace) -> None:
    """Add all rows to the store and sketch."""
    store.checkpoint_add("base", options.model, learning_rate=RATE)
    sources = {name: SOURCES[name] for name in [*options.sources, "test"]}
    for name, (file, stage, domain) in sources.items():
        n = options.queries if stage == "query" else options.samples
        rows = write(options.out / "data" / f"{name}.jsonl", draw(options, file, n))
        store.source_add(name, rows, stage=stage, domain=domain)
    plain, chat = variants(options)
    fitted = f"chatml-auto-{options.max_length}"  # the variant for measuring V, for all targets
    store.variant_add(fitted, template="chatml", max_length=options.max_length)
    for name, template in ((plain, "raw"), (chat, "chatml")):
        store.variant_add(name, template=template, targets=options.targets, max_length=options.max_length)
    both_variants = (plain, chat) if "format" in options.evaluate else (chat,)
    units = [(name, (chat,) if name == "test" else both_variants) for name in sources]
    sketch(store, options, "base", units, fitted)


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    everything = [name for name, (_, stage, _) in SOURCES.items() if stage != "query"]
    parser.add_argument("--sources", nargs="+", default=everything, choices=everything)
    parser.add_argument("--samples", type=int, default=24, help="of each source")
    parser.add_argument("--queries", type=int, default=20)
    parser.add_argument("--max-length", type=int, default=192)
    parser.add_argument("--targets", default="auto", help="auto: the label if there is one; text: all tokens")
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--asked", type=int, default=12)
    parser.add_argument("--half-sets", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--sketchers", nargs="+", default=["lark", *SKETCHERS])
    parser.add_argument("--rivals", nargs="*", default=["bm25", "random", "length"])
    parser.add_argument("--evaluate", nargs="*", default=["format", "causal", "lds"])
    options = parser.parse_args()
    place = options.out / "lark.store"
    plain, chat = variants(options)
    with Store.open(place) if place.exists() else Store.create(place) as store:
        fill(store, options)
        names = [f"{name}:{method}@base" for name in options.sketchers for method in ("cosine", "centred", "whitened")]
        names += options.rivals
        common: dict[str, Any] = {"query_variant": chat, "queries": "test", "device": options.device}
        for kind in options.evaluate:
            settings = {**common, "out": options.out / kind}
            if kind == "format":
                candidates = {"sources": options.sources, "variants": [plain, chat]}
                call = partial(evaluate.format, **candidates, against_rest=["pubmedqa"], domains=["medical"])
            elif kind == "causal":
                limits = {"max_samples": options.steps, "max_queries": options.asked}
                call = partial(evaluate.causal, checkpoint="base", sources=options.sources, variants=[chat], **limits)
            else:
                training = {"half_sets": options.half_sets, "learning_rate": RATE}
                call = partial(evaluate.lds, checkpoint="base", sources=["pubmedqa"], variants=[chat], **training)
            show(kind, options, lambda: call(store, names, **settings))  # noqa: B023 (called at once)


if __name__ == "__main__":
    main()
