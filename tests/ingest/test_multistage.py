"""Curvature in a store: fitted, kept, taken by ingest; influence over two stages of training; distances."""

from __future__ import annotations

import json
import signal

import numpy as np
import pytest
import torch
import transformers as hf
from helpers.checkpoints import save_checkpoint, save_lora
from helpers.corrections import correction_files, correction_rows, render_samples
from helpers.forked import run_forked
from helpers.gradients import exact_gradient64
from helpers.program import lark
from helpers.stores import store_label
from safetensors.torch import load_file, save_file

from lark_store import Store
from lark_store.errors import CheckpointError, InputError, NameUnknownError
from lark_store.gradients.corrections.fisher import kronecker_of
from lark_store.gradients.sketch.layout import fingerprint, make_sketcher, placements_of
from lark_store.ingest import correction_store, fit_corrections
from lark_store.schema.catalog import Checkpoint
from lark_store.schema.database import find
from lark_store.schema.factor_files import drafts

WEIGHT = "model.layers.1.mlp.down_proj.weight"  # 64 × 160 numbers: in 16,384 bins none meets another
ALONE = {"k": 16_384, "dtype": "float32", "parameters": WEIGHT.replace(".", r"\.")}
POWERS = {"kfac": (0.5, 1.0), "ekfac": (0.5, 1.0)}


def kronecker(store, checkpoint, kind, weight=WEIGHT):
    with store._db.session() as session:
        checkpoint_row = find(session, Checkpoint, checkpoint)
    read = correction_store.read(store._db, correction_store.stored(store._db, checkpoint_row, kind))
    each = kronecker_of(read, weight)
    values = None if each.values is None else each.values.double()
    return type(each)(each.rows.double(), each.columns.double(), values)


def dense(factors, damping):
    """Return (G + λ) whole, of one weight alone."""
    s, a = torch.block_diag(*factors.rows), torch.block_diag(*factors.columns)
    one_s, one_a = torch.eye(len(s)).double(), torch.eye(len(a)).double()
    if factors.values is not None:
        total = damping * float(factors.values.mean())
        return lambda g, p: s @ ((s.T @ g @ a) * (factors.values + total) ** -p) @ a.T
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
    results = [
        exact_gradient64(model, tokens)[WEIGHT].double() for tokens in render_samples(store, checkpoints, source)
    ]
    return dict(zip(ids, results, strict=True))


@pytest.fixture
def curved(store):
    for kind, powers in POWERS.items():
        for power in powers:
            store.sketcher_add(f"{kind}-{power:g}", correction=kind, power=power, damping=0.2, **ALONE)
    return store


# --- influence -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", POWERS)
def test_dot_product_equals_the_dense_formula(curved, checkpoints, kind):
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
    for actual, expected in (
        (scores(f"{kind}-0.5"), single),
        (scores(f"{kind}-1", query_checkpoint="epoch-1"), multi),
    ):
        assert actual.keys() == expected.keys()
        scale = max(abs(value) for value in expected.values())
        for sample_id, value in expected.items():
            assert actual[sample_id] == pytest.approx(value, rel=1e-3, abs=1e-4 * scale)
    hits = curved.top("q101", checkpoint="base", query_checkpoint="epoch-1", sketcher=f"{kind}-1")
    assert hits.method == "dot"


@pytest.mark.parametrize("kind", POWERS)
def test_huge_damping_ranks_like_plain_gradients(store, kind):
    layers = r"layers\..*proj"
    store.sketcher_add("plain", k=4096, dtype="float32", parameters=layers)
    store.sketcher_add("huge", k=4096, dtype="float32", parameters=layers, correction=kind, power=1, damping=1e14)
    for sketcher in ("plain", "huge"):
        store.ingest(["base", "epoch-1"], ["songs", "test"], ["chatml"], sketcher=sketcher)
    for query in ("q100", "q103"):
        options = {"checkpoint": "base", "query_checkpoint": "epoch-1", "k": 5}
        gdp, multi = (store.top(query, sketcher=name, **options).frame for name in ("plain", "huge"))
        assert multi["sample_id"].to_list() == gdp["sample_id"].to_list()
        ratio = (multi["score"] / gdp["score"]).to_numpy()
        np.testing.assert_allclose(ratio, ratio[0], rtol=1e-3)


