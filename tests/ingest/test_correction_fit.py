"""Corrected sketchers in a store: factors fitted, kept, taken by ingest, refused where they do not fit."""

from __future__ import annotations

import hashlib
import shutil
import signal
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch
import transformers as hf
from helpers.checkpoints import save_checkpoint
from helpers.corrections import correction_files, correction_rows, render_samples
from helpers.forked import run_forked
from helpers.gradients import CPU, mean_squared_gradient
from helpers.program import lark
from helpers.stores import store_label
from safetensors.torch import load

from lark_store import Store
from lark_store.errors import CheckpointError, InputError, NameTakenError, NameUnknownError, StoreError
from lark_store.gradients.corrections.second_moments import Moments, MomentSums, moments_in, tensors_of
from lark_store.gradients.sketch.layout import (
    fingerprint,
    imported_fingerprint,
    make_imported,
    make_sketcher,
    placements_of,
)
from lark_store.ingest import correction_store
from lark_store.ingest.fit_corrections import _Fit, _seed_of
from lark_store.schema.catalog import Checkpoint
from lark_store.schema.database import find

K = 1024


def factor_file(fit):
    return f"corrections/{fit.sha256[:16]}.safetensors"


def file_content(store):
    """Return the contents of the only file of factors."""
    [name] = correction_files(store)
    with tempfile.NamedTemporaryFile() as copy:
        store._db.vectors.files.download_file(name, copy.name)
        return Path(copy.name).read_bytes()


def row_of(store, name="base"):
    with store._db.session() as session:
        checkpoint = find(session, Checkpoint, name)
    return correction_store.stored(store._db, checkpoint, "adam")


@pytest.fixture
def adam(store):
    """The store with corrected sketchers, nothing fitted."""
    store.sketcher_add("step", k=K, correction="adam", min_ndim=2, mask_template=True)
    store.sketcher_add("adam2", k=K, correction="adam2", damping=0.01)
    store.sketcher_add("tensor", k=K, correction="tensor")
    return store


# --- sketchers -----------------------------------------------------------------------------------------------------


def test_fingerprint_covers_the_correction(checkpoints):
    model = hf.AutoModelForCausalLM.from_pretrained(checkpoints["base"])

    def of(**options):
        sketcher = make_sketcher("a", k=K, **options)
        return fingerprint(sketcher, placements_of(sketcher, model))

    kinds = [{}, {"correction": "tensor"}, {"correction": "adam"}, {"correction": "adam2"}, {"min_ndim": 2}]
    kinds += [{"mask_template": True}, {"correction": "adam", "damping": 0.2}]
    assert len({of(**kind) for kind in kinds}) == len(kinds)
    assert of(correction="adam") == of(correction="adam", damping=0.1)


def test_uncorrected_fingerprint_is_unchanged(checkpoints):
    model = hf.AutoModelForCausalLM.from_pretrained(checkpoints["base"])
    lark_ = make_sketcher("lark")
    assert fingerprint(lark_, placements_of(lark_, model)) == GOLDEN


def test_fingerprint_of_imported_sketches_is_unchanged():
    imported = make_imported("mine", 8, "float16")
    identity = '{"dtype": "float16", "k": 8, "made": "imported", "name": "mine"}'
    assert imported_fingerprint(imported) == hashlib.sha256(identity.encode()).hexdigest()
    assert (imported.k, imported.dtype, imported.seed, imported.map_version) == (8, "float16", 0, 0)


GOLDEN = "c1893e01ca02951cd0b524692c5cd3fecf7d26dea71c484b68b6a5fd2f412439"


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        ({"correction": "lissa"}, "unknown correction `lissa`"),
        ({"damping": 0.1}, "the correction `none` has no damping"),
        ({"correction": "tensor", "damping": 0.1}, "the correction `tensor` has no damping"),
        ({"correction": "adam", "damping": 0.0}, "the damping must be positive, not 0.0"),
        ({"correction": "adam", "damping": float("nan")}, "the damping must be positive, not nan"),
        ({"min_ndim": 3}, "the minimum number of dimensions must be from 0 to 2, not 3"),
    ],
)
def test_invalid_sketcher_is_refused(store, options, fact):
    with pytest.raises(InputError) as caught:
        store.sketcher_add("a", **options)
    assert caught.value.fact == fact


