"""Interrupted and concurrent ingests: nothing is lost, duplicated or silently wrong."""

from __future__ import annotations

import json
import shutil
import subprocess

import polars as pl
import pytest
import torch
from helpers.checkpoints import save_checkpoint
from helpers.gradients import hook_path, random_tokens
from helpers.models import random_llama
from helpers.program import PROGRAM
from helpers.stores import fill_store, read_sketches, store_label
from helpers.texts import write_jsonl

from lark_store import Store
from lark_store.errors import CheckpointError, InputError, NothingToScoreError, StoreError
from lark_store.modeling.encoded import UnusableSampleError

JOB = (["base"], ["finetune", "songs"], ["chatml"])


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_landed_write_is_not_repeated(store, monkeypatch, error):
    append = store._db.vectors.append

    def land_and_break(table, data):
        append(table, data)
        raise error("broken off")

    with monkeypatch.context() as patch:
        patch.setattr(store._db.vectors, "append", land_and_break)
        with pytest.raises(error):
            store.ingest(*JOB, sketcher="small")
    store.ingest(*JOB, sketcher="small")
    assert read_sketches(store)["row_key"].is_unique().all()
    assert len(read_sketches(store)) == store.sql("select count(*) from sketches").item() == 11


def test_simultaneous_ingests_all_commit(tmp_path, checkpoints, texts):
    path = tmp_path / "lark.store"
    with Store.create(path) as store:
        fill_store(store, checkpoints, texts)
    common = [PROGRAM, "ingest", "--store", store_label(path), "-c", "base", "--sketcher", "small", "--variant", "raw"]
    processes = [
        subprocess.Popen([*common, "-s", source], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        for source in ("finetune", "medical", "songs")
    ]
    for process in processes:
        _, messages = process.communicate(timeout=300)
        assert process.returncode == 0, messages
    with Store.open(path) as store:
        assert dict(store.sql("select source, count(*) from sketches group by all").iter_rows()) == {
            "finetune": 6,
            "medical": 5,
            "songs": 5,
        }
        assert set(store.sql("select status from ingest_runs")["status"]) == {"done"}


def test_unused_gradient_does_not_add_to_the_next(monkeypatch):
    model = random_llama()
    path = hook_path(model, 1024)
    expected = path.sketch([random_tokens(2)])[0]

    def out_of_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory left")

    with monkeypatch.context() as patch:
        patch.setattr(path.sketcher, "add", out_of_memory)
        (failed,) = path.sketch([random_tokens(1)])
    assert isinstance(failed, UnusableSampleError)
    assert "no memory left" in str(failed)
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(path.sketch([random_tokens(2)])[0].vector, expected.vector)


def test_metrics_never_mix_query_variants(scored_copy):
    before = scored_copy.metrics(sketcher="small")
    scored_copy.ingest(["base"], ["test"], ["raw"], sketcher="small")
    scored_copy.attribute(["base"], queries="test", query_variant="raw", sketcher="small")
    with pytest.raises(InputError, match="scored as `chatml`, `raw`"):
        scored_copy.metrics(sketcher="small")
    assert scored_copy.metrics(sketcher="small", query_variant="chatml").equals(before)


def test_equal_sketchers_keep_separate_sketches(store):
    store.sketcher_add("twin", k=1024, parameters=".")
    for name in ("small", "twin"):
        report = store.ingest(["base"], ["finetune", "test"], ["chatml"], sketcher=name)
        assert report.units["n_sketched"].to_list() == [6, 4]
    assert len(store.top("q100", checkpoint="base", sketcher="twin")) == 6
    assert dict(store.sql("select sketcher, count(*) from sketches group by all").iter_rows()) == {
        "small": 10,
        "twin": 10,
    }


def test_weights_mismatching_their_config_are_refused(store, tmp_path):
    path = save_checkpoint(tmp_path / "untied", tie_word_embeddings=False)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    store.checkpoint_add("untied", path)
    with pytest.raises(CheckpointError, match="the parameters of checkpoint `untied` do not match its config"):
        store.ingest(["untied"], ["finetune"], ["raw"], sketcher="small")


def test_readers_see_complete_groups_during_rescoring(scored_copy, monkeypatch):
    table = scored_copy._db.vectors.table
    again = iter([True])

    def score_in_between(name):
        if name == "source_influence" and next(again, False):
            with Store.open(scored_copy.path) as other:
                other.attribute(["base"], queries="test", sketcher="small", hits=50)
        return table(name)

    monkeypatch.setattr(scored_copy._db.vectors, "table", score_in_between)
    assert scored_copy.sql("select count(*) from source_influence where checkpoint = 'base'").item() == 4 * 5


def test_template_error_fails_only_its_sample(store, tmp_path):
    template = tmp_path / "qa.jinja"
    template.write_text("{{ prompt + '\\n' + response }}")
    store.variant_add("qa", template=template)
    report = store.ingest(["base"], ["finetune", "songs"], ["qa"], sketcher="small")
    assert report.units["n_sketched"].to_list() == [6, 0]
    assert report.n_failed == 5
    assert "the template fails" in report.failures["reason"][0]


def test_pickled_weights_are_never_read(store, tmp_path, checkpoints):
    path = tmp_path / "pickled"
    shutil.copytree(checkpoints["base"], path)
    (path / "model.safetensors").rename(path / "other.safetensors")
    torch.save({}, path / "pytorch_model.bin")
    store.checkpoint_add("pickled", path)
    with pytest.raises(CheckpointError, match="can't be loaded"):
        store.ingest(["pickled"], ["finetune"], ["raw"], sketcher="small")


def test_failing_sample_does_not_outdate_scores(store, tmp_path):
    odd = [{"id": "long", "prompt": "why?", "response": "because " * 200}, {"id": "ok", "prompt": "a", "response": "b"}]
    store.source_add("odd", write_jsonl(tmp_path / "odd.jsonl", odd), stage="finetune")
    store.variant_add("short", template="chatml", max_length=64)
    for status in ("scored", "current"):
        store.ingest(["base"], ["odd", "test"], ["short"], sketcher="small")
        report = store.attribute(["base"], queries="test", sources=["odd"], sketcher="small")
        assert report["status"].to_list() == [status]


def test_moved_checkpoint_works_after_adding_it_again(store, tmp_path, checkpoints):
    shutil.copytree(checkpoints["base"], tmp_path / "here")
    store.checkpoint_add("moving", tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    assert store.checkpoint_add("moving", tmp_path / "there").path == str(tmp_path / "there")
    assert store.ingest(["moving"], ["finetune"], ["raw"], sketcher="small").n_failed == 0


def test_a_source_without_sketches_is_named(scored):
    with pytest.raises(NothingToScoreError, match="of `test` and `raw`"):
        scored.top("q100", checkpoint="base", sources=["songs", "test"], variants=["raw"], sketcher="small")


@pytest.mark.parametrize("name", ["a%20b", "a#b", "ä ö"])
def test_a_store_may_have_any_file_name(tmp_path, name):
    with Store.create(tmp_path / name / "lark.store") as store:
        assert store.sql("select count(*) from variants").item() == 2
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_path_unsupported_by_lance_is_refused(tmp_path):
    with pytest.raises(StoreError, match="choose another path"):
        Store.create(tmp_path / "a?b" / "lark.store")
    assert list(tmp_path.iterdir()) == []


def test_large_integers_stay_integers(scored):
    frame = scored.sql(
        "select sum(n) as small, 170141183460469231731687303715884105727::hugeint as large from source_influence"
    )
    assert frame["small"].dtype == pl.Int64
    assert frame["large"].item() == pytest.approx(1.7014e38, rel=1e-3)


def test_an_ingest_of_no_source_is_refused(store):
    with pytest.raises(InputError, match=r"^no source is given"):
        store.ingest(["base"], [], ["raw"])
