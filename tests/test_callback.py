"""The callback for transformers' Trainer, in real trainings of a few steps."""

from __future__ import annotations

import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

import lark_store
from lark_store import LarkStoreCallback, Store
from lark_store.errors import NameInvalidError, NotAStoreError
from lark_store.modeling.trainer_runs import metrics_of

TIMES = ("runtime", "samples_per_second", "steps_per_second")


class At(TrainerCallback):
    """Does something at an event of the training."""

    def __init__(self, event, do):
        setattr(self, event, lambda *given, **_: do(given[1]))


@pytest.fixture
def path(tmp_path):
    with Store.create(tmp_path / "lark.store") as store:
        return store.path


@pytest.fixture
def data():
    ids = [list(range(start, start + 12)) for start in range(10, 26)]
    return [{"input_ids": row, "labels": row} for row in ids]


def train(tmp_path, checkpoints, data, callbacks, *, model=None, tokenizer=True, run=True, **options):
    """Train four steps on the CPU; every second is saved and evaluated."""
    model = model or AutoModelForCausalLM.from_pretrained(checkpoints["base"])
    every_second = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    settings = every_second | {"logging_steps": 1, "max_steps": 4, "learning_rate": 1e-3} | options
    args = TrainingArguments(
        tmp_path / "run",
        per_device_train_batch_size=4,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **settings,
    )
    processor = AutoTokenizer.from_pretrained(checkpoints["base"]) if tokenizer else None
    trainer = Trainer(
        model,
        args,
        train_dataset=data,
        eval_dataset=data[:4],
        processing_class=processor,
        compute_metrics=lambda found: {"accuracy": 0.5, "n": len(found.predictions), "unknown": float("nan")},
        callbacks=callbacks,
    )
    if run:
        trainer.train()
    return trainer


def added(path):
    """The checkpoints in a store by name, each with its columns and metrics."""
    with Store.open(path) as store:
        rows = {row["name"]: row for row in store.sql("select * from checkpoints order by step").to_dicts()}
        for row in store.sql("select * from checkpoint_metrics").to_dicts():
            rows[row["checkpoint"]].setdefault("metrics", {})[row["name"]] = row["value"]
    return rows


def logged(trainer, key, step):
    (results,) = [entry[key] for entry in trainer.state.log_history if entry["step"] == step and key in entry]
    return results


def test_saved_checkpoints_are_in_the_store(tmp_path, checkpoints, data, path):
    trainer = train(tmp_path, checkpoints, data, [LarkStoreCallback(path, prefix="run-1-", model="tiny")])
    rows = added(path)
    assert list(rows) == ["run-1-step-2", "run-1-step-4"]
    for step in (2, 4):
        row = rows[f"run-1-step-{step}"]
        assert (row["step"], row["epoch"], row["model"]) == (step, step / 4, "tiny")
        assert row["path"] == str(tmp_path / "run" / f"checkpoint-{step}")
        assert row["learning_rate"] == pytest.approx(logged(trainer, "learning_rate", step))
        expected = {"accuracy": 0.5, "n": 4, "loss": logged(trainer, "eval_loss", step)}
        assert row["metrics"] == expected | {"train_loss": logged(trainer, "loss", step)}


def test_added_checkpoint_can_be_ingested(tmp_path, checkpoints, texts, data, path):
    train(tmp_path, checkpoints, data, [LarkStoreCallback(path)])
    with Store.open(path) as store:
        store.source_add("finetune", texts["finetune"], stage="finetune")
        store.sketcher_add("small", k=1024)
        report = store.ingest(["step-2", "step-4"], ["finetune"], ["chatml"], sketcher="small")
    assert report.units["n_sketched"].to_list() == [6, 6]


def test_learning_rate_is_the_steps_even_if_not_logged(tmp_path, checkpoints, data, path):
    quiet = {"logging_steps": 100, "eval_strategy": "no", "lr_scheduler_type": "linear"}
    train(tmp_path, checkpoints, data, [LarkStoreCallback(path)], **quiet)
    rates = [row["learning_rate"] for row in added(path).values()]
    assert rates == pytest.approx([7.5e-4, 2.5e-4])  # steps 2 and 4 of a line from 1e-3 to 0
    assert "metrics" not in added(path)["step-2"]


def test_an_evaluation_after_the_save_sets_the_metrics(tmp_path, checkpoints, data, path):
    trainer = train(tmp_path, checkpoints, data, [LarkStoreCallback(path)], eval_strategy="no")
    assert added(path)["step-4"]["metrics"] == {"train_loss": logged(trainer, "loss", 4)}
    result = trainer.evaluate()
    trainer.predict(data[:2])
    assert added(path)["step-4"]["metrics"]["loss"] == result["eval_loss"]
    assert "loss" not in added(path)["step-2"]["metrics"]