def test_new_query_is_corrected_like_a_stored_one(curved):
    from lark_store.results import NewText

    curved.ingest(["base"], ["finetune", "test"], ["chatml"], sketcher="ekfac-0.5")
    prompt, response = curved.sql("select prompt, response from samples where sample_id = 'q101'").row(0)
    options = {"checkpoint": "base", "sketcher": "ekfac-0.5", "k": 6, "query_variant": "chatml"}
    stored = curved.top("q101", **options).frame
    typed = curved.top(new=NewText(prompt=prompt, response=response), **options).frame
    assert typed["sample_id"].to_list() == stored["sample_id"].to_list()
    np.testing.assert_allclose(typed["score"], stored["score"], atol=1e-4)


# --- sketchers and fits --------------------------------------------------------------------------------------------


def test_power_is_part_of_the_fingerprint(checkpoints, store):
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
        ({"power": 0.5}, "the correction `none` has no power"),
        ({"correction": "adam", "power": 1}, "the correction `adam` has no power"),
        ({"correction": "kfac", "power": 0.3}, "the power must be 0.5 or 1, not 0.3"),
        ({"correction": "ekfac", "damping": 0.0}, "the damping must be positive, not 0.0"),
    ],
)
def test_invalid_sketcher_is_refused(store, options, fact):
    with pytest.raises(InputError) as caught:
        store.sketcher_add("a", **options)
    assert caught.value.fact == fact


def test_sketcher_without_linear_layers_is_refused_by_the_model(store):
    store.sketcher_add("norms", k=1024, correction="kfac", parameters="norm|embed")
    for work in (store.plan, store.ingest):
        with pytest.raises(InputError, match="is the weight of a linear layer in the model's blocks"):
            work(["base"], ["finetune"], ["chatml"], sketcher="norms")
    parameters = store.sketcher_add("all", k=1024, correction="kfac") and store.sketcher_show("all", checkpoint="base")
    taken = parameters.filter("sketched")["parameter"].to_list()
    assert len(taken) == 14
    assert all(name.endswith("proj.weight") for name in taken)


def test_an_optimizer_has_no_curvature(store, tmp_path):
    with pytest.raises(InputError) as caught:
        store.correction_fit("base", kind="kfac", from_optimizer=tmp_path)
    assert caught.value.fact == "an optimizer has no K-FAC factors"


@pytest.mark.parametrize("kind", POWERS)
def test_ingest_fits_only_missing_factors(curved, kind):
    report = curved.ingest(["base"], ["finetune"], ["chatml"], sketcher=f"{kind}-1")
    named_ = {"kfac": "K-FAC", "ekfac": "EK-FAC"}[kind]
    assert f"fitted the missing {named_} factors of checkpoint `base` to 6 samples" in report.notes[0]
    again = curved.ingest(["base"], ["finetune"], ["chatml"], sketcher=f"{kind}-0.5")
    assert not any("missing" in note for note in again.notes)
    [row] = correction_rows(curved)
    assert (row["kind"], row["n_samples"], row["origin"]) == (kind, 6, "gradients")
    assert curved.correction_fit("base", kind=kind, precision="auto").is_new is False
    with pytest.raises(InputError, match="sketches with other factors could not be compared"):
        curved.correction_fit("base", kind=kind, samples=3)
    assert curved.correction_fit("base", kind="adam").is_new
    assert {correction_row["kind"] for correction_row in correction_rows(curved)} == {"adam", kind}


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
        row = session.get(correction_store.Correction, 1)
        row.recipe, row.checkpoint_id = row.recipe | {"weights_sha256": sha256}, 3
    with pytest.raises(CheckpointError, match=f"have another shape for `{WEIGHT}`"):
        curved.ingest(["other"], ["finetune"], ["chatml"], sketcher="kfac-1")


def test_plan_reports_an_additional_fit(curved):
    for kind in POWERS:
        planned = curved.plan(["base"], ["finetune"], ["chatml"], sketcher=f"{kind}-1")
        assert planned.checkpoints["path"].to_list() == ["BatchPath"]
        assert "takes additional time" in planned.notes[0]
        assert correction_rows(curved) == []
    curved.correction_fit("base", kind="kfac")
    assert curved.plan(["base"], ["finetune"], ["chatml"], sketcher="kfac-1").notes == []


