"""Prompts for a predicted answer, the choice among labels, and the length of answers, with a tiny model."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lark_store.errors import InputError
from lark_store.modeling import answers
from lark_store.modeling.answers import answer_question
from lark_store.modeling.encoded import UnusableSampleError
from lark_store.modeling.predicted_answers import AnswerPredictor, AnswerPrompt, AnswerSettings, label_tokens
from lark_store.modeling.rendering import Renderer, make_variant
from lark_store.modeling.sample import Sample
from lark_store.modeling.tokens import Tokens
from lark_store.specs import VariantSpec
from lark_store.store.trace import _retokenized

DOCUMENT = Sample("d", text="The sea is wide.", meta={"ask": "Is it?", "number": 3, "blank": " "})
ASKED = AnswerSettings(
    prompt="Read: {document}\nAnswer: {question}", question="True?", question_column=None, labels=[], max_answer=4
)
SPEC = VariantSpec(targets="predicted-answer", question="True?")


@pytest.fixture(scope="module")
def model(checkpoints):
    return AutoModelForCausalLM.from_pretrained(checkpoints["base"]).eval()


@pytest.fixture(scope="module")
def tokenizer(checkpoints):
    return AutoTokenizer.from_pretrained(checkpoints["base"])


def renderer(tokenizer, length=200, settings=ASKED, loss="mean"):
    return Renderer(make_variant("v", "chatml", "predicted-answer", length, loss, settings), tokenizer)


def coded(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def chat(*turns):
    return Sample("c", messages=json.dumps([{"role": role, "content": content} for role, content in turns]))


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        ({"prompt": "{document} {document}"}, "needs `{document}` once"),
        ({"prompt": "{question}"}, "needs `{document}` once"),
        ({"prompt": "{document} {question} {question}"}, "`{question}` at most once"),
        ({"labels": ["yes"]}, "labels must be two or more"),
        ({"labels": ["yes", "no", "yes"]}, "labels must be two or more"),
        ({"labels": ["yes", "\n"]}, "labels must be two or more"),
        ({"max_answer": 0}, "must be from 1 to 1022, not 0"),
        ({"max_answer": 1023}, "must be from 1 to 1022, not 1023"),
    ],
)
def test_wrong_settings_are_refused(change, fact):
    with pytest.raises(InputError) as refused:
        AnswerSettings.of_spec(replace(SPEC, **change))
    assert fact in refused.value.fact


@pytest.mark.parametrize(
    "change",
    [{"max_answer": 1}, {"max_answer": 1022}, {"prompt": "{document}"}, {"labels": ("yes", "no")}, {"labels": ()}],
)
def test_settings_at_their_limits(change):
    settings = AnswerSettings.of_spec(replace(SPEC, **change))
    assert settings.question == "True?"
    for name, value in change.items():
        assert getattr(settings, name) == (list(value) if name == "labels" else value)
    stored = SimpleNamespace(answers=json.dumps(settings.row))
    assert AnswerSettings.of_variant(stored) == settings
    assert AnswerSettings.of_variant(SimpleNamespace(answers=settings.row)) == settings


def test_a_variant_has_one_question():
    settings = AnswerSettings.of_spec(replace(SPEC, question=None, question_column="ask"))
    assert (settings.question, settings.question_column) == (None, "ask")
    with pytest.raises(InputError, match="a variant has one question, not two"):
        AnswerSettings.of_spec(replace(SPEC, question_column="ask"))


def test_other_rules_have_no_settings():
    assert AnswerSettings.of_spec(VariantSpec()) is None
    assert AnswerSettings.of_spec(VariantSpec(labels=[])) is None


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_prompt_of_a_document(tokenizer):
    prompt = renderer(tokenizer).prompt(DOCUMENT)
    text = "<|im_start|>user\nRead: The sea is wide.\nAnswer: True?<|im_end|>\n<|im_start|>assistant\n"
    assert prompt.input_ids == coded(tokenizer, text)
    assert (prompt.options, prompt.max_tokens, prompt.n_cut, prompt.notes) == ([], 4, 0, ())
    document = [i for i, is_content in zip(prompt.input_ids, prompt.is_content, strict=True) if is_content]
    assert tokenizer.decode(document).strip() == "The sea is wide."


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"prompt": "Q {question} {document}"}, "Q True? The sea is wide."),
        ({"prompt": "Q {document}"}, "Q The sea is wide."),
        ({"prompt": "Q {document}", "question": None}, "Q The sea is wide."),
        ({"question": None, "question_column": "ask"}, "Read: The sea is wide.\nAnswer: Is it?"),
    ],
)
def test_question_stands_in_its_place(tokenizer, change, text):
    asked = renderer(tokenizer, settings=replace(ASKED, **change)).text(DOCUMENT)
    assert asked == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("column", ["number", "blank", "missing"])
def test_a_text_without_a_question_fails(column):
    with pytest.raises(UnusableSampleError, match=f"it has no question in the column `{column}`"):
        replace(ASKED, question=None, question_column=column).ask(DOCUMENT)
    with pytest.raises(UnusableSampleError, match="no question on a text"):
        replace(ASKED, question=None).ask(DOCUMENT)


def test_a_chat_is_asked_up_to_its_last_assistant_turn(tokenizer):
    turns = [("user", "One?"), ("assistant", "yes"), ("user", "Two?"), ("assistant", "no"), ("user", "Three?")]
    start = "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n<|im_start|>user\nTwo?<|im_end|>\n"
    assert renderer(tokenizer).text(chat(*turns)) == f"{start}<|im_start|>assistant\n"
    assert renderer(tokenizer).text(chat(*turns[:3])) == "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n"
    alone = renderer(tokenizer).text(chat(("user", "One?")))  # a chat without an answer is asked as it is
    assert alone == "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(UnusableSampleError, match="no message before its answer"):
        renderer(tokenizer).text(chat(("assistant", "yes"), ("user", "One?")))
    pair = renderer(tokenizer).text(Sample("p", prompt="One?", completion=" never"))
    assert pair == "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n"


def test_room_is_left_for_the_longest_answer(tokenizer):
    labels = ["yes", "often seen in most patients"]
    longest = len(coded(tokenizer, labels[1]))
    assert longest > 4
    whole = renderer(tokenizer).prompt(DOCUMENT)
    assert whole.stand_in() == (whole.input_ids * 4)[:4]
    n = len(whole.input_ids)
    for settings, room in ((ASKED, 4), (replace(ASKED, labels=labels), longest)):
        fits = renderer(tokenizer, n + room, settings).prompt(DOCUMENT)
        assert (fits.n_cut, len(fits.input_ids), len(fits.stand_in())) == (0, n, room)
        cut = renderer(tokenizer, n + room - 1, settings).prompt(DOCUMENT)
        assert (cut.n_cut, len(cut.input_ids), len(cut.is_content)) == (1, n - 1, n - 1)
    assert fits.options == [coded(tokenizer, label) for label in labels]


def test_stand_in_of_a_short_prompt_has_the_maximum_length():
    assert AnswerPrompt([1, 2], [], 5, [True, True]).stand_in() == [1, 2, 1, 2, 1]


def test_a_label_sharing_a_token_with_the_text_before_fails(tokenizer):
    ids = coded(tokenizer, "the")
    assert label_tokens(tokenizer, "the", ids, " sea", special=False) == coded(tokenizer, "the sea")[len(ids) :]
    starts = {cut: coded(tokenizer, "kidney"[:cut]) for cut in range(1, 6)}
    whole = coded(tokenizer, "kidney")
    cut, before = next((cut, before) for cut, before in starts.items() if before != whole[: len(before)])
    with pytest.raises(UnusableSampleError, match="shares a token"):
        label_tokens(tokenizer, "kidney"[:cut], before, "kidney"[cut:], special=False)
    with pytest.raises(UnusableSampleError, match="shares a token"):
        label_tokens(tokenizer, "the", ids, "", special=False)


# --- answers ----------------------------------------------------------------------------------------------------------


def test_losses_of_labels_are_sums_over_their_tokens(model, tokenizer):
    labels = ["yes", "often seen in most patients", "no"]
    prompt = renderer(tokenizer, settings=replace(ASKED, labels=labels)).prompt(DOCUMENT)
    losses = AnswerPredictor(model, tokenizer).label_losses(prompt).tolist()
    for option, loss in zip(prompt.options, losses, strict=True):
        with torch.no_grad():
            log_p = model(torch.tensor([prompt.input_ids + option])).logits[0].log_softmax(-1)
        start = len(prompt.input_ids) - 1
        assert loss == pytest.approx(-sum(float(log_p[start + n, i]) for n, i in enumerate(option)), rel=1e-4)
    chosen = AnswerPredictor(model, tokenizer)(prompt)
    assert chosen == prompt.options[losses.index(min(losses))]


@pytest.mark.parametrize("loss", ["mean", "sum"])
def test_targets_are_the_answer_alone(tokenizer, loss):
    rendering = renderer(tokenizer, settings=ASKED, loss=loss)
    prompt = rendering.prompt(DOCUMENT)
    answer = coded(tokenizer, "yes, often")
    tokens = rendering.render(DOCUMENT, lambda asked: answer if asked == prompt else None)
    n = len(prompt.input_ids)
    assert tokens.input_ids == prompt.input_ids + answer
    assert tokens.is_target == [False] * n + [True] * len(answer)
    assert tokens.is_content == prompt.is_content + [True] * len(answer)
    assert (tokens.targets, tokens.n_targets) == (answer, len(answer))
    assert (tokens.rule, tokens.answer, tokens.is_summed) == ("predicted-answer", "yes, often", loss == "sum")


@pytest.mark.parametrize("answer", [[], [220]])
def test_an_empty_answer_fails(tokenizer, answer):
    assert not tokenizer.decode(coded(tokenizer, " ")).strip()
    given = answer and coded(tokenizer, " ")
    with pytest.raises(UnusableSampleError, match="predicts an empty answer"):
        renderer(tokenizer).render(DOCUMENT, lambda _: given)
    with pytest.raises(UnusableSampleError, match="model, which is not loaded here"):
        renderer(tokenizer).render(DOCUMENT)


def test_question_and_answer_fit_the_variants_length(model, tokenizer):
    variant = make_variant("v", "chatml", "auto", 200)
    n = len(coded(tokenizer, "<|im_start|>user\nIs it so?<|im_end|>\n<|im_start|>assistant\n"))
    answer = answer_question(model, Renderer(variant, tokenizer, n + 6), "Is it so?", 6)
    assert 0 < len(answer.ids) <= 6
    assert answer.is_complete == (len(answer.ids) < 6)
    with torch.no_grad():
        ids = coded(tokenizer, "<|im_start|>user\nIs it so?<|im_end|>\n<|im_start|>assistant\n")
        log_p = model(torch.tensor([ids + answer.ids])).logits[0].log_softmax(-1)
    each = [float(log_p[n - 1 + i, token]) for i, token in enumerate(answer.ids)]
    assert answer.log_probability == pytest.approx(sum(each) / len(each), rel=1e-4)
    with pytest.raises(
        InputError, match=f"its {n} tokens and 7 of an answer exceed the maximum length of `v`, {n + 6}"
    ):
        answer_question(model, Renderer(variant, tokenizer, n + 6), "Is it so?", 7)
    long = "Is it so? " * 9
    whole = len(coded(tokenizer, f"<|im_start|>user\n{long}<|im_end|>\n<|im_start|>assistant\n"))
    with pytest.raises(InputError, match=f"its {whole} tokens and 2 of an answer exceed"):  # cut ones count too
        answer_question(model, Renderer(variant, tokenizer, n + 6), long, 2)


def test_a_partial_character_at_the_end_is_not_part_of_the_text(model, tokenizer, monkeypatch):
    half = coded(tokenizer, "yes €")[:-1]
    assert tokenizer.decode(half).endswith("\ufffd")
    monkeypatch.setattr(answers, "greedy_answer", lambda *_: half)
    answer = answer_question(model, Renderer(make_variant("v", "chatml", "auto", 200), tokenizer), "Is it?", 9)
    assert (answer.text.strip(), answer.ids, answer.is_complete) == ("yes", half, True)


@pytest.mark.parametrize(
    ("targets", "is_same"),
    [([5, 6], True), ([5, 6, 1], True), ([5], False), ([5, 7], False), ([4, 5, 6], False), ([6, 5], False)],
)
def test_an_answer_with_other_tokens_as_text_is_noted(targets, is_same):
    tokens = Tokens([9, *targets, 8], [False, *[True] * len(targets), False], "response")
    notes = _retokenized(SimpleNamespace(tokens=tokens), SimpleNamespace(ids=[5, 6]))
    assert (notes == ()) == is_same
