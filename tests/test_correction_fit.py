"""Corrected sketchers in a store: factors fitted, kept, taken by ingest, refused where they do not fit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from conftest import named, save_checkpoint
from safetensors.torch import load
from test_cli import lark
from test_corrections import dense_squares

from lark_store import Store
from lark_store.errors import CheckpointError, InputError, NameTakenError, NameUnknownError, StoreError
from lark_store.ingest import factors
from lark_store.ingest.corrections import Moments
from lark_store.ingest.fits import _Work
from lark_store.ingest.moments import moments_in, tensors_of
from lark_store.ingest.sketchers import fingerprint, make_sketcher, placements_of
from lark_store.ingest.sources import Sample
from lark_store.ingest.variants import Renderer
from lark_store.schema.catalog import Checkpoint, FormatVariant
from lark_store.schema.database import find

K = 1024


def rows(store):
    return store.sql("select * from corrections order by checkpoint").to_dicts()


def files(store):
    return sorted(store._db.vectors.files.list("corrections"))


def name_of(made):
    return f"corrections/{made.sha256[:16]}.safetensors"


def content(store):
    """Return what is in the one file of factors."""
    [name] = files(store)
    with tempfile.NamedTemporaryFile() as copy:
        store._db.vectors.files.download_file(name, copy.name)
        return Path(copy.name).read_bytes()


def row_of(store, name="base"):
    with store._db.session() as session:
        checkpoint = find(session, Checkpoint, name)
    return factors.stored(store._db, checkpoint, "adam")


def tokens_of(store, checkpoints, source, variant="chatml", n=None):
    """Render a source's samples, as an ingest does."""
    tokenizer = hf.AutoTokenizer.from_pretrained(checkpoints["base"])
    with store._db.session() as session:
        form = find(session, FormatVariant, variant)
    samples = store.sql(f"select sample_id, prompt, response, text from samples where source = '{source}'").to_dicts()
    return [Renderer(form, tokenizer, 256).render(Sample(**row)) for row in samples[:n]]


@pytest.fixture
def adam(store):
    """The store with corrected sketchers, nothing fitted."""
    store.sketcher_add("step", k=K, correction="adam", min_ndim=2, mask_template=True)
    store.sketcher_add("adam2", k=K, correction="adam2", damping=0.01)
    store.sketcher_add("tensor", k=K, correction="tensor")
    return store


# --- sketchers -----------------------------------------------------------------------------------------------------


def test_what_tells_sketchers_apart_is_in_the_fingerprint(checkpoints):
    model = hf.AutoModelForCausalLM.from_pretrained(checkpoints["base"])

    def of(**options):
        sketcher = make_sketcher("a", k=K, **options)
        return fingerprint(sketcher, placements_of(sketcher, model))

    kinds = [{}, {"correction": "tensor"}, {"correction": "adam"}, {"correction": "adam2"}, {"min_ndim": 2}]
    kinds += [{"mask_template": True}, {"correction": "adam", "damping": 0.2}]
    assert len({of(**kind) for kind in kinds}) == len(kinds)
    assert of(correction="adam") == of(correction="adam", damping=0.1)


def test_the_papers_fingerprint_is_what_it_was_before_there_were_corrections(checkpoints):
    model = hf.AutoModelForCausalLM.from_pretrained(checkpoints["base"])
    lark_ = make_sketcher("lark")
    assert fingerprint(lark_, placements_of(lark_, model)) == GOLDEN


GOLDEN = "c1893e01ca02951cd0b524692c5cd3fecf7d26dea71c484b68b6a5fd2f412439"


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        ({"correction": "lissa"}, "`lissa` is no correction"),
        ({"damping": 0.1}, "the correction `none` has no damping"),
        ({"correction": "tensor", "damping": 0.1}, "the correction `tensor` has no damping"),
        ({"correction": "adam", "damping": 0.0}, "a damping of 0.0 is not above 0"),
        ({"correction": "adam", "damping": float("nan")}, "a damping of nan is not above 0"),
        ({"min_ndim": 3}, "3 dimensions are none to begin at"),
    ],
)
def test_a_sketcher_that_makes_no_sense_is_refused(store, options, fact):
    with pytest.raises(InputError) as caught:
        store.sketcher_add("a", **options)
    assert caught.value.fact == fact


