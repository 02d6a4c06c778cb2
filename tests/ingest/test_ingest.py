"""Ingest as a user meets it: idempotent, resumable, clear about failures."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from helpers.checkpoints import save_checkpoint
from helpers.program import PROGRAM
from helpers.stores import copy_store, fill_store, read_sketches, store_label
from helpers.texts import qa_rows, write_jsonl
from transformers import AutoModelForCausalLM

from lark_store import Store
from lark_store.errors import CheckpointChangedError, CheckpointError, InputError, NameUnknownError, StoreBusyError
from lark_store.ingest.ingest_runs import locked
from lark_store.ingest.units import Unit, _plan
from lark_store.schema.table_schemas import SKETCH_PREFIX

N_MANY = 256  # several commits
JOB = (["base"], ["finetune", "songs"], ["chatml"])


def test_stored_sketches_follow_the_schema(scored):
    table = read_sketches(scored)
    assert len(table) == 2 * (6 + 4 + 2 * 10)
    assert table["row_key"].is_unique().all()
    vectors = np.stack(table["vector"].to_numpy()).astype(np.float64)
    assert vectors.shape[1] == 1024
    np.testing.assert_allclose((vectors**2).sum(axis=1), 1024, rtol=1e-3)
    assert (table["n_loss_tokens"] < table["n_tokens"]).all()
    assert (table["grad_norm"] > 0).all()
    assert table["loss"].is_between(0, 20).all()


def test_stored_sketch_is_the_gradient_of_its_loss(scored, checkpoints):
    rendered = scored.variant_show("chatml", sample="q100")
    model = AutoModelForCausalLM.from_pretrained(checkpoints["base"]).eval()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoints["base"])
    ids = torch.tensor([tokenizer("".join(rendered.pieces), add_special_tokens=False)["input_ids"]])
    logits = model(input_ids=ids).logits[0].log_softmax(dim=-1)
    losses = [-logits[t - 1, ids[0, t]] for t, target in enumerate(rendered.is_target) if target]
    stored = read_sketches(scored).row(by_predicate=pl.col("row_key") == "base/test/chatml/q100", named=True)
    assert stored["loss"] == pytest.approx(float(torch.stack(losses).mean().detach()), rel=1e-4)
    assert stored["n_loss_tokens"] == len(losses)


def test_two_ingests_equal_one(store):
    first = store.ingest(*JOB, sketcher="small")
    before = read_sketches(store)
    second = store.ingest(*JOB, sketcher="small")
    assert first.units["n_sketched"].to_list() == [6, 5]
    assert second.units["n_sketched"].to_list() == [0, 0]
    assert second.units["n_existing"].to_list() == [6, 5]
    assert read_sketches(store).equals(before)
    assert len(store.sql("select * from ingest_runs")) == 2


def test_limit_takes_the_first_samples(store):
    assert store.ingest(["base"], ["finetune"], ["raw"], sketcher="small", limit=2).units["n_sketched"].item() == 2
    assert read_sketches(store)["sample_id"].to_list() == ["q0", "q1"]
    assert store.ingest(["base"], ["finetune"], ["raw"], sketcher="small").units["n_sketched"].item() == 4
    with pytest.raises(InputError, match="`limit` must be at least 1"):
        store.ingest(["base"], ["finetune"], ["raw"], limit=0)


def test_only_new_samples_are_sketched(store, tmp_path):
    store.ingest(["base"], ["finetune"], ["raw"], sketcher="small")
    store.source_add("finetune", write_jsonl(tmp_path / "more.jsonl", qa_rows(8)), stage="finetune")
    report = store.ingest(["base"], ["finetune"], ["raw"], sketcher="small")
    assert report.units.select("n_existing", "n_sketched").row(0) == (6, 2)


def test_float32_is_stored_unrounded(store):
    store.sketcher_add("fine", k=256, dtype="float32")
    store.ingest(["base"], ["finetune"], ["raw"], sketcher="fine")
    vectors = np.stack(read_sketches(store)["vector"].to_numpy())
    assert vectors.dtype == np.float32
    np.testing.assert_allclose((vectors.astype(np.float64) ** 2).sum(axis=1), 256, rtol=1e-6)


def test_failed_samples_are_recorded_and_others_sketched(store, tmp_path):
    long = {"id": "long", "prompt": "why?", "response": "because " * 200}
    good = {"id": "ok", "prompt": "a", "response": "b"}
    store.source_add("odd", write_jsonl(tmp_path / "odd.jsonl", [long, good]), stage="finetune")
    store.variant_add("short", template="chatml", max_length=64)
    for _ in range(2):  # a failed sample is tried again, and recorded once a run
        report = store.ingest(["base"], ["odd"], ["short"], sketcher="small")
        assert report.n_failed == 1
        assert report.failures["sample_id"].to_list() == ["long"]
        assert "can't be cut" in report.failures["reason"].item()
    assert read_sketches(store)["sample_id"].to_list() == ["ok"]
    assert store.sql("select count(*) from failures where sample_id = 'long'").item() == 2


def test_a_run_keeps_its_recipe_versions_and_counts(scored):
    run = scored.sql(
        "select *, recipe->>'precision' as precision, versions->>'torch' as torch from ingest_runs order by ingest_run"
    ).row(0, named=True)
    assert (run["status"], run["checkpoint"], run["source"], run["variant"]) == ("done", "base", "finetune", "chatml")
    assert (run["n_existing"], run["n_sketched"], run["n_failed"]) == (0, 6, 0)
    assert run["precision"] == "float32"
    assert run["torch"] == torch.__version__
    assert run["device"].startswith("cpu")
    assert run["lance_version"] > 0
    assert run["finished_at"] >= run["started_at"]


def test_scalar_indices_cover_all_rows(scored):
    (name,) = [n for n in scored._db.vectors.table_names() if n.startswith(SKETCH_PREFIX)]
    table = scored._db.vectors.table(name)
    kinds = {index.columns[0]: index.index_type for index in table.list_indices()}
    bitmaps = dict.fromkeys(("checkpoint", "source", "variant", "ingest_run"), "Bitmap")
    assert kinds == bitmaps | {"row_key": "BTree"}
    assert all(table.index_stats(f"{column}_idx").num_unindexed_rows == 0 for column in kinds)


def test_two_layouts_never_share_a_table(store, tmp_path):
    store.checkpoint_add("wider", save_checkpoint(tmp_path / "wider", hidden_size=128))
    store.ingest(["base", "wider"], ["finetune"], ["raw"], sketcher="small")
    assert len([n for n in store._db.vectors.table_names() if n.startswith(SKETCH_PREFIX)]) == 2


@pytest.mark.parametrize("kind", ["checkpoint", "source", "variant", "sketcher"])
def test_a_wrong_name_changes_nothing(store, kind):
    names = {"checkpoint": "base", "source": "finetune", "variant": "raw", "sketcher": "small"}
    names[kind] += "x"
    with pytest.raises(NameUnknownError, match=f"did you mean `{names[kind][:-1]}`"):
        store.ingest([names["checkpoint"]], [names["source"]], [names["variant"]], sketcher=names["sketcher"])
    assert store.sql("select count(*) from ingest_runs").item() == 0


def test_a_checkpoint_that_changed_is_refused(store, tmp_path):
    path = save_checkpoint(tmp_path / "moving")
    store.checkpoint_add("moving", path)
    save_checkpoint(path, seed=9)
    with pytest.raises(CheckpointChangedError, match="weights of checkpoint `moving`"):
        store.ingest(["moving"], ["finetune"], ["raw"], sketcher="small")
    save_checkpoint(path)
    (path / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(CheckpointChangedError, match="tokenizer or configuration of checkpoint `moving`"):
        store.ingest(["moving"], ["finetune"], ["raw"], sketcher="small")
    assert store.sql("select count(*) from ingest_runs").item() == 0


def test_checkpoints_that_cannot_be_used_give_the_reason(store, tmp_path, checkpoints):
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        store.checkpoint_add("gone", tmp_path / "gone")
    bare = tmp_path / "bare"
    bare.mkdir()
    for missing, message in (("config.json", "no config"), ("model.safetensors", "safetensors"), ("tok", "tokenizer")):
        with pytest.raises(CheckpointError, match=message):
            store.checkpoint_add("bare", bare)
        for file in checkpoints["base"].iterdir():
            if file.name.startswith(missing):
                shutil.copy(file, bare)
    broken = tmp_path / "broken"
    shutil.copytree(checkpoints["base"], broken)
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:-1000])
    store.checkpoint_add("broken", broken)
    with pytest.raises(CheckpointError, match="can't be loaded"):
        store.ingest(["broken"], ["finetune"], ["raw"], sketcher="small")
    assert store.sql("select count(*) from ingest_runs").item() == 0


def test_incomplete_weights_are_refused(store, tmp_path, checkpoints):
    from safetensors.torch import load_file, save_file

    path = tmp_path / "partial"
    shutil.copytree(checkpoints["base"], path)
    tensors = load_file(path / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    store.checkpoint_add("partial", path)
    with pytest.raises(CheckpointError, match=r"lack 1 of the model's tensors, such as `model.layers.1.mlp.up_proj"):
        store.ingest(["partial"], ["finetune"], ["raw"], sketcher="small")


def test_concurrent_ingests_do_not_repeat_work(store):
    from lark_store.schema.catalog import Checkpoint, FormatVariant, Sketcher, Source
    from lark_store.schema.database import find

    with store._db.session() as session:
        unit = Unit(*(find(session, *x) for x in ((Checkpoint, "base"), (Source, "finetune"), (FormatVariant, "raw"))))
        sketcher = find(session, Sketcher, "small")
    plan = _plan(sketcher, unit.checkpoint, [unit])
    busy = pytest.raises(StoreBusyError, match="another process is ingesting base · finetune · raw")
    with locked(store._db, plan.fingerprint, unit.names), busy:
        store.ingest(["base"], ["finetune"], ["raw"], sketcher="small")


def _end_half_way(path: Path, signal_number: int) -> int:
    """Start an ingest of `many` in a process of its own, end it once some are committed; returns its status."""
    command = [PROGRAM, "ingest", "-c", "base", "-s", "many", "--variant", "chatml", "--sketcher", "small"]
    process = subprocess.Popen([*command, "--store", store_label(path)], stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 120
    with Store.open(path) as store:
        while time.monotonic() < deadline and process.poll() is None:
            names = [n for n in store._db.vectors.table_names() if n.startswith(SKETCH_PREFIX)]
            if names and store._db.vectors.has(names[0]) and store._db.vectors.table(names[0]).count_rows() >= 64:
                break
            time.sleep(0.02)
    process.send_signal(signal_number)
    process.communicate(timeout=60)
    return process.returncode


@pytest.fixture(scope="module")
def many_path(tmp_path_factory, checkpoints, texts):
    """A store with a source `many` of `N_MANY` samples, not ingested."""
    root = tmp_path_factory.mktemp("many")
    with Store.create(root / "lark.store") as store:
        fill_store(store, checkpoints, texts)
        store.source_add("many", write_jsonl(root / "many.jsonl", qa_rows(N_MANY)), stage="finetune")
    return root / "lark.store"


@pytest.fixture(scope="module")
def many_sketches(many_path, tmp_path_factory):
    """The sketches of an uninterrupted ingest of `many`."""
    with Store.open(copy_store(many_path, tmp_path_factory.mktemp("whole") / "lark.store")) as whole:
        whole.ingest(["base"], ["many"], ["chatml"], sketcher="small")
        return read_sketches(whole)


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT])
def test_resumed_ingest_equals_an_uninterrupted_one(tmp_path, many_path, many_sketches, ending):
    path = copy_store(many_path, tmp_path / "killed")
    status = _end_half_way(path, ending)
    with Store.open(path) as killed:
        assert status == (130 if ending == signal.SIGINT else -signal.SIGKILL)
        written = len(read_sketches(killed))
        assert 64 <= written < N_MANY
        assert killed.sql("select count(*) from sketches").item() == 0  # readers see committed runs only
        report = killed.ingest(["base"], ["many"], ["chatml"], sketcher="small")
        assert report.units["n_existing"].item() == written
        assert report.units["n_sketched"].item() == N_MANY - written
        assert killed.sql("select n_sketched from ingest_runs").item() == N_MANY
        assert killed.sql("select count(*) from sketches").item() == N_MANY
        again = read_sketches(killed)
    # The samples came in other batches, so the vectors are the same up to rounding.
    columns = ["row_key", "n_tokens", "n_loss_tokens"]
    assert again.select(columns).equals(many_sketches.select(columns))
    vectors, others = (np.stack(frame["vector"].to_numpy()).astype(np.float64) for frame in (again, many_sketches))
    norms = np.linalg.norm(vectors, axis=1) * np.linalg.norm(others, axis=1)
    assert ((vectors * others).sum(axis=1) / norms > 0.99999).all()
    np.testing.assert_allclose(again["grad_norm"], many_sketches["grad_norm"], rtol=1e-4)


def test_next_ingest_commits_a_run_killed_after_its_last_row(store):
    from lark_store.schema.catalog import IngestRun

    store.ingest(["base"], ["finetune"], ["raw"], sketcher="small")
    with store._db.session() as session:
        session.get(IngestRun, 1).status = "running"
    assert store.sql("select count(*) from sketches").item() == 0
    report = store.ingest(["base"], ["finetune"], ["raw"], sketcher="small")
    assert report.units["n_sketched"].item() == 0
    assert store.sql("select count(*) from sketches").item() == 6


def test_rows_of_an_unfinished_run_of_another_recipe_are_kept(store):
    from lark_store.schema.catalog import IngestRun

    store.ingest(["base"], ["finetune"], ["raw"], sketcher="small", limit=2)
    with store._db.session() as session:
        session.get(IngestRun, 1).status = "running"
    store.ingest(["base"], ["finetune"], ["raw"], sketcher="small")
    runs = store.sql("select status, n_sketched, error from ingest_runs order by ingest_run")
    assert runs.rows() == [("done", 2, "running; its rows are kept"), ("done", 4, None)]
    assert store.sql("select count(*) from sketches").item() == 6


def test_samples_never_exceed_the_models_context(store, tmp_path):
    long = [{"id": "long", "text": "A song about the sea. " * 100}]
    store.source_add("long", write_jsonl(tmp_path / "long.jsonl", long), stage="pretrain")
    store.ingest(["base"], ["long"], ["raw"], sketcher="small")
    assert store.sql("select n_tokens from sketches").item() == 256  # the model's; the variant allows 1,024


def test_a_sample_that_the_model_cannot_take_is_a_failure(store, tmp_path):
    store.checkpoint_add("small-vocabulary", save_checkpoint(tmp_path / "v", vocab_size=200))
    report = store.ingest(["small-vocabulary"], ["songs"], ["raw"], sketcher="small")
    assert report.n_failed == 5
    assert "is outside the model's vocabulary of 200" in report.failures["reason"][0]