def test_sketcher_never_changes_its_correction(adam):
    assert adam.sketcher_add("step", k=K, correction="adam", min_ndim=2, mask_template=True).damping == 0.1
    for other, reason in (
        ({"correction": "adam2"}, "correction `adam`, not `adam2`"),
        ({"damping": 0.2}, "damping `0.1`, not `0.2`"),
        ({"min_ndim": None}, "min_ndim `2`, not `None`"),
        ({"mask_template": False}, "positions `content`, not `all`"),
    ):
        with pytest.raises(NameTakenError, match=f"sketcher `step` already exists with {reason}"):
            adam.sketcher_add("step", **({"k": K, "correction": "adam", "min_ndim": 2, "mask_template": True} | other))


def test_min_ndim_selects_matrices(adam):
    parameters = adam.sketcher_show("adam", checkpoint="base")
    assert all((len(shape) == 2) == sketched for shape, sketched in parameters.select("shape", "sketched").rows())
    assert adam.sketcher_show("adam2", checkpoint="base")["sketched"].all()


# --- the fit -------------------------------------------------------------------------------------------------------


def test_fit_is_the_mean_of_squared_gradients(adam, checkpoints):
    fit = adam.correction_fit("base", sources=["finetune"])
    assert (fit.n_samples, fit.origin, fit.sources, fit.is_new) == (6, "gradients", "finetune", True)
    model = hf.AutoModelForCausalLM.from_pretrained(checkpoints["base"]).eval()
    v = mean_squared_gradient(model, render_samples(adam, checkpoints, "finetune"))
    assert correction_files(adam) == [factor_file(fit)]
    assert len(file_content(adam)) == fit.n_bytes
    stored = load(file_content(adam))
    assert {key.rpartition("/")[0] for key in stored} == set(v)
    for name, squares in v.items():
        expected = Moments.of(squares)
        near = {"rtol": 1e-4, "atol": 1e-6 * float(expected.rows.max())}
        torch.testing.assert_close(stored[f"{name}/rows"].double(), expected.rows, **near)
        if squares.dim() == 2:
            torch.testing.assert_close(stored[f"{name}/columns"].double(), expected.columns, **near)
    [row] = correction_rows(adam)
    assert (row["checkpoint"], row["kind"], row["n_samples"], row["sha256"]) == ("base", "adam", 6, fit.sha256)


def test_parameter_without_gradient_has_zero_second_moments():
    used, unused = torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.ones(4, 5))
    sums = MomentSums([("used", used), ("unused", unused), ("vector", torch.nn.Parameter(torch.ones(3)))], CPU)
    for values in ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [0.0, 0.0, 3.0, 0.0, 0.0, 0.0]):
        sums.add("used", torch.tensor([values]), sums.new())
        sums.commit(keep=True)
    sums.add("unused", torch.ones(1, 20), sums.new())
    sums.commit(keep=False)  # a failed sample does not count
    means = sums.means()
    torch.testing.assert_close(means["used"].rows, torch.tensor([23 / 6, 77 / 6], dtype=torch.float64))
    torch.testing.assert_close(means["used"].columns, torch.tensor([17 / 4, 29 / 4, 54 / 4], dtype=torch.float64))
    assert (means["unused"].rows.tolist(), means["unused"].columns.tolist()) == ([0.0] * 4, [0.0] * 5)
    assert (means["vector"].rows.tolist(), means["vector"].columns) == ([0.0] * 3, None)
    assert sums.n == 2


def test_repeated_fit_does_nothing(adam):
    fit = adam.correction_fit("base", samples=3)
    seen = []
    again = adam.correction_fit("base", samples=3, on_progress=seen.append)
    assert (again.sha256, again.created_at, again.is_new, seen) == (fit.sha256, fit.created_at, False, [])
    assert adam.correction_fit("base", kind="adam2", samples=3).is_new is False