def test_a_sketchers_name_never_changes_its_correction(adam):
    assert adam.sketcher_add("step", k=K, correction="adam", min_ndim=2, mask_template=True).damping == 0.1
    for other in ({"correction": "adam2"}, {"damping": 0.2}, {"min_ndim": None}, {"mask_template": False}):
        with pytest.raises(NameTakenError):
            adam.sketcher_add("step", **({"k": K, "correction": "adam", "min_ndim": 2, "mask_template": True} | other))


def test_matrices_alone_are_what_min_ndim_takes(adam):
    shown = adam.sketcher_show("adam", checkpoint="base")
    assert all((len(shape) == 2) == sketched for shape, sketched in shown.select("shape", "sketched").rows())
    assert adam.sketcher_show("adam2", checkpoint="base")["sketched"].all()


# --- the fit -------------------------------------------------------------------------------------------------------


def test_a_fit_is_the_mean_of_the_samples_squared_gradients(adam, checkpoints):
    made = adam.correction_fit("base", sources=["finetune"])
    assert (made.n_samples, made.origin, made.sources, made.is_new) == (6, "gradients", "finetune", True)
    model = hf.AutoModelForCausalLM.from_pretrained(checkpoints["base"]).eval()
    v = dense_squares(model, tokens_of(adam, checkpoints, "finetune"))
    assert files(adam) == [name_of(made)]
    assert len(content(adam)) == made.n_bytes
    stored = load(content(adam))
    assert {key.rpartition("/")[0] for key in stored} == set(v)
    for name, squares in v.items():
        expected = Moments.of(squares)
        near = {"rtol": 1e-4, "atol": 1e-6 * float(expected.rows.max())}
        torch.testing.assert_close(stored[f"{name}/rows"].double(), expected.rows, **near)
        if squares.dim() == 2:
            torch.testing.assert_close(stored[f"{name}/columns"].double(), expected.columns, **near)
    [row] = rows(adam)
    assert (row["checkpoint"], row["kind"], row["n_samples"], row["sha256"]) == ("base", "adam", 6, made.sha256)


def test_fitting_again_in_the_same_way_does_nothing(adam):
    made = adam.correction_fit("base", samples=3)
    seen = []
    again = adam.correction_fit("base", samples=3, on_progress=seen.append)
    assert (again.sha256, again.created_at, again.is_new, seen) == (made.sha256, made.created_at, False, [])
    assert adam.correction_fit("base", kind="adam2", samples=3).is_new is False


def test_the_draw_is_the_same_each_time_and_another_with_another_seed(adam):
    first = adam.correction_fit("base", sources=["finetune", "songs"], samples=4)
    other = adam.correction_fit("epoch-1", sources=["songs", "finetune"], samples=4)
    hashes = [row["samples_sha256"] for row in rows(adam)]
    assert hashes[0] == hashes[1]
    assert first.sha256 != other.sha256
    adam.correction_fit("epoch-1", sources=["finetune", "songs"], samples=4, seed=1)
    assert rows(adam)[1]["samples_sha256"] != hashes[0]


def test_a_sample_that_fails_counts_not_and_none_is_an_error(adam):
    adam.variant_add("short", template="chatml", targets="response", max_length=20)
    with pytest.raises(InputError, match="none of the 5 samples has a gradient"):
        adam.correction_fit("base", sources=["songs"], variant="short")
    assert (rows(adam), files(adam)) == ([], [])
    adam.variant_add("answers", template="raw", targets="response")
    failed = []
    mixed = adam.correction_fit(
        "base", sources=["finetune", "songs"], variant="answers", on_progress=lambda p: failed.append(p.failed)
    )
    assert (mixed.n_samples, failed[-1]) == (6, 5)


@pytest.mark.parametrize(
    ("arguments", "error", "fact"),
    [
        ({"kind": "lissa"}, InputError, "nothing is fitted for a correction `lissa`"),
        ({"kind": "tensor"}, InputError, "nothing is fitted for a correction `tensor`"),
        ({"samples": 0}, InputError, "0 samples are none to fit to"),
        ({"sources": ["song"]}, NameUnknownError, "no source `song`"),
        ({"variant": "rav"}, NameUnknownError, "no variant `rav`"),
        ({"from_optimizer": "nowhere.pt"}, InputError, "there is no file `nowhere.pt`"),
    ],
)
def test_a_fit_that_cant_be_is_an_error_and_writes_nothing(adam, arguments, error, fact):
    with pytest.raises(error) as caught:
        adam.correction_fit("base", **arguments)
    assert caught.value.fact == fact
    assert (rows(adam), files(adam)) == ([], [])


