"""Ingest as a user meets it: idempotent, resumable, clear about what failed."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from conftest import fill, named, qa_rows, save_checkpoint, write_jsonl
from transformers import AutoModelForCausalLM

from lark_store import Store
from lark_store.errors import CheckpointChangedError, CheckpointError, InputError, NameUnknownError, StoreBusyError
from lark_store.ingest.ledger import held
from lark_store.ingest.run import Unit, _plan
from lark_store.schema.vectors import SKETCH_PREFIX

JOB = (["base"], ["finetune", "songs"], ["chatml"])
PROGRAM = Path(sys.executable).with_name("lark-store")


def rows(store: Store) -> pl.DataFrame:
    """All sketches with their vectors, in order of key."""
    (name,) = [n for n in store._db.vectors.table_names() if n.startswith(SKETCH_PREFIX)]
    return pl.from_arrow(store._db.vectors.table(name).to_arrow()).sort("row_key")


def test_sketches_are_stored_as_the_schema_says(scored):
    table = rows(scored)
    assert len(table) == 2 * (6 + 4 + 2 * 10)
    assert table["row_key"].is_unique().all()
    vectors = np.stack(table["vector"].to_numpy()).astype(np.float64)
    assert vectors.shape[1] == 1024
    np.testing.assert_allclose((vectors**2).sum(axis=1), 1024, rtol=1e-3)
    assert (table["n_loss_tokens"] < table["n_tokens"]).all()
    assert (table["grad_norm"] > 0).all()
    assert table["loss"].is_between(0, 20).all()


def test_a_stored_sketch_is_the_gradient_of_its_loss(scored, checkpoints):
    shown = scored.variant_show("chatml", sample="q100")
    model = AutoModelForCausalLM.from_pretrained(checkpoints["base"]).eval()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoints["base"])
    ids = torch.tensor([tokenizer("".join(shown.pieces), add_special_tokens=False)["input_ids"]])
    logits = model(input_ids=ids).logits[0].log_softmax(dim=-1)
    losses = [-logits[t - 1, ids[0, t]] for t, target in enumerate(shown.is_target) if target]
    stored = rows(scored).row(by_predicate=pl.col("row_key") == "base/test/chatml/q100", named=True)
    assert stored["loss"] == pytest.approx(float(torch.stack(losses).mean().detach()), rel=1e-4)
    assert stored["n_loss_tokens"] == len(losses)


def test_two_ingests_give_the_rows_of_one(store):
    first = store.ingest(*JOB, sketcher="small")
    before = rows(store)
    second = store.ingest(*JOB, sketcher="small")
    assert first.units["n_sketched"].to_list() == [6, 5]
    assert second.units["n_sketched"].to_list() == [0, 0]
    assert second.units["n_existing"].to_list() == [6, 5]
    assert rows(store).equals(before)
    assert len(store.sql("select * from ingest_runs")) == 2


def test_a_limit_takes_the_first_samples_and_the_rest_comes_later(store):
    assert store.ingest(["base"], ["finetune"], ["raw"], sketcher="small", limit=2).units["n_sketched"].item() == 2
    assert rows(store)["sample_id"].to_list() == ["q0", "q1"]
    assert store.ingest(["base"], ["finetune"], ["raw"], sketcher="small").units["n_sketched"].item() == 4
    with pytest.raises(InputError, match="limit of 0"):
        store.ingest(["base"], ["finetune"], ["raw"], limit=0)


def test_new_samples_alone_are_sketched(store, tmp_path):
    store.ingest(["base"], ["finetune"], ["raw"], sketcher="small")
    store.source_add("finetune", write_jsonl(tmp_path / "more.jsonl", qa_rows(8)), stage="finetune")
    report = store.ingest(["base"], ["finetune"], ["raw"], sketcher="small")
    assert report.units.select("n_existing", "n_sketched").row(0) == (6, 2)


def test_float32_is_stored_unrounded(store):
    store.sketcher_add("fine", k=256, dtype="float32")
    store.ingest(["base"], ["finetune"], ["raw"], sketcher="fine")
    vectors = np.stack(rows(store)["vector"].to_numpy())
    assert vectors.dtype == np.float32
    np.testing.assert_allclose((vectors.astype(np.float64) ** 2).sum(axis=1), 256, rtol=1e-6)


def test_samples_that_fail_are_recorded_and_the_others_done(store, tmp_path):
    long = {"id": "long", "prompt": "why?", "response": "because " * 200}
    good = {"id": "ok", "prompt": "a", "response": "b"}
    store.source_add("odd", write_jsonl(tmp_path / "odd.jsonl", [long, good]), stage="finetune")
    store.variant_add("short", template="chatml", max_length=64)
    for _ in range(2):  # a failed sample is tried again, and recorded once a run
        report = store.ingest(["base"], ["odd"], ["short"], sketcher="small")
        assert report.n_failed == 1
        assert report.failures["sample_id"].to_list() == ["long"]
        assert "can't be cut" in report.failures["reason"].item()
    assert rows(store)["sample_id"].to_list() == ["ok"]
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


@pytest.mark.parametrize("what", ["checkpoint", "source", "variant", "sketcher"])
def test_a_wrong_name_changes_nothing(store, what):
    names = {"checkpoint": "base", "source": "finetune", "variant": "raw", "sketcher": "small"}
    names[what] += "x"
    with pytest.raises(NameUnknownError, match=f"did you mean `{names[what][:-1]}`"):
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
    with pytest.raises(CheckpointChangedError, match="tokenizer of checkpoint `moving`"):
        store.ingest(["moving"], ["finetune"], ["raw"], sketcher="small")
    assert store.sql("select count(*) from ingest_runs").item() == 0


def test_checkpoints_that_cannot_be_used_say_why(store, tmp_path, checkpoints):
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


def test_weights_that_lack_tensors_are_refused(store, tmp_path, checkpoints):
    from safetensors.torch import load_file, save_file

    path = tmp_path / "partial"
    shutil.copytree(checkpoints["base"], path)
    tensors = load_file(path / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    store.checkpoint_add("partial", path)
    with pytest.raises(CheckpointError, match=r"lack 1 of the model's tensors, such as `model.layers.1.mlp.up_proj"):
        store.ingest(["partial"], ["finetune"], ["raw"], sketcher="small")


def test_work_in_progress_elsewhere_is_not_done_twice(store):
    from lark_store.schema.catalog import Checkpoint, FormatVariant, Sketcher, Source
    from lark_store.schema.database import find

    with store._db.session() as session:
        unit = Unit(*(find(session, *x) for x in ((Checkpoint, "base"), (Source, "finetune"), (FormatVariant, "raw"))))
        sketcher = find(session, Sketcher, "small")
    plan = _plan(sketcher, unit.checkpoint, [unit])
    busy = pytest.raises(StoreBusyError, match="another process is ingesting base · finetune · raw")
    with held(store._db, plan.fingerprint, unit.names), busy:
        store.ingest(["base"], ["finetune"], ["raw"], sketcher="small")


def _end_half_way(path: Path, signal_number: int) -> int:
    """Start an ingest of 400 samples in a process of its own, end it once some are committed; returns its status."""
    command = [PROGRAM, "ingest", "-c", "base", "-s", "many", "--variant", "chatml", "--sketcher", "small"]
    process = subprocess.Popen([*command, "--store", named(path)], stderr=subprocess.PIPE, stdout=subprocess.PIPE)
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


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT])
def test_an_ingest_ended_half_way_and_run_again_equals_one_that_was_not(tmp_path, checkpoints, texts, ending):
    many = write_jsonl(tmp_path / "many.jsonl", qa_rows(400))
    with Store.create(tmp_path / "whole") as whole:
        fill(whole, checkpoints, texts)
        whole.source_add("many", many, stage="finetune")
        whole.ingest(["base"], ["many"], ["chatml"], sketcher="small")
        expected = rows(whole)
    path = tmp_path / "killed"
    with Store.create(path) as killed:
        fill(killed, checkpoints, texts)
        killed.source_add("many", many, stage="finetune")
    status = _end_half_way(path, ending)
    with Store.open(path) as killed:
        assert status == (130 if ending == signal.SIGINT else -signal.SIGKILL)
        written = len(rows(killed))
        assert 64 <= written < 400
        assert killed.sql("select count(*) from sketches").item() == 0  # readers see committed runs only
        report = killed.ingest(["base"], ["many"], ["chatml"], sketcher="small")
        assert report.units["n_existing"].item() == written
        assert report.units["n_sketched"].item() == 400 - written
        assert killed.sql("select n_sketched from ingest_runs").item() == 400
        assert killed.sql("select count(*) from sketches").item() == 400
        again = rows(killed)
    # The samples came in other batches, so the vectors are the same up to rounding.
    columns = ["row_key", "n_tokens", "n_loss_tokens"]
    assert again.select(columns).equals(expected.select(columns))
    vectors, others = (np.stack(frame["vector"].to_numpy()).astype(np.float64) for frame in (again, expected))
    norms = np.linalg.norm(vectors, axis=1) * np.linalg.norm(others, axis=1)
    assert ((vectors * others).sum(axis=1) / norms > 0.99999).all()
    np.testing.assert_allclose(again["grad_norm"], expected["grad_norm"], rtol=1e-4)


def test_a_run_ended_after_its_last_row_is_committed_by_the_next_ingest(store):
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
    assert "the model has 200 tokens, not token" in report.failures["reason"][0]
