"""Preflight checks fail before training, and a corrected recipe runs."""

from __future__ import annotations

import json
import shutil

import pytest
from helpers.checkpoints import save_checkpoint
from helpers.study_recipe import RECIPE
from helpers.texts import qa_rows, text_rows, write_jsonl

from lark_store import Store
from lark_store.errors import CheckpointError, InputError, LarkStoreError, StoreBusyError, StoreError
from lark_store.schema.backends.open import location_at
from lark_store.schema.locks import working
from lark_store.study import report, run

SONGS = 'choose = "random"\nvariants = ["raw", "chatml"]'
PLAIN = '[[variant]]\nname = "plain"\ntemplate = "plain.jinja"\n[sketch]'


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture
def place(tmp_path, model):
    """A folder with the inputs of a study, and its recipe."""
    folder = tmp_path / "place"
    folder.mkdir()
    shutil.copytree(model, folder / "model")
    write_jsonl(folder / "qa.jsonl", qa_rows(24))
    write_jsonl(folder / "medical.jsonl", text_rows(30, "organ"))
    write_jsonl(folder / "songs.jsonl", text_rows(20))
    (folder / "tiny.toml").write_text(RECIPE, encoding="utf-8")
    return folder


class TrainingError(Exception):
    """Stands for the first step of training."""


def start(place, *changes):
    """Run until the training's first step."""

    def on_progress(progress):
        raise TrainingError(progress.label)

    text = RECIPE
    for change in changes:
        assert change[0] in text
        text = text.replace(*change)
    (place / "tiny.toml").write_text(text, encoding="utf-8")
    run(place / "tiny.toml", on_progress=on_progress)


def begun(place):
    with Store.open(place / "tiny" / "lark.store") as store:
        return store.sql("select count(*) from studies").item() == 1


FAULTS = [
    (("k = 1024", "k = 300"), "k = 300 is not a power of two"),
    (("k = 1024", 'k = 1024\nparameters = "nothing"'), "matches none of the model's 20 parameters"),
    (("k = 1024", 'k = 1024\nexclude = "("'), "is not a regular expression"),
    (('device = "cpu"', 'device = "tpu"'), "device `tpu` is not available"),
    (('path = "model"', 'path = "modle"'), "no checkpoint folder `modle`"),
    (("[evaluate]", 'optimizer = "adamwx"\n[evaluate]'), "transformers refuses.*adamwx"),
    (('"yes", "no", "maybe"', '"Yes", "No"'), "no answer of the 12 questions is a label.*`yes`"),
    (("[compare]", '[truth]\ncolumn = "fact"\n[compare]'), "no query of `test` has the same value of `fact`"),
    (('uri = "songs.jsonl"', 'uri = "sogns.jsonl"'), "there is no file `.*place/sogns.jsonl`"),
]


@pytest.mark.parametrize(("change", "message"), FAULTS)
def test_fault_is_reported_before_training_and_can_be_fixed(place, change, message):
    with pytest.raises(LarkStoreError, match=message):
        start(place, change)
    assert not begun(place)
    with pytest.raises(TrainingError, match="fine-tuning"):
        start(place, ("samples = 12", "samples = 10"))
    assert begun(place)
    assert len((place / "tiny" / "pools" / "songs.jsonl").read_text().splitlines()) == 10


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ nothing }}", "no sample of `songs` as `plain` can be used.*'nothing' is undefined"),
        (
            "hello",
            "no sample of `songs` as `plain` can be used; most often: the template omits or rewrites .*`text`",
        ),
        ("{% if", "line 1 of the template"),
        (None, r"`.*place/plain\.jinja` is neither a built-in template nor a file"),
    ],
)
def test_variant_rendering_nothing(place, template, message):
    if template is not None:
        (place / "plain.jinja").write_text(template)
    with pytest.raises(InputError, match=message):
        start(place, (SONGS, 'choose = "random"\nvariants = ["plain"]'), ("[sketch]", PLAIN))
    assert not begun(place)