def test_draw_and_seeds_are_those_of_earlier_versions():
    """An equal fit of another version must draw equal samples and labels: by SHA-256 of their names."""
    rows = [("songs", f"s{n}", f"hash{n}") for n in range(9)]
    fit = object.__new__(_Fit)
    fit.db = SimpleNamespace(vectors=SimpleNamespace(read=lambda *_: pl.DataFrame(rows, orient="row")))
    fit.sources, fit.spec = ["songs"], SimpleNamespace(seed=3, samples=4)
    texts = {row: f'[3, "songs", "{row[1]}", "{row[2]}"]'.encode() for row in rows}
    assert fit._draw() == sorted(rows, key=lambda row: hashlib.sha256(texts[row]).digest())[:4]
    first = hashlib.sha256(texts[rows[0]]).digest()
    assert _seed_of([3, *rows[0]]) == first[0] + (first[1] << 8) + (first[2] << 16) + (first[3] << 24)


def test_draw_depends_on_the_seed_only(adam):
    first = adam.correction_fit("base", sources=["finetune", "songs"], samples=4)
    other = adam.correction_fit("epoch-1", sources=["songs", "finetune"], samples=4)
    hashes = [row["samples_sha256"] for row in correction_rows(adam)]
    assert hashes[0] == hashes[1]
    assert first.sha256 != other.sha256
    adam.correction_fit("epoch-1", sources=["finetune", "songs"], samples=4, seed=1)
    assert correction_rows(adam)[1]["samples_sha256"] != hashes[0]


def test_failed_samples_do_not_count_and_no_sample_is_an_error(adam):
    adam.variant_add("short", template="chatml", targets="response", max_length=20)
    with pytest.raises(InputError, match="none of the 5 samples has a gradient"):
        adam.correction_fit("base", sources=["songs"], variant="short")
    assert (correction_rows(adam), correction_files(adam)) == ([], [])
    adam.variant_add("answers", template="raw", targets="response")
    failed = []
    mixed = adam.correction_fit(
        "base", sources=["finetune", "songs"], variant="answers", on_progress=lambda p: failed.append(p.failed)
    )
    assert (mixed.n_samples, failed[-1]) == (6, 5)


@pytest.mark.parametrize(
    ("arguments", "error", "fact"),
    [
        ({"kind": "lissa"}, InputError, "the correction `lissa` has no factors to fit"),
        ({"kind": "tensor"}, InputError, "the correction `tensor` has no factors to fit"),
        ({"samples": 0}, InputError, "`samples` must be at least 1, not 0"),
        ({"sources": ["song"]}, NameUnknownError, "no source `song`"),
        ({"variant": "rav"}, NameUnknownError, "no variant `rav`"),
        ({"from_optimizer": "nowhere.pt"}, InputError, "there is no file `nowhere.pt`"),
    ],
)
def test_impossible_fit_is_an_error_and_writes_nothing(adam, arguments, error, fact):
    with pytest.raises(error) as caught:
        adam.correction_fit("base", **arguments)
    assert caught.value.fact == fact
    assert (correction_rows(adam), correction_files(adam)) == ([], [])


KILLED = """
import os, signal, sys
from lark_store import Store
with Store.open(sys.argv[1]) as store:
    def stop(progress):
        if progress.done == 4:
            os.kill(os.getpid(), signal.SIGKILL)
    store.correction_fit("base", on_progress=stop)
"""


def test_killed_fit_leaves_nothing_and_the_next_succeeds(adam):
    assert run_forked(KILLED, store_label(adam.path)) == -signal.SIGKILL
    assert (correction_rows(adam), correction_files(adam)) == ([], [])
    fit = adam.correction_fit("base")
    assert (fit.n_samples, len(correction_files(adam))) == (6, 1)


