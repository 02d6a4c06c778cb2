"""Evaluation: likelihoods of labels, accuracy and macro-F1 with intervals."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import torch
from helpers.checkpoints import save_checkpoint
from helpers.texts import qa_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from lark_store.modeling.forms.rows import make_sample
from lark_store.modeling.rendering import Renderer, make_variant
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


def test_likelihoods_equal_full_texts_one_by_one(base, recipe):
    samples = [make_sample({**row, "answer": LABELS[i % 3]}, {}) for i, row in enumerate(qa_rows(7))]
    actual = evaluate.predict(recipe, "base", base, samples, lambda _: None)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    renderer = Renderer(make_variant("chatml", "chatml", "auto", 1024), AutoTokenizer.from_pretrained(base))
    for row, sample in zip(actual.iter_rows(named=True), samples, strict=True):
        expected = []
        for label in LABELS:
            tokens = renderer.render(make_sample({"prompt": sample.prompt, "response": label}, {}))
            with torch.no_grad():
                ln_p = model(torch.tensor([tokens.input_ids])).logits[0].log_softmax(-1)
            targets = [t for t, is_target in enumerate(tokens.is_target) if is_target]
            expected.append(float(sum(ln_p[t - 1, tokens.input_ids[t]] for t in targets)))
        assert [row[f"ln p({label})"] for label in LABELS] == pytest.approx(expected, abs=1e-3)
        assert row["prediction"] == LABELS[int(np.argmax(expected))]
        assert (row["query_id"], row["label"], row["checkpoint"]) == (sample.sample_id, sample.response, "base")


def test_labels_keep_the_white_space_of_the_answer(base, recipe):
    samples = [make_sample({**row, "answer": " yes\n"}, {}) for row in qa_rows(3)]
    actual = evaluate.predict(recipe, "base", base, samples, lambda _: None)
    assert actual["label"].to_list() == ["yes"] * 3
    spaced = [make_sample({**row, "answer": f" {label}\n"}, {}) for row in qa_rows(3) for label in LABELS]
    renderer = Renderer(make_variant("chatml", "chatml", "auto", 1024), AutoTokenizer.from_pretrained(base))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    expected = evaluate.log_likelihoods(model, [renderer.render(item) for item in spaced], 200, "x", lambda _: None)
    likelihoods = actual.select([f"ln p({label})" for label in LABELS]).to_numpy()
    np.testing.assert_allclose(likelihoods, expected.reshape(3, 3), atol=1e-3)


def test_shared_prefix_is_computed_once(base, recipe):
    rows = [{**row, "answer": "Y"} for row in qa_rows(5)]
    one_token_each = recipe.model_copy(update={"evaluate": recipes.Evaluate(labels=["Y", "N", "M"])})
    seen = []
    evaluate.predict(one_token_each, "base", base, [make_sample(row, {}) for row in rows], seen.append)
    assert seen[-1].done == seen[-1].total == 5


def test_question_with_an_unknown_label_is_skipped(base, recipe):
    rows = [{**row, "answer": answer} for row, answer in zip(qa_rows(3), ("yes", "perhaps", "no"), strict=True)]
    result = evaluate.predict(recipe, "base", base, [make_sample(row, {}) for row in rows], lambda _: None)
    assert result["label"].to_list() == ["yes", "no"]


def test_generated_answer_counts_as_the_label_it_begins_with(base, recipe):
    rows = [{**row, "answer": "yes"} for row in qa_rows(3)]
    samples = [make_sample(row, {}) for row in rows]
    part = recipes.Evaluate(labels=["yes", "no"], by="generation", max_answer=4)
    actual = evaluate.predict(recipe.model_copy(update={"evaluate": part}), "base", base, samples, lambda _: None)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    for row, sample in zip(actual.iter_rows(named=True), samples, strict=True):
        text = f"<|im_start|>user\n{sample.prompt}<|im_end|>\n<|im_start|>assistant\n"
        prompt = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        answer = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=4, pad_token_id=1
        )[0, prompt.shape[1] :]
        assert row["answer"] == tokenizer.decode(answer, skip_special_tokens=True)
        assert row["prediction"] == evaluate.label_of(row["answer"], ["yes", "no"])
    figures = evaluate.figures(actual, ["yes", "no"], seed=0)
    assert figures["accuracy"] == (actual["prediction"] == "yes").mean()


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        (" Yes, it is", "yes"),
        ("NO", "no"),
        ("maybe not.", "maybe not"),
        ("nothing", "(no label)"),
        ("", "(no label)"),
        ("I think yes", "(no label)"),
    ],
)
def test_label_of_an_answer(answer, label):
    assert evaluate.label_of(answer, LABELS) == label


def test_an_answer_without_a_label_is_wrong():
    pairs = [("a", "a"), ("a", "(no label)"), ("b", "b"), ("b", "(no label)")]
    figures = evaluate.figures(predictions(pairs), ["a", "b"], seed=0)
    assert figures["accuracy"] == 0.5
    assert figures["macro_f1"] == pytest.approx(2 / 3)  # of `a` and `b` alone: 2·1 / (2·1 + 1) each


def predictions(pairs):
    return pl.DataFrame(pairs, {"label": pl.String, "prediction": pl.String}, orient="row")


def test_accuracy_and_macro_f1_equal_counts():
    pairs = [("a", "a")] * 6 + [("a", "b")] * 2 + [("b", "b")] * 3 + [("b", "c")] + [("c", "a")] * 2 + [("c", "c")]
    figures = evaluate.figures(predictions(pairs), ["a", "b", "c", "never"], seed=0)
    # precision and recall: a 6/8, 6/8; b 3/5, 3/4; c 1/2, 1/3
    f1 = [0.75, 2 * 0.6 * 0.75 / 1.35, 2 * 0.5 * (1 / 3) / (0.5 + 1 / 3)]
    assert figures["accuracy"] == pytest.approx(10 / 15)
    assert figures["macro_f1"] == pytest.approx(np.mean(f1))
    assert figures["n_evaluated"] == 15


def test_few_correct_answers_have_a_wide_interval():
    figures = evaluate.figures(predictions([("a", "a"), ("b", "b")] * 2), ["a", "b"], seed=0)
    assert (figures["accuracy"], figures["accuracy_high"]) == (1, 1)
    assert figures["accuracy_low"] == pytest.approx(0.025 ** (1 / 4))


def test_intervals_have_nominal_coverage():
    rng = np.random.default_rng(7)
    held = 0
    for _ in range(200):
        right = rng.random(60) < 0.7
        pairs = [("a", "a" if ok else "b") if rng.random() < 0.5 else ("b", "b" if ok else "a") for ok in right]
        figures = evaluate.figures(predictions(pairs), ["a", "b"], seed=0)
        held += figures["accuracy_low"] <= 0.7 <= figures["accuracy_high"]
    assert 0.88 <= held / 200 <= 0.99


def test_no_predictions_have_no_figures():
    assert evaluate.figures(predictions([]), ["a", "b"], seed=0) == {"n_evaluated": 0}