def test_a_model_is_not_trained_on_its_own_predictions(place):
    write_jsonl(place / "qa.jsonl", text_rows(24, "fact"))
    changes = [('[evaluate]\nlabels = ["yes", "no", "maybe"]\n', "")]
    with pytest.raises(InputError, match=r"12 samples of `finetune` as `chatml` have no response.*own predictions"):
        start(place, *changes)
    (place / "plain.jinja").write_text("{{ text }}")
    whole = ("[sketch]", PLAIN.replace("[sketch]", 'targets = "text"\n[sketch]'))
    own = ('stage = "finetune"', 'stage = "finetune"\nvariants = ["plain"]')
    with pytest.raises(TrainingError):
        start(place, *changes, whole, own)


def test_too_long_training_sample_is_named(place):
    write_jsonl(
        place / "qa.jsonl", [{**row, "answer": "yes " * (1 + 400 * (i == 3))} for i, row in enumerate(qa_rows(24))]
    )
    with pytest.raises(InputError, match="1 samples of `finetune` as `chatml` can't be trained on; `q3`"):
        start(place)


def test_truncated_weights(place):
    weights = place / "model" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors` can't be read"):
        start(place)
    weights.write_bytes(whole)
    with pytest.raises(TrainingError):
        start(place)


def test_foreign_files_in_the_folder_are_not_used(place):
    (place / "tiny" / "checkpoints" / "checkpoint-500").mkdir(parents=True)
    with pytest.raises(InputError, match="exists, but does not belong to this study"):
        start(place)
    assert (place / "tiny" / "checkpoints" / "checkpoint-500").is_dir()
    (place / "tiny" / "pools").mkdir()
    own = (place / "songs.jsonl").rename(place / "tiny" / "pools" / "songs.jsonl")
    with pytest.raises(InputError, match="is inside the study's pools folder"):
        start(place, ('uri = "songs.jsonl"', 'uri = "tiny/pools/songs.jsonl"'))
    assert own.is_file()


def test_changed_pool_is_not_mixed_in(place):
    with pytest.raises(TrainingError):
        start(place)
    pool = place / "tiny" / "pools" / "songs.jsonl"
    pool.write_text(pool.read_text().replace("sea", "moon"))
    with pytest.raises(InputError, match="the pool of `songs` has changed"):
        start(place)


def test_one_run_at_a_time(place):
    with pytest.raises(TrainingError):
        start(place)
    with working(location_at(place / "tiny" / "lark.store"), "study", "running"), pytest.raises(StoreBusyError):
        start(place)


def test_unwritable_folder_gives_no_traceback(place):
    (place / "tiny").mkdir()
    (place / "tiny" / "pools").write_text("a file where a folder should be")
    with pytest.raises(StoreError, match=r"tiny/pools.*` can't be read or written: Not a directory") as caught:
        start(place)
    assert "run the study again: it resumes" in caught.value.hint


def test_several_processes_are_refused(place, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="trains in one process"):
        start(place)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("skip = 12\nsamples = 12", "skip = 12\nsamples = 11"), r"`source\.test\.samples` changed"),
        ((SONGS, 'choose = "random"\nvariants = ["raw"]'), r"`source\.songs\.variants` changed"),
        (('name = "songs"', 'name = "tunes"'), r"`source\.songs`, `source\.tunes` changed"),
    ],
)
def test_changed_recipe_is_reported_by_its_source_key(place, change, message):
    with pytest.raises(TrainingError):
        start(place)
    with pytest.raises(InputError, match=message):
        start(place, change)


def test_a_report_of_another_recipe_is_refused(place):
    with pytest.raises(TrainingError):
        start(place)
    with Store.open(place / "tiny" / "lark.store") as store:
        kept = store.sql("select recipe from studies").item()
        store.study_keep("study", recipe=json.loads(kept), environment={}, hashes={}, finished=True)
    (place / "tiny.toml").write_text(RECIPE.replace("songs", "tunes", 1), encoding="utf-8")
    with pytest.raises(InputError, match="started with another recipe"):
        report(place / "tiny.toml")