def test_evaluation_of_the_best_model_is_not_assigned_to_the_last_checkpoint(tmp_path, checkpoints, data, path):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    trainer = train(tmp_path, checkpoints, data, [LarkStoreCallback(path)], **best)
    assert trainer.state.best_global_step == 2
    before = added(path)["step-4"]["metrics"]
    trainer.evaluate(data[:2])
    rows = added(path)
    assert rows["step-4"]["metrics"] == before
    assert rows["step-2"]["metrics"]["n"] == 2


def test_loss_of_a_set_named_train_is_separate_from_times():
    times = {f"eval_train_{name}": 1.0 for name in TIMES}
    assert metrics_of({"eval_train_loss": 2.0, "loss": 3.0, "epoch": 1.0, **times}) == {"train_loss": 2.0}


def test_tokenizer_not_saved_by_trainer_is_saved(tmp_path, checkpoints, data, path):
    def take_away(state):
        for file in (tmp_path / "run" / f"checkpoint-{state.global_step}").glob("tokenizer*"):
            file.unlink()

    train(tmp_path, checkpoints, data, [At("on_save", take_away), LarkStoreCallback(path)])
    assert len(added(path)) == 2
    assert (tmp_path / "run" / "checkpoint-2" / "tokenizer.json").is_file()


def test_failure_to_add_a_checkpoint_is_a_warning(tmp_path, checkpoints, data, path, caplog):
    trainer = train(tmp_path, checkpoints, data, [LarkStoreCallback(path)], tokenizer=False)
    assert trainer.state.global_step == 4
    assert added(path) == {}
    messages = [record.getMessage() for record in caplog.records if record.name == "lark_store.callback"]
    assert len(messages) == 2
    assert messages[0].startswith("lark-store: checkpoint `step-2` was not written to the store: ")
    assert "has no tokenizer\nhint: save one there with `tokenizer.save_pretrained`" in messages[0]


@pytest.mark.parametrize("failure", ["gone", "broken"])
def test_broken_store_does_not_end_the_training(tmp_path, checkpoints, data, path, caplog, failure):
    def harm(state):
        if state.global_step == 3 and failure == "gone":
            shutil.rmtree(path)
        elif state.global_step == 3:
            (path / "catalog.sqlite").write_bytes(b"SQLite format 3\0" + b"broken" * 1000)

    trainer = train(tmp_path, checkpoints, data, [At("on_step_end", harm), LarkStoreCallback(path)])
    assert trainer.state.global_step == 4
    (message,) = [record.getMessage() for record in caplog.records if record.name == "lark_store.callback"]
    assert "checkpoint `step-4` was not written to the store" in message
    assert "hint: " in message


def test_a_limit_on_checkpoints_is_a_warning_at_the_start(tmp_path, checkpoints, data, path, caplog):
    train(tmp_path, checkpoints, data, [LarkStoreCallback(path)], save_total_limit=1)
    messages = [record.getMessage() for record in caplog.records if record.name == "lark_store.callback"]
    assert len(messages) == 1
    assert "`save_total_limit=1`" in messages[0]
    assert len(added(path)) == 2


def test_preflight_faults_are_errors(tmp_path, path, monkeypatch):
    with pytest.raises(NotAStoreError, match="there is no lark-store at"):
        LarkStoreCallback(tmp_path / "nowhere")
    for prefix in ("Run 1 ", "-run", "x" * 86):
        with pytest.raises(NameInvalidError, match="can't start a checkpoint name"):
            LarkStoreCallback(path, prefix=prefix)
    monkeypatch.setenv("LARK_STORE", str(path))
    assert LarkStoreCallback(prefix="x" * 85)._store == path
    monkeypatch.setenv("RANK", "1")
    LarkStoreCallback(tmp_path / "nowhere")  # a process that never writes


def test_only_the_main_process_writes(tmp_path, path, caplog):
    callback = LarkStoreCallback(path)
    args = SimpleNamespace(output_dir=str(tmp_path), save_total_limit=1)
    state = SimpleNamespace(is_world_process_zero=False, global_step=2, epoch=1.0, log_history=[])
    for event in (callback.on_train_begin, callback.on_save, callback.on_evaluate):
        event(args, state, None)
    assert caplog.records == []


def test_importing_the_package_loads_no_heavy_library():
    code = "import sys, lark_store; print([m for m in ('torch', 'transformers', 'lancedb') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    assert lark_store.LarkStoreCallback is LarkStoreCallback


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft uses it
def test_a_peft_model_is_added_with_its_base(tmp_path, checkpoints, texts, data, path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(checkpoints["base"])
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    train(tmp_path, checkpoints, data, [LarkStoreCallback(path)], model=model)
    with Store.open(path) as store:
        store.source_add("finetune", texts["finetune"], stage="finetune")
        store.sketcher_add("small", k=1024, parameters="lora_")
        report = store.ingest(["step-4"], ["finetune"], ["chatml"], sketcher="small")
    assert report.units["n_sketched"].item() == 6
    assert added(path)["step-4"]["model"] == "llama"
