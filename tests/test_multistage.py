"""Curvature in a store: fitted, kept, taken by ingest; influence over two stages of training; distances."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers as hf
from conftest import named, save_checkpoint
from safetensors.torch import load_file, save_file
from test_cli import lark
from test_correction_fit import files, rows, tokens_of
from test_corrections import exact
from test_lora import save_lora

from lark_store import Store
from lark_store.errors import CheckpointError, InputError, NameUnknownError
from lark_store.ingest import factors, fits
from lark_store.ingest.fisher import kronecker_of
from lark_store.ingest.sketchers import fingerprint, make_sketcher, placements_of
from lark_store.schema.catalog import Checkpoint
from lark_store.schema.corrections import drafts
from lark_store.schema.database import find

WEIGHT = "model.layers.1.mlp.down_proj.weight"  # 64 × 160 numbers: in 16,384 bins none meets another
ALONE = {"k": 16_384, "dtype": "float32", "parameters": WEIGHT.replace(".", r"\.")}
POWERS = {"kfac": (0.5, 1.0), "ekfac": (0.5, 1.0)}


def kronecker(store, checkpoint, kind, weight=WEIGHT):
    with store._db.session() as session:
        of = find(session, Checkpoint, checkpoint)
    read = factors.read(store._db, factors.stored(store._db, of, kind))
    each = kronecker_of(read, weight)
    values = None if each.values is None else each.values.double()
    return type(each)(each.rows.double(), each.columns.double(), values)


def dense(each, damping):
    """Return (G + λ) whole, of one weight alone."""
    s, a = torch.block_diag(*each.rows), torch.block_diag(*each.columns)
    one_s, one_a = torch.eye(len(s)).double(), torch.eye(len(a)).double()
    if each.values is not None:
        total = damping * float(each.values.mean())
        return lambda g, p: s @ ((s.T @ g @ a) * (each.values + total) ** -p) @ a.T
    total = damping * float(s.trace() * a.trace()) / (len(s) * len(a))
    pi = float((a.trace() / len(a)) / (s.trace() / len(s))) ** 0.5

    def root(matrix, p):
        values, vectors = torch.linalg.eigh(matrix)
        return vectors @ torch.diag(values**-p) @ vectors.T

    return lambda g, p: root(s + total**0.5 / pi * one_s, p) @ g @ root(a + total**0.5 * pi * one_a, p)


def gradients(store, checkpoints, checkpoint, source):
    """Return the exact gradients of the weight for a source's samples, in the order of their ids."""
    model = hf.AutoModelForCausalLM.from_pretrained(checkpoints[checkpoint]).eval()
    ids = store.sql(f"select sample_id from samples where source = '{source}'")["sample_id"].to_list()
    made = [exact(model, tokens)[WEIGHT].double() for tokens in tokens_of(store, checkpoints, source)]
    return dict(zip(ids, made, strict=True))


@pytest.fixture
def curved(store):
    for kind, powers in POWERS.items():
        for power in powers:
            store.sketcher_add(f"{kind}-{power:g}", correction=kind, power=power, damping=0.2, **ALONE)
    return store


# --- influence -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", POWERS)
def test_a_dot_product_is_the_dense_formula_at_one_checkpoint_and_over_two(curved, checkpoints, kind):
    both = ["base", "epoch-1"]
    for power in POWERS[kind]:
        report = curved.ingest(both, ["finetune", "test"], ["chatml"], sketcher=f"{kind}-{power:g}")
        assert report.n_failed == 0
    ft, pt = (dense(kronecker(curved, name, kind), 0.2) for name in ("epoch-1", "base"))
    of_queries = {name: gradients(curved, checkpoints, name, "test") for name in both}
    of_samples = gradients(curved, checkpoints, "base", "finetune")
    assert curved.verify(sketcher=f"{kind}-1")["ok"].all()

    def scores(sketcher, **options):
        frame = curved.top("q101", checkpoint="base", sketcher=sketcher, method="dot", k=6, **options).frame
        return dict(frame.select("sample_id", "score").rows())

    single = {z: float((of_queries["base"]["q101"] * pt(g, 1.0)).sum()) for z, g in of_samples.items()}
    multi = {z: float((ft(of_queries["epoch-1"]["q101"], 1.0) * pt(g, 1.0)).sum()) for z, g in of_samples.items()}
    for found, expected in (
        (scores(f"{kind}-0.5"), single),
        (scores(f"{kind}-1", query_checkpoint="epoch-1"), multi),
    ):
        assert found.keys() == expected.keys()
        scale = max(abs(value) for value in expected.values())
        for sample_id, value in expected.items():
            assert found[sample_id] == pytest.approx(value, rel=1e-3, abs=1e-4 * scale)
    hits = curved.top("q101", checkpoint="base", query_checkpoint="epoch-1", sketcher=f"{kind}-1")
    assert hits.method == "dot"