# --- killed, and gone on -------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from lark_store import Store
from lark_store.ingest import fit_resume
fit_resume.SECONDS = fit_resume._SHARE = 0
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
def test_killed_fit_resumes_with_an_equal_result(store, checkpoints, kind, label):
    store.checkpoint_add("twin", checkpoints["base"])
    undisturbed = store.correction_fit("twin", kind=kind)
    assert run_forked(KILLED, store_label(store.path), kind, f"base: {label}") == -signal.SIGKILL
    assert [row["checkpoint"] for row in correction_rows(store)] == ["twin"]
    [draft] = drafts(store._db.vectors, 1)
    seen = []
    fit = store.correction_fit("base", kind=kind, on_progress=lambda p: seen.append((p.label, p.done, p.total)))
    started = seen[1:]  # after `loading the model`
    assert started[0] == (f"base: {label}", 4, 6)  # the third was kept: the fourth was cut off
    assert (fit.sha256, fit.n_samples) == (undisturbed.sha256, 6)
    assert draft not in correction_files(store)
    assert not drafts(store._db.vectors, 1)


def draft_of(store, **options):
    """Leave a draft behind, as a killed fit does."""
    script = KILLED.replace("kind=", f"**{options!r}, kind=")
    run_forked(script, store_label(store.path), "kfac", "base: second moments of inputs and output gradients")
    [draft] = drafts(store._db.vectors, 1)
    return draft


@pytest.mark.parametrize("harm", ["another fit", "cut off"])
def test_foreign_or_truncated_draft_is_not_resumed(store, tmp_path, harm):
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


def test_removed_checkpoint_removes_drafts_and_factors(store):
    draft_of(store)
    store.correction_fit("base", kind="ekfac")
    store.correction_fit("base", kind="adam")
    assert len(correction_files(store)) == 3
    went = store.checkpoint_remove("base")
    assert ("correction", "correction", 2) in went.rows()
    assert correction_files(store) == []


def test_backup_contains_every_kind(curved, tmp_path):
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
    assert {row["kind"] for row in correction_rows(store)} == {"adam", "kfac"}
    assert fit_corrections.__doc__


@pytest.mark.parametrize("samples", [500, 4])
def test_ekfac_reuses_a_kfac_pass_of_the_same_samples(store, checkpoints, samples):
    store.checkpoint_add("twin", checkpoints["base"])
    undisturbed = store.correction_fit("twin", kind="ekfac")
    store.correction_fit("base", kind="kfac", samples=samples)
    seen = []
    fit = store.correction_fit("base", kind="ekfac", on_progress=lambda p: seen.append(p.label))
    first = "base: second moments of inputs and output gradients"
    assert (first in seen, "base: eigenvalues" in seen) == (samples == 4, True)
    assert (fit.sha256, fit.n_samples) == (undisturbed.sha256, 6)


# --- how far -------------------------------------------------------------------------------------------------------


def by_hand(checkpoints, name, origin, only=""):
    ours, theirs = (load_file(checkpoints[checkpoint_name] / "model.safetensors") for checkpoint_name in (name, origin))
    theirs = {key: tensor for key, tensor in theirs.items() if only in key}
    apart = sum(float((ours[key].double() - theirs[key].double()).square().sum()) for key in theirs)
    return (apart / sum(float(checkpoint_name.double().square().sum()) for checkpoint_name in theirs.values())) ** 0.5


