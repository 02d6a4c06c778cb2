"""Facts in `trainer_state.json`, the folders of a run, and names of tensors: without a model."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from lark_store.errors import CheckpointError
from lark_store.modeling.trainer_runs import (
    TrainerFacts,
    checkpoint_folders,
    is_pattern,
    metrics_of,
    read_facts,
    step_in_name,
)
from lark_store.modeling.weight_keys import plain_name, quantisation, tensor_names, truncated, wrapped


def facts_of(folder, **state):
    (folder / "trainer_state.json").write_text(json.dumps(state))
    return read_facts(folder)


LOG = [
    {"step": 10, "learning_rate": 3e-4, "loss": 2.0},
    {"step": 20, "learning_rate": 1e-4, "loss": 1.0, "epoch": 0.5},
    {"step": 20, "eval_loss": 1.5, "eval_runtime": 3.0, "eval_test_samples_per_second": 1.0, "eval_f1": 0.5},
    "noise",
]


def test_facts_are_those_of_the_checkpoints_step(tmp_path):
    assert read_facts(tmp_path) == TrainerFacts()
    facts = facts_of(tmp_path, global_step=20, epoch=0.5, log_history=LOG)
    assert facts == TrainerFacts(20, 0.5, 1e-4, {"loss": 1.5, "f1": 0.5, "train_loss": 1.0}, ())
    later = facts_of(tmp_path, global_step=25, epoch=1, log_history=LOG)
    assert later == TrainerFacts(25, 1.0, 1e-4, {}, ("the learning rate, 0.0001, was logged at step 20",))
    earlier = facts_of(tmp_path, global_step=15, log_history=LOG)
    assert earlier.notes == ("the learning rate, 0.0001, was logged at step 20",)
    assert facts_of(tmp_path, global_step=0) == TrainerFacts(0, None, None, {}, ())


@pytest.mark.parametrize("step", [None, -1, True, 1.5, "1"])
def test_state_without_a_step_has_no_facts(tmp_path, step):
    facts = facts_of(tmp_path, global_step=step, epoch=1.0, log_history=LOG)
    assert facts == TrainerFacts(notes=(f"`{tmp_path / 'trainer_state.json'}` has no `global_step`",))


@pytest.mark.parametrize("value", [True, "1e-4", None, float("nan"), float("inf")])
def test_only_finite_numbers_are_rates_and_epochs(tmp_path, value):
    log = [{"step": 10, "learning_rate": 3e-4}, {"step": 20, "learning_rate": value}]
    facts = facts_of(tmp_path, global_step=10, epoch=value, log_history=log)
    assert (facts.epoch, facts.learning_rate, facts.notes) == (None, 3e-4, ())
    assert facts_of(tmp_path, global_step=10, log_history=log[1:]).notes == ()


def test_metrics_are_finite_numbers_without_timings():
    assert metrics_of({"eval_loss": float("nan"), "eval_acc": "high", "eval_f1": 1, "f1": 9}) == {"f1": 1.0}
    assert metrics_of({"eval_train_loss": 2.0, "loss": 1.0}) == {"train_loss": 2.0}  # a set named `train`
    times = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "jit_compilation_time")
    assert metrics_of({f"eval_{prefix}{name}": 1.0 for name in times for prefix in ("", "test_")}) == {}


def test_folders_of_a_run_are_in_order_of_step(tmp_path):
    for name in ("checkpoint-9", "checkpoint-100", "checkpoint-20", "checkpoint-x", "best", "checkpoint-5-old"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-3").write_text("a file")
    names = ["run-9", "run-20", "run-100"]
    assert list(checkpoint_folders("run", str(tmp_path))) == names
    found = checkpoint_folders("run", f"{tmp_path}/checkpoint-*")
    assert set(found) == {*names, "run-checkpoint-5-old", "run-checkpoint-x"}
    assert [name for name in found if name in names] == names
    assert found["run-20"] == tmp_path / "checkpoint-20"
    assert checkpoint_folders("run", str(tmp_path / "missing")) == {}
    with pytest.raises(CheckpointError, match="no folder matches"):
        checkpoint_folders("run", f"{tmp_path}/epoch-*")


def test_folders_of_one_name_are_refused(tmp_path):
    for name in ("a/Epoch 2", "b/epoch-2"):
        (tmp_path / name).mkdir(parents=True)
    with pytest.raises(
        CheckpointError, match=r"`.*a/Epoch 2` and `.*b/epoch-2` would both be checkpoint `run-epoch-2`"
    ):
        checkpoint_folders("run", f"{tmp_path}/*/[Ee]poch*")
    assert list(checkpoint_folders("run", f"{tmp_path}/b/*")) == ["run-epoch-2"]


def test_patterns_and_steps_in_names(tmp_path):
    (tmp_path / "a[1]").mkdir()
    assert is_pattern(f"{tmp_path}/a*")
    assert not is_pattern(f"{tmp_path}/a[1]")  # a folder of this name
    assert not is_pattern(f"{tmp_path}/b")
    assert step_in_name(tmp_path / "checkpoint-0500") == 500
    assert step_in_name(tmp_path / "my-checkpoint-5") is None


@pytest.mark.parametrize(
    ("key", "plain"),
    [
        ("module.model.w", "model.w"),
        ("module.module._orig_mod.w", "w"),
        ("model.layers.0._orig_mod.mlp._orig_mod.w", "model.layers.0.mlp.w"),
        ("model.module.w", "model.module.w"),
        ("my_orig_mod.w", "my_orig_mod.w"),
        ("submodule.w", "submodule.w"),
    ],
)
def test_prefixes_of_wrapped_models_are_removed(key, plain):
    assert plain_name(key) == plain
    assert wrapped([key, "w"]) == ([] if key == plain else [key])


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("a.weight.SCB", "bitsandbytes"),
        ("a.weight.quant_state.bitsandbytes__nf4", "bitsandbytes"),
        ("a.qzeros", "GPTQ or AWQ"),
        ("a.weight_scale_inv", "FP8"),
        ("m.experts.gate_up_proj_blocks", "MXFP4"),
        ("m.blocks", None),
        ("a.qweight.b", None),
    ],
)
def test_quantised_tensors_are_recognised_by_name(key, kind):
    assert quantisation(["model.w", key]) == (kind and (kind, key))


def test_names_of_tensors_are_read_from_whole_files(tmp_path):
    files = [tmp_path / name for name in ("a.safetensors", "cut.safetensors", "missing.safetensors", "b.safetensors")]
    save_file({"x": torch.zeros(2), "y": torch.zeros(1)}, files[0])
    save_file({"z": torch.zeros(2)}, files[3])
    files[1].write_bytes(files[0].read_bytes()[:-1])
    assert sorted(tensor_names(files)) == ["x", "y", "z"]
    assert truncated(files) == files[1]
    assert truncated([files[0], files[2]]) == files[2]
    assert truncated([files[0], files[3]]) is None