@pytest.mark.parametrize("kind", POWERS)
def test_a_huge_damping_ranks_as_the_plain_gradients_do(store, kind):
    layers = r"layers\..*proj"
    store.sketcher_add("plain", k=4096, dtype="float32", parameters=layers)
    store.sketcher_add("huge", k=4096, dtype="float32", parameters=layers, correction=kind, power=1, damping=1e14)
    for sketcher in ("plain", "huge"):
        store.ingest(["base", "epoch-1"], ["finetune", "songs", "test"], ["chatml"], sketcher=sketcher)
    for query in ("q100", "q103"):
        asked = {"checkpoint": "base", "query_checkpoint": "epoch-1", "k": 11}
        gdp, multi = (store.top(query, sketcher=name, **asked).frame for name in ("plain", "huge"))
        assert multi["sample_id"].to_list() == gdp["sample_id"].to_list()
        ratio = (multi["score"] / gdp["score"]).to_numpy()
        np.testing.assert_allclose(ratio, ratio[0], rtol=1e-3)


def test_a_query_that_is_typed_in_is_corrected_as_the_stored_one(curved):
    from lark_store.schema.records import NewText

    curved.ingest(["base"], ["finetune", "test"], ["chatml"], sketcher="ekfac-0.5")
    prompt, response = curved.sql("select prompt, response from samples where sample_id = 'q101'").row(0)
    asked = {"checkpoint": "base", "sketcher": "ekfac-0.5", "k": 6, "query_variant": "chatml"}
    stored = curved.top("q101", **asked).frame
    typed = curved.top(new=NewText(prompt=prompt, response=response), **asked).frame
    assert typed["sample_id"].to_list() == stored["sample_id"].to_list()
    np.testing.assert_allclose(typed["score"], stored["score"], atol=1e-4)


# --- sketchers and fits --------------------------------------------------------------------------------------------


def test_power_is_part_of_what_tells_sketchers_apart(checkpoints, store):
    model = hf.AutoModelForCausalLM.from_pretrained(checkpoints["base"])

    def of(**options):
        sketcher = make_sketcher("a", k=1024, correction="kfac", **options)
        return fingerprint(sketcher, placements_of(sketcher, model))

    assert of() == of(power=0.5, damping=0.1)
    assert len({of(), of(power=1), of(damping=0.2), of(mask_template=True)}) == 4
    added = store.sketcher_add("a", k=1024, correction="ekfac")
    assert (added.power, added.damping) == (0.5, 0.1)
    assert store.sql("select power from sketchers where name = 'a'").item() == 0.5


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        ({"power": 0.5}, "the correction `none` has no power to choose"),
        ({"correction": "adam", "power": 1}, "the correction `adam` has no power to choose"),
        ({"correction": "kfac", "power": 0.3}, "a power of 0.3 is neither 0.5 nor 1"),
        ({"correction": "ekfac", "damping": 0.0}, "a damping of 0.0 is not above 0"),
    ],
)
def test_a_sketcher_that_makes_no_sense_is_refused(store, options, fact):
    with pytest.raises(InputError) as caught:
        store.sketcher_add("a", **options)
    assert caught.value.fact == fact


def test_a_sketcher_that_takes_no_linear_layer_is_refused_where_it_meets_the_model(store):
    store.sketcher_add("norms", k=1024, correction="kfac", parameters="norm|embed")
    for work in (store.plan, store.ingest):
        with pytest.raises(InputError, match="is the weight of a linear layer in the model's blocks"):
            work(["base"], ["finetune"], ["chatml"], sketcher="norms")
    shown = store.sketcher_add("all", k=1024, correction="kfac") and store.sketcher_show("all", checkpoint="base")
    taken = shown.filter("sketched")["parameter"].to_list()
    assert len(taken) == 14
    assert all(name.endswith("proj.weight") for name in taken)


