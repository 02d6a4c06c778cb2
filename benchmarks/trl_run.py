"""A complete run on chats: fine-tune with TRL, add the run folder's checkpoints, ingest, attribute.

    python benchmarks/trl_run.py TEXTS MODEL_FOLDER OUT

TEXTS has medquad.jsonl (`id`, `focus`, `question`, `text`); needs `pip install trl`. Questions on one disease become a
chat of two or three turns with a system prompt. TRL's SFTTrainer trains on the assistant's turns alone
(`assistant_only_loss`) and saves a checkpoint each epoch. lark-store then adds the run folder, sketches the chats with
the rule `assistant+end`, and finds the chats that drive held-out answers. The script compares the loss of each chat
with the trainer's own. Trained again only if OUT has no losses.json.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched

from lark_store import Store

SYSTEM = "You answer patients' questions about diseases."
TEMPLATE = (  # ChatML with the marks of the assistant's own tokens, which TRL's loss and `assistant+end` read
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chats(texts: Path, longest: int) -> list[dict[str, Any]]:
    """Return chats of two or three questions on one disease, the shorter ones."""
    by_focus: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in (texts / "medquad.jsonl").read_text().splitlines():
        row = json.loads(line)
        by_focus[row["focus"]].append(row)
    made = []
    for focus, rows in sorted(by_focus.items()):
        turns = rows[:3]
        if len(turns) < 2 or sum(len(row["text"]) for row in turns) > longest:
            continue
        messages = [{"role": "system", "content": SYSTEM}]
        for row in turns:
            messages.append({"role": "user", "content": row["question"]})
            messages.append({"role": "assistant", "content": row["text"]})
        made.append({"id": turns[0]["id"], "focus": focus, "messages": messages})
    return made


def train(rows: list[dict[str, Any]], model: Path, out: Path, options: argparse.Namespace) -> Any:
    """Fine-tune with TRL's SFTTrainer; returns the trainer with the last epoch's model."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = TEMPLATE
    config = SFTConfig(
        output_dir=str(out),
        assistant_only_loss=True,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=4,
        learning_rate=options.rate,
        lr_scheduler_type="constant",
        save_strategy="epoch",
        logging_steps=1,
        max_length=options.max_length,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        seed=0,
        use_cpu=True,
        disable_tqdm=True,
        model_init_kwargs={"dtype": "float32"},
    )
    data = Dataset.from_list([{"messages": row["messages"]} for row in rows])
    trainer = SFTTrainer(str(model), args=config, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    return trainer


def trainer_losses(trainer: Any) -> list[float]:
    """Return the trainer's own loss of each sample, alone in its batch, in nats."""
    import torch

    trainer.model.eval()
    losses = []
    with torch.no_grad():
        for row in trainer.train_dataset:
            batch = trainer.data_collator([row])
            losses.append(float(trainer.compute_loss(trainer.model, batch)))
    return losses


def main() -> None:
    """Run everything and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--queries", type=int, default=12)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rate", type=float, default=5e-5)
    parser.add_argument("--longest", type=int, default=1600, help="characters of a chat's answers")
    parser.add_argument("--max-length", type=int, default=1024)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    rows = chats(options.texts, options.longest)[: options.samples + options.queries]
    trained, held_out = rows[: options.samples], rows[options.samples :]
    if not held_out:
        raise SystemExit(f"only {len(rows)} chats are short enough: raise --longest, or lower --samples")
    for name, part in (("chats", trained), ("held-out", held_out)):
        (options.out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    losses = options.out / "losses.json"
    if not losses.is_file():
        trainer = train(trained, options.model, options.out / "run", options)
        by_id = dict(zip((row["id"] for row in trained), trainer_losses(trainer), strict=True))
        losses.write_text(json.dumps(by_id))
    expected = json.loads(losses.read_text())
    with Store.create(options.out / "trl.store") as store:
        attribute(store, options, expected)


def attribute(store: Store, options: argparse.Namespace, expected: dict[str, float]) -> None:
    """Add the run and the chats to a store, sketch, compare losses, and print hits."""
    store.checkpoint_add_run("run", options.out / "run")
    store.variant_add("trained", template="chatml", targets="assistant+end", max_length=options.max_length)
    store.source_add("chats", options.out / "chats.jsonl", stage="finetune")
    store.source_add("held-out", options.out / "held-out.jsonl", stage="query")
    checkpoints = store.sql("select name, step, epoch, learning_rate from checkpoints order by step")
    print(checkpoints)
    store.ingest(checkpoints=checkpoints["name"].to_list(), sources=["chats", "held-out"], variants=["trained"])
    last = checkpoints["name"][-1]
    losses = store.sql("select sample_id, loss from sketches where source = 'chats' and checkpoint = ?", [last])
    differences = [abs(loss - expected[name]) for name, loss in losses.iter_rows()]
    print(f"{len(differences)} chats: loss differs from the trainer's by at most {max(differences):.1e} nats")
    for row in store.sql("select sample_id from samples where source = 'held-out' limit 3").iter_rows(named=True):
        print(store.top(query=row["sample_id"], checkpoint=last, k=3))


if __name__ == "__main__":
    main()