def test_fit_killed_between_file_and_row_is_repeated(adam, monkeypatch):
    def cut(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(correction_store, "now", cut)
        with pytest.raises(KeyboardInterrupt):
            adam.correction_fit("base")
    assert (len(correction_files(adam)), correction_rows(adam)) == (1, [])
    fit = adam.correction_fit("base")
    assert correction_files(adam) == [factor_file(fit)]


# --- an optimizer --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint saved by the Trainer with its optimizer, and the optimizer's second moments by parameter."""
    root = tmp_path_factory.mktemp("trained")
    start = save_checkpoint(root / "start", seed=5, tie_word_embeddings=False, attention_bias=True)
    model = hf.AutoModelForCausalLM.from_pretrained(start)
    data = [{"input_ids": [3, 4, 5 + i, 6, 7], "labels": [3, 4, 5 + i, 6, 7]} for i in range(8)]
    arguments = hf.TrainingArguments(
        output_dir=str(root / "out"),
        max_steps=4,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,  # a step of the optimizer is of two batches
        save_steps=2,
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
def test_second_moments_equal_the_saved_optimizers(store, trained, place):
    folder, by_name = trained
    store.checkpoint_add("trained", folder)
    path = folder if place == "folder" else folder / "optimizer.pt"
    fit = store.correction_fit("trained", from_optimizer=path)
    assert (fit.origin, fit.n_samples, fit.sources, fit.is_new) == ("optimizer", None, None, True)
    stored = load(file_content(store))
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


def read_state(folder):
    return torch.load(folder / "optimizer.pt", weights_only=True)


@pytest.mark.parametrize("known", ["in the store", "by the Trainer"])
@pytest.mark.parametrize("place", ["folder", "file", "copy"])
def test_an_optimizer_of_another_step_is_refused(store, trained, tmp_path, known, place):
    folder, _ = trained
    store.checkpoint_add("trained", folder)
    if known == "by the Trainer":  # added by a version that did not read the Trainer's facts
        with store._db.session() as session:
            find(session, Checkpoint, "trained").step = None
    other = folder.parent / "checkpoint-2"
    shutil.copy(other / "optimizer.pt", tmp_path)
    path = {"folder": other, "file": other / "optimizer.pt", "copy": tmp_path / "optimizer.pt"}[place]
    with pytest.raises(CheckpointError) as caught:
        store.correction_fit("trained", from_optimizer=path)
    says = "the store" if known == "in the store" else "the trainer_state.json in its folder"
    assert caught.value.fact == (
        f"the optimizer in `{path}` is of step 2, but checkpoint `trained` is of step 4 according to {says}"
    )
    assert "saved at step 4" in caught.value.hint
    assert "step=2, ...)`" in caught.value.hint
    assert (correction_rows(store), correction_files(store)) == ([], [])
    fit = store.correction_fit("trained", from_optimizer=folder)
    assert fit.notes == ()
    assert correction_rows(store)[0]["recipe"].count('"steps": 4') == 1


@pytest.fixture
def bare(trained, tmp_path):
    """The checkpoint's model alone, as from a hub, and a folder with nothing but its optimizer."""
    alone, apart = tmp_path / "alone", tmp_path / "apart"
    shutil.copytree(trained[0], alone, ignore=shutil.ignore_patterns("*.pt", "*.pth", "*.bin", "trainer_state.json"))
    apart.mkdir()
    shutil.copy(trained[0] / "optimizer.pt", apart)
    return alone, apart


def test_unknown_step_is_reported(store, trained, bare):
    alone, apart = bare
    store.checkpoint_add("trained", alone)
    result = lark(f"correction fit -c trained --from-optimizer {apart}", store=store.path)
    note = "checkpoint `trained` has no known step to compare with the optimizer's, 4"
    assert (result.code, result.err.splitlines()[-1]) == (0, f"note: {note}")
    assert store.correction_fit("trained", from_optimizer=trained[0]).notes == ()  # the same weights lie beside it


def test_optimizer_of_other_weights_is_refused(store, trained, bare):
    alone, _ = bare
    store.checkpoint_add("trained", alone)
    with pytest.raises(CheckpointError, match="are not those of checkpoint `trained`") as caught:
        store.correction_fit("trained", from_optimizer=trained[0].parent / "checkpoint-2")
    assert "copy `optimizer.pt` with its `trainer_state.json`" in caught.value.hint


@pytest.mark.parametrize(("made_by", "fact"), [(5, None), (4, None), (3, "has made 4 steps, but the")])
def test_skipped_optimizer_steps_are_noted_and_extra_ones_refused(store, bare, made_by, fact):
    alone, apart = bare
    (apart / "trainer_state.json").write_text(f'{{"global_step": {made_by}}}', encoding="utf-8")
    store.checkpoint_add("trained", alone, step=made_by)
    if fact:
        with pytest.raises(CheckpointError, match=fact):
            store.correction_fit("trained", from_optimizer=apart)
        return
    notes = ("the optimizer has made 4 steps by step 5: it skipped some or started later",) if made_by == 5 else ()
    assert store.correction_fit("trained", from_optimizer=apart).notes == notes


def test_temporarily_frozen_parameter_has_fewer_steps(store, trained, bare):
    _, by_name = trained
    alone, apart = bare
    state = read_state(trained[0])
    last = state["param_groups"][1]["params"][-1]
    state["state"][last]["step"] = torch.tensor(2.0)
    torch.save(state, apart / "optimizer.pt")
    store.checkpoint_add("trained", alone, step=4)
    store.correction_fit("trained", from_optimizer=apart)
    stored = load(file_content(store))
    assert '"steps": 4' in correction_rows(store)[0]["recipe"]
    name = "model.norm.weight"
    corrected = by_name[name] * (1 - 0.99**4) / (1 - 0.99**2)
    torch.testing.assert_close(stored[f"{name}/rows"], corrected, rtol=1e-5, atol=0)


def test_names_come_from_the_file(store, trained, bare):
    """One group in another order than the model's: the names say which parameter is which."""
    _, by_name = trained
    alone, apart = bare
    names = sorted(by_name, reverse=True)
    states = {
        i: {"exp_avg_sq": by_name[name] * (1 - 0.99**4), "step": torch.tensor(4.0)} for i, name in enumerate(names)
    }
    group = {"params": list(states), "betas": (0.9, 0.99), "param_names": names}
    torch.save({"state": states, "param_groups": [group]}, apart / "optimizer.pt")
    store.checkpoint_add("trained", alone, step=4)
    store.correction_fit("trained", from_optimizer=apart)
    stored = load(file_content(store))
    for name, v in by_name.items():
        expected = v.mean(dim=-1) if v.dim() == 2 else v
        torch.testing.assert_close(stored[f"{name}/rows"], expected, rtol=1e-5, atol=0)
    group["param_names"] = [*names[:-1], "model.other.weight"]
    torch.save({"state": states, "param_groups": [group]}, apart / "optimizer.pt")
    with pytest.raises(CheckpointError, match="they differ in `"):
        store.correction_fit("trained", from_optimizer=apart)


class Code:
    """A pickle's payload, run on reading."""

    def __reduce__(self):
        return (print, ("it ran",))


def test_pickle_with_code_is_refused_without_running_it(store, tmp_path, capsys):
    torch.save({"state": {}, "param_groups": Code()}, tmp_path / "optimizer.pt")
    with pytest.raises(InputError, match="can't be read without running code") as caught:
        store.correction_fit("base", from_optimizer=tmp_path)
    assert "other pickles are never read" in caught.value.hint
    assert "it ran" not in capsys.readouterr().out


CHANGES = {  # of the first parameter's state, and the groups
    "without second moments": lambda held, _: held.pop("exp_avg_sq"),
    "of another shape": lambda held, _: held.update(exp_avg_sq=torch.ones(3, 3)),
    "no betas": lambda _, groups: groups[0].pop("betas"),
    "a beta of 1": lambda _, groups: groups[0].update(betas=(0.9, 1.0)),
    "below 0": lambda held, _: held.update(exp_avg_sq=held["exp_avg_sq"] - 1),
    "no step": lambda held, _: held.pop("step"),
    "at step 0": lambda held, _: held.update(step=torch.tensor(0.0)),
    "adapters": lambda _, groups: [
        group.update(params=group["params"][:n]) for group, n in zip(groups, (4, 0), strict=True)
    ],
}


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        ("another model's", "the optimizer has 16 + 13 parameters, but the Trainer trains 15 + 5"),
        ("without second moments", "the optimizer has no second moments of `"),
        ("of another shape", "the optimizer's state for `"),
        ("no betas", "the optimizer's state is not of Adam"),
        ("a beta of 1", "is not of Adam: β2 is 1.0, or"),
        ("below 0", "or a number is below 0"),
        ("no step", "the optimizer has no second moments of `"),
        ("at step 0", "the optimizer has no second moments of `"),
        ("adapters", "the optimizer has 4 + 0 parameters, but the Trainer trains 16 + 13"),
        ("no optimizer", "holds no optimizer state"),
        ("cut", "can't be read without running code"),
    ],
)
def test_mismatched_optimizer_is_refused(store, trained, tmp_path, change, fact):
    folder, _ = trained
    store.checkpoint_add("trained", folder)
    state = torch.load(folder / "optimizer.pt", weights_only=True)
    first = state["param_groups"][0]["params"][0]
    CHANGES.get(change, lambda *_: None)(state["state"][first], state["param_groups"])
    if change == "no optimizer":
        state = {"model": 1}
    torch.save(state, tmp_path / "optimizer.pt")
    if change == "cut":
        (tmp_path / "optimizer.pt").write_bytes((folder / "optimizer.pt").read_bytes()[:1000])
    name = "base" if change == "another model's" else "trained"
    with pytest.raises((CheckpointError, InputError)) as caught:
        store.correction_fit(name, from_optimizer=tmp_path)
    assert fact in caught.value.fact
    assert (correction_rows(store), correction_files(store)) == ([], [])