def test_an_optimizer_has_no_curvature(store, tmp_path):
    with pytest.raises(InputError) as caught:
        store.correction_fit("base", kind="kfac", from_optimizer=tmp_path)
    assert caught.value.fact == "an optimizer has no K-FAC factors"


@pytest.mark.parametrize("kind", POWERS)
def test_an_ingest_fits_what_is_missing_and_takes_what_is_there(curved, kind):
    report = curved.ingest(["base"], ["finetune"], ["chatml"], sketcher=f"{kind}-1")
    named_ = {"kfac": "K-FAC", "ekfac": "EK-FAC"}[kind]
    assert f"the {named_} factors of checkpoint `base` were missing, and were fitted to 6 samples" in report.notes[0]
    again = curved.ingest(["base"], ["finetune"], ["chatml"], sketcher=f"{kind}-0.5")
    assert not any("missing" in note for note in again.notes)
    [row] = rows(curved)
    assert (row["kind"], row["n_samples"], row["origin"]) == (kind, 6, "gradients")
    assert curved.correction_fit("base", kind=kind, precision="auto").is_new is False
    with pytest.raises(InputError, match="with others they could not be compared"):
        curved.correction_fit("base", kind=kind, samples=3)
    assert curved.correction_fit("base", kind="adam").is_new
    assert {each["kind"] for each in rows(curved)} == {"adam", kind}


def test_factors_of_another_model_are_refused(curved, tmp_path):
    curved.correction_fit("base", kind="kfac")
    with curved._db.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE correction SET checkpoint_id = 2")
    with pytest.raises(CheckpointError, match="the factors of checkpoint `epoch-1` were fitted to other weights"):
        curved.ingest(["epoch-1"], ["finetune"], ["chatml"], sketcher="kfac-1")
    other = save_checkpoint(tmp_path / "other", seed=3, intermediate_size=96)
    curved.checkpoint_add("other", other)
    with curved._db.session() as session:
        sha256 = find(session, Checkpoint, "other").weights_sha256
        row = session.get(factors.Correction, 1)
        row.recipe, row.checkpoint_id = row.recipe | {"weights_sha256": sha256}, 3
    with pytest.raises(CheckpointError, match=f"have another shape for `{WEIGHT}`"):
        curved.ingest(["other"], ["finetune"], ["chatml"], sketcher="kfac-1")


def test_a_plan_says_that_a_fit_comes_on_top(curved):
    for kind in POWERS:
        planned = curved.plan(["base"], ["finetune"], ["chatml"], sketcher=f"{kind}-1")
        assert planned.checkpoints["path"].to_list() == ["BatchPath"]
        assert "comes on top" in planned.notes[0]
        assert rows(curved) == []
    curved.correction_fit("base", kind="kfac")
    assert curved.plan(["base"], ["finetune"], ["chatml"], sketcher="kfac-1").notes == []


# --- killed, and gone on -------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from lark_store import Store
from lark_store.ingest import drafts
drafts.SECONDS = drafts._SHARE = 0
with Store.open(sys.argv[1]) as store:
    def stop(progress):
        if (progress.label, progress.done) == (sys.argv[3], 4):
            os.kill(os.getpid(), signal.SIGKILL)
    store.correction_fit("base", kind=sys.argv[2], on_progress=stop)
