"""Evaluation: likelihoods of labels, accuracy and macro-F1 with intervals."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import torch
from conftest import qa_rows, save_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from lark_store.ingest.sources import make_sample
from lark_store.ingest.variants import Renderer, make_variant
from lark_store.study import evaluate
from lark_store.study import recipe as recipes

RECIPE = """
device = "cpu"
[model]
path = "base"
[finetune]
learning_rates = [1e-3]
[evaluate]
labels = ["yes", "no", "maybe not"]
[sketch]
batch_tokens = 200
[[source]]
name = "finetune"
stage = "finetune"
uri = "x"
[[source]]
name = "test"
stage = "query"
uri = "x"
[[source]]
name = "songs"
stage = "pretrain"
uri = "x"
"""
LABELS = ["yes", "no", "maybe not"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "x.toml").write_text(RECIPE, encoding="utf-8")
    return recipes.read(tmp_path / "x.toml")


def test_likelihoods_are_those_of_whole_texts_read_one_by_one(base, recipe):
    samples = [make_sample({**row, "answer": LABELS[i % 3]}, {}) for i, row in enumerate(qa_rows(7))]
    found = evaluate.predict(recipe, "base", base, samples, lambda _: None)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    renderer = Renderer(make_variant("chatml", "chatml", "auto", 1024), AutoTokenizer.from_pretrained(base))
    for row, sample in zip(found.iter_rows(named=True), samples, strict=True):
        expected = []
        for label in LABELS:
            tokens = renderer.render(make_sample({"prompt": sample.prompt, "response": label}, {}))
            with torch.no_grad():
                ln_p = model(torch.tensor([tokens.input_ids])).logits[0].log_softmax(-1)
            at = [t for t, is_target in enumerate(tokens.is_target) if is_target]
            expected.append(float(sum(ln_p[t - 1, tokens.input_ids[t]] for t in at)))
        assert [row[f"ln p({label})"] for label in LABELS] == pytest.approx(expected, abs=1e-3)
        assert row["prediction"] == LABELS[int(np.argmax(expected))]
        assert (row["query_id"], row["label"], row["checkpoint"]) == (sample.sample_id, sample.response, "base")


def test_what_texts_share_is_read_once(base, recipe):
    rows = [{**row, "answer": "Y"} for row in qa_rows(5)]
    one_token_each = recipe.model_copy(update={"evaluate": recipes.Evaluate(labels=["Y", "N", "M"])})
    seen = []
    evaluate.predict(one_token_each, "base", base, [make_sample(row, {}) for row in rows], seen.append)
    assert seen[-1].done == seen[-1].total == 5


def test_a_question_without_one_of_the_labels_is_left_out(base, recipe):
    rows = [{**row, "answer": answer} for row, answer in zip(qa_rows(3), ("yes", "perhaps", "no"), strict=True)]
    found = evaluate.predict(recipe, "base", base, [make_sample(row, {}) for row in rows], lambda _: None)
    assert found["label"].to_list() == ["yes", "no"]


def predictions(pairs):
    return pl.DataFrame(pairs, {"label": pl.String, "prediction": pl.String}, orient="row")


def test_accuracy_and_macro_f1_against_counting():
    pairs = [("a", "a")] * 6 + [("a", "b")] * 2 + [("b", "b")] * 3 + [("b", "c")] + [("c", "a")] * 2 + [("c", "c")]
    found = evaluate.figures(predictions(pairs), ["a", "b", "c", "never"], seed=0)
    # precision and recall: a 6/8, 6/8; b 3/5, 3/4; c 1/2, 1/3
    f1 = [0.75, 2 * 0.6 * 0.75 / 1.35, 2 * 0.5 * (1 / 3) / (0.5 + 1 / 3)]
    assert found["accuracy"] == pytest.approx(10 / 15)
    assert found["macro_f1"] == pytest.approx(np.mean(f1))
    assert found["n_evaluated"] == 15


def test_all_right_of_a_few_is_no_certainty():
    found = evaluate.figures(predictions([("a", "a"), ("b", "b")] * 2), ["a", "b"], seed=0)
    assert (found["accuracy"], found["accuracy_high"]) == (1, 1)
    assert found["accuracy_low"] == pytest.approx(0.025 ** (1 / 4))


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(7)
    held = 0
    for _ in range(200):
        right = rng.random(60) < 0.7
        pairs = [("a", "a" if ok else "b") if rng.random() < 0.5 else ("b", "b" if ok else "a") for ok in right]
        found = evaluate.figures(predictions(pairs), ["a", "b"], seed=0)
        held += found["accuracy_low"] <= 0.7 <= found["accuracy_high"]
    assert 0.88 <= held / 200 <= 0.99


def test_nobody_asked_has_no_figures():
    assert evaluate.figures(predictions([]), ["a", "b"], seed=0) == {"n_evaluated": 0}
