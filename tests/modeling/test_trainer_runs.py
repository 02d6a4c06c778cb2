"""Training runs: a Trainer's folder adds all its checkpoints, with the facts of the training."""

from __future__ import annotations

import json
import shutil

import pytest
from helpers.checkpoints import save_checkpoint
from helpers.program import lark

from lark_store import Store
from lark_store.errors import CheckpointError, InputError, NameTakenError


def save_state(folder, step, *, logged=None, **state):
    history = [{"step": step, "loss": 1.5, "learning_rate": step / 1e6, "epoch": step / 500}]
    history += [{"step": step, "eval_loss": 2.0, "eval_accuracy": 0.75, "eval_runtime": 3.0}]
    facts = {"global_step": step, "epoch": step / 500, "log_history": history if logged is None else logged}
    (folder / "trainer_state.json").write_text(json.dumps(facts | state))


def add_step(run, step, seed):
    folder = save_checkpoint(run / f"checkpoint-{step}", seed=seed)
    save_state(folder, step)
    return folder


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory):
    run = tmp_path_factory.mktemp("trainer") / "run"
    for seed, step in enumerate((500, 90, 1000)):
        add_step(run, step, seed)
    return run


@pytest.fixture
def run(saved_run, tmp_path):
    return shutil.copytree(saved_run, tmp_path / "run")


@pytest.fixture
def empty(tmp_path):
    with Store.create(tmp_path / "empty.store") as created:
        yield created


def names(store):
    return store.sql("select name from checkpoints").to_series().to_list()


def test_run_folder_adds_all_checkpoints_in_order_of_step_with_their_facts(empty, run):
    result = lark(f"checkpoint add run1 {run}", store=empty.path)
    assert result.code == 0
    assert result.err.splitlines()[0].endswith(
        ", step 90, epoch 0.18, learning rate 9e-05, accuracy 0.75, loss 2, train_loss 1.5"
    )
    rows = empty.sql("select name, step, epoch, learning_rate, path from checkpoints").rows()
    assert rows == [
        (f"run1-{step}", step, step / 500, step / 1e6, str(run / f"checkpoint-{step}")) for step in (90, 500, 1000)
    ]
    metrics = empty.sql("select name, value from checkpoint_metrics where checkpoint = 'run1-500' order by name").rows()
    assert metrics == [("accuracy", 0.75), ("loss", 2.0), ("train_loss", 1.5)]


def test_adding_a_run_again_adds_new_checkpoints_only(empty, run):
    assert empty.checkpoint_add_run("run1", run).new == {"run1-90", "run1-500", "run1-1000"}
    add_step(run, 1500, 7)
    report = empty.checkpoint_add_run("run1", run)
    assert report.new == {"run1-1500"}
    assert [info.name for info in report.checkpoints] == names(empty)


def test_incomplete_folders_are_skipped_with_the_reason(empty, run):
    (run / "checkpoint-1500").mkdir()
    cut = add_step(run, 1600, 7) / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:2000])
    result = lark(f"checkpoint add run1 {run}", store=empty.path)
    assert result.code == 0
    assert f"skipped `{run}/checkpoint-1500`: `{run}/checkpoint-1500` has no weights" in result.err
    assert f"skipped `{run}/checkpoint-1600`: `{cut}` is incomplete" in result.err
    assert names(empty) == ["run1-90", "run1-500", "run1-1000"]


def test_run_without_usable_checkpoint_is_an_error(empty, tmp_path):
    (tmp_path / "run" / "checkpoint-1").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"has no checkpoint that can be added: .*checkpoint-1` has no weights"):
        empty.checkpoint_add_run("run1", tmp_path / "run")


def test_final_model_is_added_unless_a_checkpoint_has_its_weights(empty, run):
    shutil.copytree(run / "checkpoint-500", run, dirs_exist_ok=True)  # the best model, loaded at the end
    report = empty.checkpoint_add_run("run1", run)
    assert report.notes == (f"the model in `{run}` itself has the weights of `run1-500`",)
    assert len(report.checkpoints) == 3
    save_checkpoint(run, seed=8)
    (run / "trainer_state.json").unlink()
    report = empty.checkpoint_add_run("run1", run)
    assert report.new == {"run1-final"}
    assert "its step is unknown" in report.notes[0]
    save_checkpoint(run, seed=9)
    assert "`run1-final` is an earlier final model" in empty.checkpoint_add_run("run1", run).skipped[str(run)]
    save_state(run, 1200)
    assert empty.checkpoint_add_run("run2", run).checkpoints[-1].step == 1200