"""


@pytest.mark.parametrize(
    ("kind", "label"),
    [
        ("adam", "second moments"),
        ("kfac", "second moments of inputs and output gradients"),
        ("ekfac", "second moments of inputs and output gradients"),
        ("ekfac", "eigenvalues"),
    ],
)
def test_a_killed_fit_goes_on_where_it_was_and_comes_out_equal(store, checkpoints, kind, label):
    store.checkpoint_add("twin", checkpoints["base"])
    undisturbed = store.correction_fit("twin", kind=kind)
    command = [sys.executable, "-c", KILLED, named(store.path), kind, f"base: {label}"]
    assert subprocess.run(command, check=False, env=os.environ).returncode == -signal.SIGKILL
    assert [row["checkpoint"] for row in rows(store)] == ["twin"]
    [draft] = drafts(store._db.vectors, 1)
    seen = []
    made = store.correction_fit("base", kind=kind, on_progress=lambda p: seen.append((p.label, p.done, p.total)))
    started = seen[1:]  # after `loading the model`
    assert started[0] == (f"base: {label}", 4, 6)  # the third was kept: the fourth was cut off
    assert (made.sha256, made.n_samples) == (undisturbed.sha256, 6)
    assert draft not in files(store)
    assert not drafts(store._db.vectors, 1)


def draft_of(store, **options):
    """Leave a draft behind, as a killed fit does."""
    command = [sys.executable, "-c", KILLED.replace("kind=", f"**{options!r}, kind="), named(store.path)]
    subprocess.run([*command, "kfac", "base: second moments of inputs and output gradients"], check=False)
    [draft] = drafts(store._db.vectors, 1)
    return draft


@pytest.mark.parametrize("harm", ["another fit", "cut off"])
def test_a_draft_that_is_anothers_or_cut_off_is_not_gone_on_from(store, tmp_path, harm):
    draft = draft_of(store, seed=1 if harm == "another fit" else 0)
    if harm == "cut off":
        vectors = store._db.vectors.files
        vectors.download_file(draft, str(tmp_path / "draft"))
        content = (tmp_path / "draft").read_bytes()
        (tmp_path / "draft").write_bytes(content[:-100])
        vectors.upload_file(str(tmp_path / "draft"), draft)
    seen = []
    store.correction_fit("base", kind="kfac", on_progress=lambda p: seen.append(p.done))
    assert seen[1] == 1
    assert not drafts(store._db.vectors, 1)


def test_a_checkpoint_that_goes_takes_drafts_and_factors_along(store):
    draft_of(store)
    store.correction_fit("base", kind="ekfac")
    store.correction_fit("base", kind="adam")
    assert len(files(store)) == 3
    went = store.checkpoint_remove("base")
    assert ("correction", "correction", 2) in went.rows()
    assert files(store) == []


def test_a_backup_has_every_kind(curved, tmp_path):
    for kind in POWERS:
        curved.ingest(["base"], ["finetune"], ["chatml"], sketcher=f"{kind}-1")
    curved.db_backup(tmp_path / "backup")
    Store.db_restore(tmp_path / "backup", to=tmp_path / "restored")
    with Store.open(tmp_path / "restored") as restored:
        assert restored.db_check().filter(severity="error").is_empty()
        assert restored.verify()["ok"].all()


def test_two_kinds_may_be_fitted_at_once(store):
    inner = []

    def also(progress):
        if progress.done == 2 and not inner:
            inner.append(store.correction_fit("base", kind="adam"))

    store.correction_fit("base", kind="kfac", on_progress=also)
    assert {row["kind"] for row in rows(store)} == {"adam", "kfac"}
    assert fits.__doc__


@pytest.mark.parametrize("samples", [500, 4])
def test_ekfac_takes_the_first_of_its_two_passes_from_a_kfac_of_the_same_samples(store, checkpoints, samples):
    store.checkpoint_add("twin", checkpoints["base"])
    undisturbed = store.correction_fit("twin", kind="ekfac")
    store.correction_fit("base", kind="kfac", samples=samples)
    seen = []
    made = store.correction_fit("base", kind="ekfac", on_progress=lambda p: seen.append(p.label))
    first = "base: second moments of inputs and output gradients"
    assert (first in seen, "base: eigenvalues" in seen) == (samples == 4, True)
    assert (made.sha256, made.n_samples) == (undisturbed.sha256, 6)


# --- how far -------------------------------------------------------------------------------------------------------


def by_hand(checkpoints, name, origin):
    ours, theirs = (load_file(checkpoints[each] / "model.safetensors") for each in (name, origin))
    apart = sum(float((ours[key].double() - theirs[key].double()).square().sum()) for key in theirs)
    return (apart / sum(float(each.double().square().sum()) for each in theirs.values())) ** 0.5


def test_a_distance_is_measured_once_and_kept(store, checkpoints, monkeypatch):
    expected = by_hand(checkpoints, "epoch-1", "base")
    assert store.checkpoint_distance("epoch-1", "base") == pytest.approx(expected, rel=1e-6)
    monkeypatch.setattr("lark_store.ingest.distance.measured", None)
    assert store.checkpoint_distance("epoch-1", "base") == pytest.approx(expected, rel=1e-6)
    with pytest.raises(NameUnknownError):
        store.checkpoint_distance("epoch-1", "epoch-2")
    assert lark("checkpoint distance epoch-1 base", store=store.path).out == f"{expected:.6g}\n"


def test_a_distance_of_shards_is_that_of_one_file(store, checkpoints, tmp_path):
    model = hf.AutoModelForCausalLM.from_pretrained(checkpoints["epoch-1"])
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    for file in checkpoints["epoch-1"].glob("*token*"):
        (tmp_path / "shards" / file.name).write_bytes(file.read_bytes())
    assert not (tmp_path / "shards" / "model.safetensors").exists()
    store.checkpoint_add("shards", tmp_path / "shards")
    expected = by_hand(checkpoints, "epoch-1", "base")
    assert store.checkpoint_distance("shards", "base") == pytest.approx(expected, rel=1e-6)


def test_a_distance_from_another_model_is_none(store, tmp_path):
    store.checkpoint_add("wide", save_checkpoint(tmp_path / "wide", intermediate_size=96))
    store.checkpoint_add("deep", save_checkpoint(tmp_path / "deep", num_hidden_layers=3))
    for name, tensor in (("wide", r"layers\.0\.mlp"), ("deep", r"layers\.2\.")):
        with pytest.raises(CheckpointError, match=f"differ in their tensors: `.*{tensor}"):
            store.checkpoint_distance(name, "base")


def test_where_samples_and_queries_are_at_two_checkpoints_their_distance_is_said(scored_copy, checkpoints):
    expected = by_hand(checkpoints, "epoch-1", "base")
    note = f"distance of `epoch-1`, ‖θ − θ₀‖ / ‖θ₀‖: {expected:.4g} from `base`"
    ask = {"checkpoint": "base", "sketcher": "small", "query_checkpoint": "epoch-1"}
    scored_copy.snapshot_create("before")
    hits = scored_copy.top("q100", **ask)
    assert note in hits.notes
    assert hits.how.endswith(f"\nnote: {note}")
    assert scored_copy.top("q100", checkpoint="base", sketcher="small").notes == ()
    with Store.open(scored_copy.path, snapshot="before") as then:
        assert note in then.top("q100", **ask).notes
    path = scored_copy.path
    line = "top q100 -c base --query-checkpoint epoch-1 --sketcher small"
    assert lark(line, store=path).err.endswith(f"{note}\n")
    attribute = "attribute -c base -q test --query-checkpoint epoch-1 --sketcher small"
    assert lark(attribute, store=path).err.endswith(f"{note}\n")
    assert "distance" not in lark("attribute -c base -q test --sketcher small", store=path).err
    how = {"queries": "test", "query_checkpoint": "epoch-1", "sketcher": "small", "method": "dot"}
    report = scored_copy.attribute(["base", "epoch-1"], **how)
    assert set(report.select("checkpoint", "note").unique().rows()) == {("base", note), ("epoch-1", None)}


def test_an_answer_needs_no_files_of_a_checkpoint(scored_copy, tmp_path, monkeypatch):
    monkeypatch.setattr("lark_store.ingest.distance.kept_at", lambda *_: tmp_path / "distance")
    moved = save_checkpoint(tmp_path / "moved", seed=0)
    scored_copy.checkpoint_add("base", moved)
    tensors = load_file(moved / "model.safetensors")
    save_file({name: each + 1 for name, each in tensors.items()}, moved / "model.safetensors", {"format": "pt"})
    hits = scored_copy.top("q100", checkpoint="base", sketcher="small", query_checkpoint="epoch-1")
    assert "not known from `base` (the weights of checkpoint `base`" in hits.notes[0]
    assert len(hits) == 10


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft uses it
def test_adapters_alone_are_corrected_and_have_no_distance(store, tmp_path, checkpoints):
    save_lora(tmp_path / "lora", checkpoints["base"])
    store.checkpoint_add("lora", tmp_path / "lora")
    for kind in POWERS:
        store.sketcher_add(kind, k=1024, correction=kind)
        report = store.ingest(["lora"], ["finetune"], ["chatml"], sketcher=kind)
        assert report.n_failed == 0
        taken = store.sketcher_show(kind, checkpoint="lora").filter("sketched")["parameter"]
        assert taken.str.contains("lora_").all()
        assert store.verify(sketcher=kind)["ok"].all()
    with pytest.raises(CheckpointError, match="checkpoint `lora` is LoRA adapters, whose distance is not measured"):
        store.checkpoint_distance("lora", "base")