# --- ingest --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sketcher", ["adam", "adam2", "tensor"])
def test_ingest_fits_missing_factors_and_its_sketches_are_searchable(adam, sketcher):
    report = adam.ingest(["base", "epoch-1"], ["finetune", "test", "songs"], ["chatml"], sketcher=sketcher)
    assert report.n_failed == 0
    notes = [note for note in report.notes if note.startswith("fitted the missing") and "6 samples of finetune" in note]
    assert len(notes) == (0 if sketcher == "tensor" else 2)
    assert len(correction_rows(adam)) == len(notes)
    assert len({row[0] for row in adam.sql("select fingerprint from ingest_runs").rows()}) == 1
    checked = adam.verify(sketcher=sketcher)
    assert checked["ok"].all()
    hits = adam.top("q100", checkpoint="base", sketcher=sketcher, k=3)
    assert len(hits.frame) == 3
    adam.attribute(["base", "epoch-1"], queries="test", sketcher=sketcher, method="tracin")
    adam.attribute(["base"], queries="test", sketcher=sketcher, query_checkpoint="epoch-1")
    again = adam.ingest(["base"], ["finetune", "medical"], ["chatml"], sketcher=sketcher)
    assert not any("fitted" in note for note in again.notes)


def test_new_query_is_corrected_like_a_stored_one(adam):
    from lark_store.results import NewText

    adam.ingest(["base"], ["finetune", "test"], ["chatml"], sketcher="step")
    prompt, response = adam.sql("select prompt, response from samples where sample_id = 'q101'").row(0)
    stored = adam.top("q101", checkpoint="base", sketcher="step", k=6).frame
    new = NewText(prompt=prompt, response=response)
    typed = adam.top(new=new, checkpoint="base", sketcher="step", k=6, query_variant="chatml").frame
    assert typed["sample_id"].to_list() == stored["sample_id"].to_list()
    np.testing.assert_allclose(typed["score"], stored["score"], atol=2e-3)