@pytest.mark.parametrize("option", [{"step": 3}, {"epoch": 1.0}, {"learning_rate": 0.1}, {"metrics": {"f1": 0.5}}])
def test_options_of_one_checkpoint_are_refused_for_a_run(empty, run, option):
    with pytest.raises(InputError, match=r"is for one checkpoint, but `.*` has 3") as caught:
        empty.checkpoint_add_run("run1", run, **option)
    assert "trainer_state.json" in caught.value.hint
    assert names(empty) == []


def test_glob_pattern_adds_matching_folders(empty, run, tmp_path):
    lark(f"checkpoint add run1 '{run}/checkpoint-?00*'", store=empty.path)
    assert names(empty) == ["run1-500", "run1-1000"]
    shutil.copytree(run / "checkpoint-90", tmp_path / "Epoch 2")
    assert empty.checkpoint_add_run("e", f"{tmp_path}/Ep*").new == {"e-epoch-2"}
    with pytest.raises(CheckpointError, match="no folder matches"):
        empty.checkpoint_add_run("run1", f"{run}/nothing-*")
    shutil.copytree(run, tmp_path / "other" / "run")
    shutil.copytree(run, tmp_path / "another" / "run")
    with pytest.raises(CheckpointError, match="would both be checkpoint `x-90`"):
        empty.checkpoint_add_run("x", f"{tmp_path}/*other/run/checkpoint-*")


def test_changed_weights_are_refused_before_anything_is_added(empty, run):
    empty.checkpoint_add_run("run1", run)
    add_step(run, 1000, 7)
    add_step(run, 95, 8)
    with pytest.raises(NameTakenError, match="checkpoint `run1-1000` is already in the store with other weights"):
        empty.checkpoint_add_run("run1", run)
    assert "run1-95" not in names(empty)


def test_single_folder_takes_its_facts_unless_given(empty, run):
    folder = run / "checkpoint-500"
    info = empty.checkpoint_add("one", folder, step=7, metrics={"loss": 9.0})
    assert (info.step, info.epoch, info.learning_rate) == (7, 1.0, 5e-4)
    assert info.metrics == {"loss": 9.0, "accuracy": 0.75, "train_loss": 1.5}
    again = empty.checkpoint_add("one", folder)
    assert (again.step, again.metrics) == (7, info.metrics)


def test_learning_rate_of_an_earlier_step_is_noted(empty, run):
    folder = run / "checkpoint-500"
    save_state(folder, 500, logged=[{"step": 490, "learning_rate": 0.25}, {"step": 500, "eval_loss": float("nan")}])
    info = empty.checkpoint_add("one", folder)
    assert info.learning_rate == 0.25
    assert info.metrics == {}
    assert info.notes == ("the learning rate, 0.25, was logged at step 490",)
    assert empty.checkpoint_add("two", folder, learning_rate=0.5).notes == ()


def test_folder_without_trainer_state_takes_its_step_from_its_name(empty, run):
    (run / "checkpoint-90" / "trainer_state.json").unlink()
    first = empty.checkpoint_add_run("run1", run).checkpoints[0]
    assert (first.step, first.learning_rate) == (90, None)
    assert "the step is from the folder's name" in first.notes[0]


def test_one_checkpoint_is_asked_for_but_a_run_is_given(empty, run):
    with pytest.raises(CheckpointError, match="is the folder of a training run, with 3 checkpoints") as caught:
        empty.checkpoint_add("run1", run)
    assert caught.value.hint == f'add them all with `store.checkpoint_add_run("run1", "{run}")`'


def test_checkpoint_in_the_store_is_updated_though_its_folder_has_a_run(empty, run):
    save_checkpoint(run, seed=8)
    empty.checkpoint_add("final", run)
    assert empty.checkpoint_add_run("final", run, metrics={"f1": 0.5}).checkpoints[0].metrics == {"f1": 0.5}
    assert names(empty) == ["final"]