KILLED = """
import os, signal, sys
from lark_store import Store
with Store.open(sys.argv[1]) as store:
    def stop(progress):
        if progress.done == 4:
            os.kill(os.getpid(), signal.SIGKILL)
    store.correction_fit("base", on_progress=stop)
"""


def test_a_killed_fit_leaves_nothing_and_the_next_is_whole(adam):
    done = subprocess.run([sys.executable, "-c", KILLED, named(adam.path)], check=False, env=os.environ)
    assert done.returncode == -signal.SIGKILL
    assert (rows(adam), files(adam)) == ([], [])
    made = adam.correction_fit("base")
    assert (made.n_samples, len(files(adam))) == (6, 1)


def test_a_fit_cut_off_between_file_and_row_is_made_again(adam, monkeypatch):
    def cut(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(factors, "now", cut)
        with pytest.raises(KeyboardInterrupt):
            adam.correction_fit("base")
    assert (len(files(adam)), rows(adam)) == (1, [])
    made = adam.correction_fit("base")
    assert files(adam) == [name_of(made)]


# --- an optimizer --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint that the Trainer saved with its optimizer, and the optimizer's second moments by parameter."""
    root = tmp_path_factory.mktemp("trained")
    start = save_checkpoint(root / "start", seed=5, tie_word_embeddings=False, attention_bias=True)
    model = hf.AutoModelForCausalLM.from_pretrained(start)
    data = [{"input_ids": [3, 4, 5 + i, 6, 7], "labels": [3, 4, 5 + i, 6, 7]} for i in range(8)]
    arguments = hf.TrainingArguments(
        output_dir=str(root / "out"),
        max_steps=4,
        per_device_train_batch_size=2,
        save_steps=4,
        report_to=[],
        weight_decay=0.01,
        use_cpu=True,
        disable_tqdm=True,
        adam_beta2=0.99,
    )
    tokenizer = hf.AutoTokenizer.from_pretrained(start)
    trainer = hf.Trainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    states = trainer.optimizer.state
    by_name = {name: states[p]["exp_avg_sq"] / (1 - 0.99**4) for name, p in trainer.model.named_parameters()}
    return root / "out" / "checkpoint-4", by_name


@pytest.mark.parametrize("place", ["folder", "file"])
def test_second_moments_are_those_of_the_saved_optimizer(store, trained, place):
    folder, by_name = trained
    store.checkpoint_add("trained", folder)
    path = folder if place == "folder" else folder / "optimizer.pt"
    made = store.correction_fit("trained", from_optimizer=path)
    assert (made.origin, made.n_samples, made.sources, made.is_new) == ("optimizer", None, None, True)
    stored = load(content(store))
    assert {key.rpartition("/")[0] for key in stored} == set(by_name)
    for name, v in by_name.items():
        assert float(v.sum()) > 0
        if v.dim() == 2:
            torch.testing.assert_close(stored[f"{name}/rows"], v.sum(dim=1) / v.shape[1], rtol=1e-5, atol=0)
            torch.testing.assert_close(stored[f"{name}/columns"], v.sum(dim=0) / v.shape[0], rtol=1e-5, atol=0)
        else:
            torch.testing.assert_close(stored[f"{name}/rows"], v, rtol=1e-5, atol=0)
    assert store.correction_fit("trained", from_optimizer=path).is_new is False
    store.sketcher_add("step", k=K, correction="adam")
    report = store.ingest(["trained"], ["finetune", "test"], ["chatml"], sketcher="step")
    assert report.notes == []
    assert report.n_failed == 0


class Code:
    """What a pickle runs when it is read."""

    def __reduce__(self):
        return (print, ("it ran",))


def test_a_pickle_with_code_is_refused_and_not_run(store, tmp_path, capsys):
    torch.save({"state": {}, "param_groups": Code()}, tmp_path / "optimizer.pt")
    with pytest.raises(InputError, match="can't be read without running code") as caught:
        store.correction_fit("base", from_optimizer=tmp_path)
    assert "other pickles are not read" in caught.value.hint
    assert "it ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        ("another model's", "the optimizer has 16 + 13 parameters, not 15 + 5 as"),
        ("without second moments", "the optimizer keeps no second moments of `"),
        ("of another shape", "the optimizer's state for `"),
        ("no betas", "the optimizer's state is not one of Adam's"),
        ("no optimizer", "holds no optimizer's state"),
        ("cut", "can't be read without running code"),
    ],
)
def test_an_optimizer_that_does_not_fit_is_refused(store, trained, tmp_path, change, fact):
    folder, _ = trained
    store.checkpoint_add("trained", folder)
    state = torch.load(folder / "optimizer.pt", weights_only=True)
    first = state["param_groups"][0]["params"][0]
    if change == "without second moments":
        del state["state"][first]["exp_avg_sq"]
    if change == "of another shape":
        state["state"][first]["exp_avg_sq"] = torch.ones(3, 3)
    if change == "no betas":
        del state["param_groups"][0]["betas"]
    if change == "no optimizer":
        state = {"model": 1}
    torch.save(state, tmp_path / "optimizer.pt")
    if change == "cut":
        (tmp_path / "optimizer.pt").write_bytes((folder / "optimizer.pt").read_bytes()[:1000])
    name = "base" if change == "another model's" else "trained"
    with pytest.raises((CheckpointError, InputError)) as caught:
        store.correction_fit(name, from_optimizer=tmp_path)
    assert fact in caught.value.fact
    assert (rows(store), files(store)) == ([], [])