def test_ingest_reuses_fitted_factors(adam):
    fit = adam.correction_fit("base", sources=["songs"], variant="raw")
    report = adam.ingest(["base"], ["finetune"], ["chatml"], sketcher="step")
    assert report.notes == []
    assert adam.sql("select recipe->>'correction_sha256' from ingest_runs").item() == fit.sha256
    adam.ingest(["base"], ["finetune"], ["chatml"], sketcher="small")
    plain = adam.sql("select recipe from ingest_runs where sketcher = 'small'").item()
    assert "correction" not in plain


def test_without_finetune_source_factors_use_the_ingested_samples(adam):
    adam.source_remove("finetune")
    report = adam.ingest(["base"], ["songs"], ["raw"], sketcher="step")
    assert "to 5 samples of songs, as `raw`" in report.notes[0]


def test_plan_fits_no_factors(adam):
    for sketcher, kind in (("adam", "BatchPath"), ("adam2", "BatchPath"), ("tensor", "HookPath")):
        planned = adam.plan(["base"], ["finetune"], ["chatml"], sketcher=sketcher)
        assert planned.checkpoints["path"].to_list() == [kind]
    assert correction_rows(adam) == []


def test_factors_used_by_sketches_are_not_replaced(adam):
    first = adam.correction_fit("base", samples=3)
    second = adam.correction_fit("base", samples=4)  # nothing was made with the first
    assert correction_files(adam) == [factor_file(second)]
    assert first.sha256 != second.sha256
    adam.ingest(["base"], ["finetune"], ["chatml"], sketcher="step")
    seen = []
    with pytest.raises(InputError, match="sketches with other factors could not be compared"):
        adam.correction_fit("base", samples=3, on_progress=seen.append)
    assert [progress.label for progress in seen] == ["base: loading the model"]
    assert correction_rows(adam)[0]["sha256"] == second.sha256
    assert adam.correction_fit("base", samples=4).is_new is False


