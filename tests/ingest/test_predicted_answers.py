"""The target rule `predicted-answer`: formatted pretraining text, with the checkpoint's own answer as its label."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from helpers.killed_ingest import killed_ingest
from helpers.program import lark
from helpers.texts import write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

from lark_store.errors import InputError, NameTakenError

QUESTION = "Is this statement true?"
PROMPT = "Context: {}\n\nQuestion: {}"
UNIT = {"checkpoint": "base", "source": "songs", "variant": "formatted"}
GREEDY = {"targets": "predicted-answer", "question": QUESTION, "max_answer": 5}
LABELS = {"targets": "predicted-answer", "question": QUESTION, "labels": ["yes", "no", "maybe"]}


@pytest.fixture(scope="module")
def model(checkpoints):
    return AutoModelForCausalLM.from_pretrained(checkpoints["base"]).eval()


@pytest.fixture(scope="module")
def tokenizer(checkpoints):
    return AutoTokenizer.from_pretrained(checkpoints["base"])


def ask(tokenizer, document: str, question: str = QUESTION) -> torch.Tensor:
    """Return the tokens of the prompt for an answer, (1, T)."""
    return encode(tokenizer, PROMPT.format(document, question))


def encode(tokenizer, prompt: str) -> torch.Tensor:
    text = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    return tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]


def log_probability(model, prompt_1T: torch.Tensor, answer: list[int]) -> float:
    with torch.no_grad():
        log_p = model(torch.cat([prompt_1T, torch.tensor([answer])], dim=1)).logits[0].log_softmax(-1)
    return sum(float(log_p[prompt_1T.shape[1] + i - 1, token]) for i, token in enumerate(answer))


def predictions(store):
    return store.sql("from predictions order by sample_id")


def test_greedy_answers_are_those_of_generate(store, model, tokenizer):
    store.variant_add("formatted", **GREEDY)
    run = store.ingest(["base"], ["songs"], ["formatted"], sketcher="small")
    assert run.failures.is_empty()
    frame = predictions(store)
    assert len(frame) == 5
    texts = dict(store.sql("select sample_id, text from samples where source = 'songs'").iter_rows())
    for row in frame.iter_rows(named=True):
        prompt = ask(tokenizer, texts[row["sample_id"]])
        with torch.no_grad():
            whole = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=5, pad_token_id=1
            )
        answer = whole[0, prompt.shape[1] :].tolist()
        assert row["answer"] == tokenizer.decode(answer, clean_up_tokenization_spaces=False)
        assert row["n_tokens"] == len(answer)
        assert row["log_probability"] == pytest.approx(log_probability(model, prompt, answer), abs=1e-4)


def test_the_most_likely_label_is_chosen(store, model, tokenizer):
    store.variant_add("formatted", **LABELS)
    store.ingest(["base"], ["songs"], ["formatted"], sketcher="small")
    texts = dict(store.sql("select sample_id, text from samples where source = 'songs'").iter_rows())
    for row in predictions(store).iter_rows(named=True):
        prompt = ask(tokenizer, texts[row["sample_id"]])
        likely = {
            label: log_probability(model, prompt, tokenizer(label, add_special_tokens=False)["input_ids"])
            for label in LABELS["labels"]
        }
        assert row["answer"] == max(likely, key=likely.get)
        assert row["log_probability"] == pytest.approx(max(likely.values()), abs=1e-4)


def test_the_gradient_is_that_of_the_equal_fine_tuning_sample(store, tmp_path):
    store.variant_add("formatted", **LABELS)
    store.ingest(["base"], ["songs"], ["formatted"], sketcher="small")
    texts = dict(store.sql("select sample_id, text from samples where source = 'songs'").iter_rows())
    rows = [
        {"id": sample_id, "context": texts[sample_id], "question": QUESTION, "answer": answer}
        for sample_id, answer in predictions(store).select("sample_id", "answer").iter_rows()
    ]
    store.source_add("answered", write_jsonl(tmp_path / "answered.jsonl", rows), stage="finetune")
    store.ingest(["base"], ["answered"], ["chatml"], sketcher="small")
    facts = "select sample_id, n_loss_tokens, loss, grad_norm from sketches where source = '{}' order by sample_id"
    one, other = (store.sql(facts.format(name)) for name in ("songs", "answered"))
    assert one["n_loss_tokens"].equals(other["n_loss_tokens"])
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(one[name], other[name], rtol=1e-4)


def test_a_prompt_and_a_chat_are_asked_as_they_are(store, model, tokenizer, tmp_path):
    store.variant_add("own-answer", targets="predicted-answer", max_answer=4)
    chat = [{"role": "user", "content": "Is it so?"}, {"role": "assistant", "content": "yes"}]
    rows = [{"id": "p", "prompt": "Is it so?", "response": "never"}]
    store.source_add("prompts", write_jsonl(tmp_path / "p.jsonl", rows), stage="query")
    store.source_add("chats", write_jsonl(tmp_path / "c.jsonl", [{"id": "c", "messages": chat}]), stage="query")
    store.ingest(["base"], ["prompts", "chats"], ["own-answer"], sketcher="small")
    prompt = encode(tokenizer, "Is it so?")
    with torch.no_grad():
        answer = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=4, pad_token_id=1
        )[0, prompt.shape[1] :]
    assert predictions(store)["answer"].to_list() == [tokenizer.decode(answer)] * 2


def test_each_text_has_its_own_question_from_a_column(store, tmp_path, model, tokenizer):
    rows = [{"id": "a", "text": "The sea is wide.", "ask": "Is it wide?"}, {"id": "b", "text": "The sea is deep."}]
    store.source_add("asked", write_jsonl(tmp_path / "asked.jsonl", rows), stage="pretrain")
    store.variant_add("formatted", targets="predicted-answer", question_column="ask", max_answer=3)
    run = store.ingest(["base"], ["asked"], ["formatted"], sketcher="small")
    assert run.failures["reason"].to_list() == ["it has no question in the column `ask`"]
    prompt = ask(tokenizer, "The sea is wide.", "Is it wide?")
    with torch.no_grad():
        answer = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=3, pad_token_id=1
        )[0, prompt.shape[1] :]
    assert predictions(store)["answer"].to_list() == [tokenizer.decode(answer)]


def test_a_long_document_loses_its_end_and_keeps_the_question(store, tmp_path, tokenizer):
    text = "word " * 400
    store.source_add("long", write_jsonl(tmp_path / "long.jsonl", [{"id": "a", "text": text}]), stage="pretrain")
    store.variant_add("formatted", **LABELS, max_length=100)
    store.ingest(["base"], ["long"], ["formatted"], sketcher="small")
    shown = store.variant_show("formatted", sample="a", checkpoint="base")
    whole = "".join(shown.pieces)
    assert "Context: word word" in whole
    assert QUESTION in whole
    assert len(shown.pieces) <= 100
    assert shown.n_cut == len(ask(tokenizer, text)[0]) - len(shown.pieces) + sum(shown.is_target)


def test_a_killed_ingest_resumes_with_the_same_answers(store, tmp_path):
    store.variant_add("formatted", **GREEDY)
    path = tmp_path / "lark.store"
    is_done, written = killed_ingest(path, tuple(UNIT.values()), "small", 4, tmp_path / "log")
    assert not is_done
    assert 0 < len(written) < 5
    store.ingest(["base"], ["songs"], ["formatted"], sketcher="small")
    resumed = predictions(store)
    assert len(resumed) == 5
    store.sketcher_add("other", k=512)
    store.ingest(["base"], ["songs"], ["formatted"], sketcher="other")
    both = predictions(store).select("sketcher", "sample_id", "answer").partition_by("sketcher", include_key=False)
    assert both[0].equals(both[1])


def test_another_sketcher_shares_the_stored_answer(store, monkeypatch):
    store.variant_add("formatted", **GREEDY)
    store.ingest(["base"], ["songs"], ["formatted"], sketcher="small")
    store.sketcher_add("other", k=512)
    monkeypatch.setattr("lark_store.ingest.pipeline.AnswerPredictor.__call__", None)  # any prediction fails
    store.ingest(["base"], ["songs"], ["formatted"], sketcher="other")
    assert len(predictions(store)) == 10


def test_verify_predicts_again(store):
    store.variant_add("formatted", **GREEDY)
    store.ingest(["base"], ["songs"], ["formatted"], sketcher="small")
    report = store.verify(sketches=5, sketcher="small")
    assert report["same_answer"].all()
    assert report["ok"].all()


def test_verify_finds_a_changed_answer(store, monkeypatch):
    store.variant_add("formatted", **GREEDY)
    store.ingest(["base"], ["songs"], ["formatted"], sketcher="small")
    monkeypatch.setattr("lark_store.ingest.verify.AnswerPredictor.__call__", lambda *_: [1, 2])
    report = store.verify(sketches=5, sketcher="small")
    assert not report["same_answer"].any()
    assert not report["ok"].any()
    assert (report["cosine"] > 0.9999).all()  # of the stored answer


def test_plan_counts_the_answer(store):
    store.variant_add("formatted", **GREEDY)
    (tokens,) = store.plan(["base"], ["songs"], ["formatted"], sketcher="small").units["tokens_per_sample"]
    store.ingest(["base"], ["songs"], ["formatted"], sketcher="small")
    (mean,) = store.sql("select avg(n_tokens) from sketches").row(0)
    assert tokens == mean  # the tiny model's answers have the maximum length


def test_a_correction_is_fitted_to_predicted_answers(store):
    store.variant_add("formatted", **LABELS)
    info = store.correction_fit("base", kind="adam", sources=["songs"], variant="formatted")
    assert info.n_samples == 5


def test_the_command_line_adds_and_shows_the_variant(store, tmp_path):
    path = tmp_path / "lark.store"
    line = "variant add formatted --targets predicted-answer --label yes --label no --question"
    assert "targets predicted-answer" in lark(line, QUESTION, store=path).err
    (sample,) = store.sql("select min(sample_id) from samples where source = 'songs'").row(0)
    shown = lark("variant show formatted --checkpoint base --sample", sample, store=path).out
    assert f"Question: {QUESTION}" in shown
    assert "⟦yes⟧" in shown or "⟦no⟧" in shown


@pytest.mark.parametrize(
    ("settings", "fact"),
    [
        ({"question": QUESTION}, "`question` belongs to the target rule `predicted-answer`, not `auto`"),
        ({"labels": ["yes", "no"], "targets": "text"}, "`labels` belongs to the target rule"),
        (GREEDY | {"question_column": "ask"}, "a variant has one question, not two"),
        (GREEDY | {"prompt": "{question}"}, "needs `{document}` once"),
        (GREEDY | {"prompt": "{document} {question} {question}"}, "`{question}` at most once"),
        (LABELS | {"labels": ["yes"]}, "labels must be two or more different texts"),
        (LABELS | {"labels": ["yes", "yes"]}, "labels must be two or more different texts"),
        (LABELS | {"labels": ["yes", " "]}, "labels must be two or more different texts"),
        (GREEDY | {"max_answer": 0}, "`max_answer` must be from 1 to 1022, not 0"),
        (GREEDY | {"max_answer": 99, "max_length": 100}, "from 1 to 98"),
    ],
)
def test_wrong_settings_are_refused(store, settings, fact):
    with pytest.raises(InputError) as caught:
        store.variant_add("formatted", **settings)
    assert fact in caught.value.fact


def test_settings_are_part_of_a_variants_identity(store):
    one = store.variant_add("one", **LABELS)
    assert store.variant_add("one", **LABELS) == one
    with pytest.raises(NameTakenError, match=r"already exists with question `Is this .*`, not `Why\?`"):
        store.variant_add("one", **LABELS | {"question": "Why?"})
    other = store.variant_add("other", **LABELS | {"question": "Is it false?"})
    assert one.sha256 != other.sha256
    (answers,) = store.sql("select answers from variants where name = 'one'").row(0)
    assert json.loads(answers)["labels"] == ["yes", "no", "maybe"]


def test_a_text_without_a_question_fails_with_the_reason(store):
    store.variant_add("formatted", targets="predicted-answer")
    run = store.ingest(["base"], ["songs"], ["formatted"], sketcher="small")
    assert set(run.failures["reason"]) == {"the variant has no question on a text; add one with `--question`"}


def test_sample_show_has_the_prompt_of_the_answer(store):
    store.variant_add("formatted", **GREEDY)
    (sample,) = store.sql("select min(sample_id) from samples where source = 'songs'").row(0)
    (text,) = store.sql("select text from samples where sample_id = ?", [sample]).row(0)
    rendered = dict(store.sample_show(f"songs/{sample}").rendered.select("variant", "text").iter_rows())
    asked = PROMPT.format(text, QUESTION)
    assert rendered["formatted"] == f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"