# --- ingest --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sketcher", ["adam", "adam2", "tensor"])
def test_an_ingest_fits_what_is_missing_and_its_sketches_can_be_asked(adam, sketcher):
    report = adam.ingest(["base", "epoch-1"], ["finetune", "test", "songs"], ["chatml"], sketcher=sketcher)
    assert report.n_failed == 0
    notes = [note for note in report.notes if "were missing, and were fitted to 6 samples of finetune" in note]
    assert len(notes) == (0 if sketcher == "tensor" else 2)
    assert len(rows(adam)) == len(notes)
    assert len({row[0] for row in adam.sql("select fingerprint from ingest_runs").rows()}) == 1
    checked = adam.verify(sketcher=sketcher)
    assert checked["ok"].all()
    hits = adam.top("q100", checkpoint="base", sketcher=sketcher, k=3)
    assert len(hits.frame) == 3
    adam.attribute(["base", "epoch-1"], queries="test", sketcher=sketcher, method="tracin")
    adam.attribute(["base"], queries="test", sketcher=sketcher, query_checkpoint="epoch-1")
    again = adam.ingest(["base"], ["finetune", "medical"], ["chatml"], sketcher=sketcher)
    assert not any("fitted" in note for note in again.notes)


def test_a_query_that_is_typed_in_is_corrected_as_the_stored_one(adam):
    from lark_store.schema.records import NewText

    adam.ingest(["base"], ["finetune", "test"], ["chatml"], sketcher="step")
    prompt, response = adam.sql("select prompt, response from samples where sample_id = 'q101'").row(0)
    stored = adam.top("q101", checkpoint="base", sketcher="step", k=6).frame
    new = NewText(prompt=prompt, response=response)
    typed = adam.top(new=new, checkpoint="base", sketcher="step", k=6, query_variant="chatml").frame
    assert typed["sample_id"].to_list() == stored["sample_id"].to_list()
    np.testing.assert_allclose(typed["score"], stored["score"], atol=2e-3)


def test_ingest_takes_what_was_fitted_before(adam):
    made = adam.correction_fit("base", sources=["songs"], variant="raw")
    report = adam.ingest(["base"], ["finetune"], ["chatml"], sketcher="step")
    assert report.notes == []
    assert adam.sql("select recipe->>'correction_sha256' from ingest_runs").item() == made.sha256
    adam.ingest(["base"], ["finetune"], ["chatml"], sketcher="small")
    plain = adam.sql("select recipe from ingest_runs where sketcher = 'small'").item()
    assert "correction" not in plain


def test_without_a_source_to_fine_tune_on_the_ingests_own_are_taken(adam):
    adam.source_remove("finetune")
    report = adam.ingest(["base"], ["songs"], ["raw"], sketcher="step")
    assert "fitted to 5 samples of songs, as `raw`" in report.notes[0]


def test_a_plan_needs_no_factors_and_fits_none(adam):
    for sketcher, kind in (("adam", "BatchPath"), ("adam2", "BatchPath"), ("tensor", "HookPath")):
        planned = adam.plan(["base"], ["finetune"], ["chatml"], sketcher=sketcher)
        assert planned.checkpoints["path"].to_list() == [kind]
    assert rows(adam) == []