@pytest.mark.parametrize("harm", ["gone", "changed"])
def test_lost_factors_are_an_error_and_refitting_restores_them(adam, harm, tmp_path):
    adam.ingest(["base"], ["finetune"], ["chatml"], sketcher="step")
    [name], before, vectors = correction_files(adam), file_content(adam), adam._db.vectors.files
    vectors.delete_file(name)
    if harm == "changed":
        (tmp_path / "changed").write_bytes(before[:-4] + b"\0\0\0\1")
        vectors.upload_file(str(tmp_path / "changed"), name)
    with pytest.raises(StoreError, match=r"corrections/.* (can't be read|are damaged)") as caught:
        adam.ingest(["base"], ["test"], ["chatml"], sketcher="step")
    assert '`store.correction_fit(kind="adam", checkpoint="base", ...)`' in caught.value.hint
    assert adam.correction_fit("base").n_samples == 6
    assert file_content(adam) == before
    assert adam.ingest(["base"], ["test"], ["chatml"], sketcher="step").n_failed == 0


@pytest.mark.parametrize("harm", ["lack", "have another shape for"])
def test_mismatched_factors_are_refused(adam, harm):
    adam.correction_fit("base")
    row, name = row_of(adam), "model.layers.1.mlp.down_proj.weight"
    moments = moments_in(correction_store.read(adam._db, row))
    if harm == "lack":
        del moments[name]
    else:
        moments[name] = Moments.of(torch.ones(3, 4))
    facts = {"kind": "adam", "origin": "gradients", "recipe": row.recipe}
    with adam._db.session() as session:
        checkpoint = find(session, Checkpoint, "base")
    correction_store.save(adam._db, tensors_of(moments), correction_store.Correction(**facts), checkpoint)
    with pytest.raises(CheckpointError, match=f"{harm} `{name}`"):
        adam.ingest(["base"], ["finetune"], ["chatml"], sketcher="step")
    adam.sketcher_add("attention", k=K, correction="adam", parameters="self_attn")
    assert adam.ingest(["base"], ["finetune"], ["chatml"], sketcher="attention").n_failed == 0


def test_ingest_fails_if_its_factors_are_replaced_first(adam, monkeypatch):
    adam.correction_fit("base", samples=3)
    begin = correction_store.check_same

    def replaced(db, checkpoint, sha256):
        return begin(db, checkpoint, "0" * 64 if sha256 else None)

    monkeypatch.setattr(correction_store, "check_same", replaced)
    with pytest.raises(StoreError, match="another process replaced the factors"):
        adam.ingest(["base"], ["finetune"], ["chatml"], sketcher="step")


def test_verify_reports_changed_factors(adam):
    adam.ingest(["base"], ["finetune"], ["chatml"], sketcher="step")
    with adam._db.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE ingest_run SET recipe = replace(recipe, 'correction_sha256', 'other')")
    with pytest.raises(CheckpointError, match="differ from those of ingest run 1"):
        adam.verify(sketcher="step")


# --- keeping -------------------------------------------------------------------------------------------------------