def test_distance_is_measured_once(store, checkpoints, monkeypatch):
    expected = by_hand(checkpoints, "epoch-1", "base")
    assert store.checkpoint_distance("epoch-1", "base") == pytest.approx(expected, rel=1e-6)
    monkeypatch.setattr("lark_store.modeling.weight_distance.relative_distances", None)
    assert store.checkpoint_distance("epoch-1", "base") == pytest.approx(expected, rel=1e-6)
    linear = by_hand(checkpoints, "epoch-1", "base", only="_proj.weight")  # all of a Llama's linear layers, no other
    assert store.checkpoint_distance("epoch-1", "base", layers="linear") == pytest.approx(linear, rel=1e-6)
    assert abs(linear / expected - 1) > 1e-3
    with pytest.raises(NameUnknownError, match="no checkpoint `epoch-2`"):
        store.checkpoint_distance("epoch-1", "epoch-2")
    with pytest.raises(InputError, match="unknown layers `mlp`"):
        store.checkpoint_distance("epoch-1", "base", layers="mlp")
    printed = lark("checkpoint distance epoch-1 base -f json", store=store.path)
    assert json.loads(printed.out) == [
        {"layers": "all", "distance": pytest.approx(expected, rel=1e-6)},
        {"layers": "linear", "distance": pytest.approx(linear, rel=1e-6)},
    ]


def test_distance_of_shards_equals_one_file(store, checkpoints, tmp_path):
    model = hf.AutoModelForCausalLM.from_pretrained(checkpoints["epoch-1"])
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    for file in checkpoints["epoch-1"].glob("*token*"):
        (tmp_path / "shards" / file.name).write_bytes(file.read_bytes())
    assert not (tmp_path / "shards" / "model.safetensors").exists()
    store.checkpoint_add("shards", tmp_path / "shards")
    expected = by_hand(checkpoints, "epoch-1", "base")
    assert store.checkpoint_distance("shards", "base") == pytest.approx(expected, rel=1e-6)


def test_distance_from_another_model_is_null(store, tmp_path):
    store.checkpoint_add("wide", save_checkpoint(tmp_path / "wide", intermediate_size=96))
    store.checkpoint_add("deep", save_checkpoint(tmp_path / "deep", num_hidden_layers=3))
    for name, tensor in (("wide", r"layers\.0\.mlp"), ("deep", r"layers\.2\.")):
        with pytest.raises(CheckpointError, match=f"have different tensors, such as `.*{tensor}"):
            store.checkpoint_distance(name, "base")


def test_distance_of_two_checkpoints_is_reported(scored_copy, checkpoints):
    expected = by_hand(checkpoints, "epoch-1", "base")
    linear = by_hand(checkpoints, "epoch-1", "base", only="_proj.weight")
    distances = f"{expected:.4g} from `base` ({linear:.4g} over the linear layers)"
    note = f"distance of `epoch-1`, ‖θ − θ₀‖ / ‖θ₀‖: {distances}"
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
    options = {"queries": "test", "query_checkpoint": "epoch-1", "sketcher": "small", "method": "dot"}
    report = scored_copy.attribute(["base", "epoch-1"], **options)
    assert set(report.select("checkpoint", "note").unique().rows()) == {("base", note), ("epoch-1", None)}


def test_answers_need_no_checkpoint_files(scored_copy, tmp_path, monkeypatch):
    monkeypatch.setattr("lark_store.modeling.weight_distance.cache_file", lambda *_: tmp_path / "distance")
    moved = save_checkpoint(tmp_path / "moved", seed=0)
    scored_copy.checkpoint_add("base", moved)
    tensors = load_file(moved / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, moved / "model.safetensors", {"format": "pt"})
    hits = scored_copy.top("q100", checkpoint="base", sketcher="small", query_checkpoint="epoch-1")
    assert "unknown from `base` (the weights of checkpoint `base`" in hits.notes[0]
    assert len(hits) == 10


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft uses it
def test_adapters_are_corrected_without_a_distance(store, tmp_path, checkpoints):
    save_lora(tmp_path / "lora", checkpoints["base"])
    store.checkpoint_add("lora", tmp_path / "lora")
    for kind in POWERS:
        store.sketcher_add(kind, k=1024, correction=kind)
        report = store.ingest(["lora"], ["finetune"], ["chatml"], sketcher=kind)
        assert report.n_failed == 0
        taken = store.sketcher_show(kind, checkpoint="lora").filter("sketched")["parameter"]
        assert taken.str.contains("lora_").all()
        assert store.verify(sketcher=kind)["ok"].all()
    with pytest.raises(CheckpointError, match="checkpoint `lora` holds LoRA adapters"):
        store.checkpoint_distance("lora", "base")