def test_factors_that_sketches_were_made_with_are_not_replaced(adam):
    first = adam.correction_fit("base", samples=3)
    second = adam.correction_fit("base", samples=4)  # nothing was made with the first
    assert files(adam) == [name_of(second)]
    assert first.sha256 != second.sha256
    adam.ingest(["base"], ["finetune"], ["chatml"], sketcher="step")
    seen = []
    with pytest.raises(InputError, match="with others they could not be compared"):
        adam.correction_fit("base", samples=3, on_progress=seen.append)
    assert [progress.label for progress in seen] == ["base: loading the model"]
    assert rows(adam)[0]["sha256"] == second.sha256
    assert adam.correction_fit("base", samples=4).is_new is False


@pytest.mark.parametrize("harm", ["gone", "changed"])
def test_factors_that_are_lost_are_an_error_and_the_same_fit_brings_them_back(adam, harm, tmp_path):
    adam.ingest(["base"], ["finetune"], ["chatml"], sketcher="step")
    [name], before, vectors = files(adam), content(adam), adam._db.vectors.files
    vectors.delete_file(name)
    if harm == "changed":
        (tmp_path / "changed").write_bytes(before[:-4] + b"\0\0\0\1")
        vectors.upload_file(str(tmp_path / "changed"), name)
    with pytest.raises(StoreError, match=r"corrections/.* (can't be read|are not what was written)") as caught:
        adam.ingest(["base"], ["test"], ["chatml"], sketcher="step")
    assert "lark-store correction fit --kind adam --checkpoint base" in caught.value.hint
    assert adam.correction_fit("base").n_samples == 6
    assert content(adam) == before
    assert adam.ingest(["base"], ["test"], ["chatml"], sketcher="step").n_failed == 0


@pytest.mark.parametrize("harm", ["lack", "have another shape for"])
def test_factors_that_do_not_fit_are_refused(adam, harm):
    adam.correction_fit("base")
    row, name = row_of(adam), "model.layers.1.mlp.down_proj.weight"
    moments = moments_in(factors.read(adam._db, row))
    if harm == "lack":
        del moments[name]
    else:
        moments[name] = Moments.of(torch.ones(3, 4))
    facts = {"kind": "adam", "origin": "gradients", "recipe": row.recipe}
    with adam._db.session() as session:
        checkpoint = find(session, Checkpoint, "base")
    factors.keep(adam._db, tensors_of(moments), factors.Correction(**facts), checkpoint)
    with pytest.raises(CheckpointError, match=f"{harm} `{name}`"):
        adam.ingest(["base"], ["finetune"], ["chatml"], sketcher="step")
    adam.sketcher_add("attention", k=K, correction="adam", parameters="self_attn")
    assert adam.ingest(["base"], ["finetune"], ["chatml"], sketcher="attention").n_failed == 0


def test_an_ingest_whose_factors_are_replaced_before_it_begins_is_told(adam, monkeypatch):
    adam.correction_fit("base", samples=3)
    begin = factors.check_same

    def replaced(db, checkpoint, sha256):
        return begin(db, checkpoint, "0" * 64 if sha256 else None)

    monkeypatch.setattr(factors, "check_same", replaced)
    with pytest.raises(StoreError, match="were replaced by another process"):
        adam.ingest(["base"], ["finetune"], ["chatml"], sketcher="step")


def test_verify_says_when_the_factors_are_others(adam):
    adam.ingest(["base"], ["finetune"], ["chatml"], sketcher="step")
    with adam._db.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE ingest_run SET recipe = replace(recipe, 'correction_sha256', 'other')")
    with pytest.raises(CheckpointError, match="are not those of ingest run 1"):
        adam.verify(sketcher="step")


# --- keeping -------------------------------------------------------------------------------------------------------


def test_a_checkpoint_that_goes_takes_its_factors_along(adam):
    adam.ingest(["base", "epoch-1"], ["finetune"], ["chatml"], sketcher="step")
    assert len(files(adam)) == 2
    planned = adam.checkpoint_remove("base", dry_run=True)
    assert len(files(adam)) == 2
    went = adam.checkpoint_remove("base")
    assert went.rows() == planned.rows()
    assert ("correction", "correction", 1) in went.rows()
    assert [row["checkpoint"] for row in rows(adam)] == ["epoch-1"]
    assert files(adam) == [f"corrections/{rows(adam)[0]['sha256'][:16]}.safetensors"]