def test_removed_checkpoint_removes_its_factors(adam):
    adam.ingest(["base", "epoch-1"], ["finetune"], ["chatml"], sketcher="step")
    assert len(correction_files(adam)) == 2
    planned = adam.checkpoint_remove("base", dry_run=True)
    assert len(correction_files(adam)) == 2
    went = adam.checkpoint_remove("base")
    assert went.rows() == planned.rows()
    assert ("correction", "correction", 1) in went.rows()
    assert [row["checkpoint"] for row in correction_rows(adam)] == ["epoch-1"]
    assert correction_files(adam) == [f"corrections/{correction_rows(adam)[0]['sha256'][:16]}.safetensors"]


def test_factor_file_in_use_is_kept(adam, checkpoints):
    adam.checkpoint_add("twin", checkpoints["base"])
    adam.correction_fit("base")
    adam.correction_fit("twin")
    [file] = correction_files(adam)
    adam.checkpoint_remove("base")
    assert correction_files(adam) == [file]
    adam.snapshot_create("a")
    adam.checkpoint_remove("twin")
    assert correction_files(adam) == [file]
    with Store.open(adam.path, snapshot="a") as then:
        assert [row["checkpoint"] for row in correction_rows(then)] == ["twin"]


def test_backup_contains_the_factors(adam, tmp_path):
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


def test_check_covers_the_factors(adam, tmp_path):
    fit = adam.correction_fit("base")
    assert adam.db_check().is_empty()
    whole = file_content(adam)
    upload(adam, factor_file(fit), whole[:-1] + b"!", tmp_path)
    assert adam.db_check().select("severity", "what", "where").rows() == [("error", "damaged file", "checkpoint base")]
    adam._db.vectors.files.delete_file(factor_file(fit))
    assert adam.db_check().select("severity", "what", "where").rows() == [("error", "missing file", "checkpoint base")]
    adam.correction_fit("base")
    upload(adam, "corrections/0123456789abcdef.safetensors", whole, tmp_path)
    (row,) = adam.db_check().rows(named=True)
    assert (row["severity"], row["what"], row["repair"]) == ("warning", "unverified file", "remove them")
    adam.db_repair()
    assert correction_files(adam) == [factor_file(fit)]
    assert adam.db_check().is_empty()


def test_running_fit_blocks_removal_of_its_checkpoint(adam):
    from lark_store.errors import StoreBusyError

    seen = []

    def remove(progress):
        if progress.done == 2:
            with pytest.raises(StoreBusyError) as caught:
                adam.checkpoint_remove("base")
            seen.append(caught.value.fact)

    adam.correction_fit("base", on_progress=remove)
    assert seen == ["checkpoint `base` is in use: another process is fitting the correction of checkpoint `base`"]
    assert _Fit.__doc__


# --- the command line ----------------------------------------------------------------------------------------------


def test_the_commands(store, tmp_path):
    path = store.path
    line = f"sketcher add step -k {K} --correction adam --min-ndim 2 --mask-template"
    message = "sketcher `step`: k = 1024, seed 0, float16, correction adam (damping 0.1), parameters with at "
    assert lark(line, store=path).err == f"{message}least 2 dimensions, template masked\n"
    fit = "correction fit -c base -s finetune --samples 4"
    result = lark(fit, store=path)
    sha256 = correction_rows(store)[0]["sha256"]
    last = f"correction `adam` of checkpoint `base`: from 4 samples of finetune, 0.01 MiB, {sha256[:12]}"
    assert (result.code, result.out, result.err.splitlines()[-1]) == (0, "", last)
    assert lark(fit, store=path).err == f"{last}, existing\n"
    assert lark("ingest -c base -s finetune --variant chatml --sketcher step", store=path).code == 0
    missing = lark("ingest -c epoch-1 -s finetune --variant chatml --sketcher step", store=path)
    assert "note: fitted the missing second moments of checkpoint `epoch-1` to 6" in missing.err
    [shown] = [row for row in lark("show -f json", store=path).rows["sketchers"] if row["name"] == "step"]
    assert (shown["correction"], shown["positions"], shown["min_ndim"]) == ("adam", "content", 2)
    wrong = lark(f"correction fit -c base --from-optimizer {tmp_path}", store=path)
    assert wrong.code == 1
    assert wrong.err.startswith("error: there is no file `")