def test_a_file_that_another_checkpoint_or_a_snapshot_needs_stays(adam, checkpoints):
    adam.checkpoint_add("twin", checkpoints["base"])
    adam.correction_fit("base")
    adam.correction_fit("twin")
    [file] = files(adam)
    adam.checkpoint_remove("base")
    assert files(adam) == [file]
    adam.snapshot_create("a")
    adam.checkpoint_remove("twin")
    assert files(adam) == [file]
    with Store.open(adam.path, snapshot="a") as then:
        assert [row["checkpoint"] for row in rows(then)] == ["twin"]


def test_a_backup_has_the_factors(adam, tmp_path):
    adam.ingest(["base"], ["finetune"], ["chatml"], sketcher="step")
    adam.db_backup(tmp_path / "backup")
    Store.db_restore(tmp_path / "backup", to=tmp_path / "restored")
    with Store.open(tmp_path / "restored") as restored:
        assert restored.db_check().filter(severity="error").is_empty()
        report = restored.ingest(["base"], ["test"], ["chatml"], sketcher="step")
        assert (report.notes, report.n_failed) == ([], 0)
        assert restored.verify(sketcher="step")["ok"].all()


def upload(store, name, content, tmp_path):
    """Put a file among the factors."""
    (tmp_path / "factors").write_bytes(content)
    store._db.vectors.files.upload_file(str(tmp_path / "factors"), name)


def test_a_check_looks_at_the_factors_too(adam, tmp_path):
    made = adam.correction_fit("base")
    assert adam.db_check().is_empty()
    whole = content(adam)
    upload(adam, name_of(made), whole[:-1] + b"!", tmp_path)
    assert adam.db_check().select("severity", "what", "where").rows() == [("error", "damaged file", "checkpoint base")]
    adam._db.vectors.files.delete_file(name_of(made))
    assert adam.db_check().select("severity", "what", "where").rows() == [("error", "missing file", "checkpoint base")]
    adam.correction_fit("base")
    upload(adam, "corrections/0123456789abcdef.safetensors", whole, tmp_path)
    (row,) = adam.db_check().rows(named=True)
    assert (row["severity"], row["what"], row["repair"]) == ("warning", "unverified file", "remove them")
    adam.db_repair()
    assert files(adam) == [name_of(made)]
    assert adam.db_check().is_empty()


def test_a_fit_holds_off_the_removal_of_its_checkpoint(adam):
    from lark_store.errors import StoreBusyError

    seen = []

    def remove(progress):
        if progress.done == 2:
            with pytest.raises(StoreBusyError) as caught:
                adam.checkpoint_remove("base")
            seen.append(caught.value.fact)

    adam.correction_fit("base", on_progress=remove)
    assert seen == ["checkpoint `base` is in use: another process is fitting the correction of checkpoint `base`"]
    assert _Work.__doc__


# --- the command line ----------------------------------------------------------------------------------------------


def test_the_commands(store, tmp_path):
    path = store.path
    line = f"sketcher add step -k {K} --correction adam --min-ndim 2 --mask-template"
    said = "sketcher `step`: k = 1024, seed 0, float16, correction adam (damping 0.1), parameters of 2 dimensions and "
    assert lark(line, store=path).err == f"{said}more, template masked\n"
    fit = "correction fit -c base -s finetune --samples 4"
    made = lark(fit, store=path)
    sha256 = rows(store)[0]["sha256"]
    last = f"correction `adam` of checkpoint `base`: from 4 samples of finetune, 0.01 MiB, {sha256[:12]}"
    assert (made.code, made.out, made.err.splitlines()[-1]) == (0, "", last)
    assert lark(fit, store=path).err == f"{last}, there already\n"
    assert lark("ingest -c base -s finetune --variant chatml --sketcher step", store=path).code == 0
    missing = lark("ingest -c epoch-1 -s finetune --variant chatml --sketcher step", store=path)
    assert "note: the second moments of checkpoint `epoch-1` were missing, and were fitted to 6" in missing.err
    [shown] = [row for row in lark("show -f json", store=path).rows["sketchers"] if row["name"] == "step"]
    assert (shown["correction"], shown["positions"], shown["min_ndim"]) == ("adam", "content", 2)
    wrong = lark(f"correction fit -c base --from-optimizer {tmp_path}", store=path)
    assert wrong.code == 1
    assert wrong.err.startswith("error: there is no file `")
