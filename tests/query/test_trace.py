"""`trace`: the model's own answer, and the samples that drive it."""

from __future__ import annotations

import json
import math

import pytest
from helpers.program import lark
from helpers.stores import copy_store
from polars.testing import assert_frame_equal
from transformers import AutoModelForCausalLM, AutoTokenizer

from lark_store import NewText, Store, Trace
from lark_store.errors import InputError, NameUnknownError, NothingToScoreError

QUESTION = "Is the kidney affected?"
SMALL = {"sketcher": "small"}


@pytest.fixture(scope="module")
def opened(scored_path):
    with Store.open(scored_path) as store:
        yield store


@pytest.fixture(scope="module")
def traced(opened):
    return opened.trace(QUESTION, checkpoint="base", k=26, max_answer=12, **SMALL)


def generated(checkpoints, name, max_tokens=12):
    """Return the answer of `generate` to the rendered prompt, and its tokens' log-probabilities."""
    model = AutoModelForCausalLM.from_pretrained(checkpoints[name]).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoints[name])
    chat = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False) + "<|im_start|>assistant\n"
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    options = {"do_sample": False, "max_new_tokens": max_tokens, "pad_token_id": 1, "eos_token_id": 1}
    out = model.generate(
        inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        output_scores=True,
        return_dict_in_generate=True,
        **options,
    )
    ids = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    ids = ids[:-1] if ids[-1] == 1 else ids
    chances = [float(s[0].log_softmax(-1)[i]) for s, i in zip(out.scores, ids, strict=False)]
    return tokenizer.decode(ids), ids, chances


@pytest.mark.parametrize("name", ["base", "epoch-1"])
def test_answer_is_that_of_generate(opened, checkpoints, name):
    text, ids, chances = generated(checkpoints, name)
    result = opened.trace(QUESTION, checkpoint=name, max_answer=12, **SMALL)
    assert isinstance(result, Trace)
    assert (result.question, result.answer, result.n_tokens) == (QUESTION, text.rstrip("\ufffd"), len(ids))
    assert result.log_probability == pytest.approx(sum(chances) / len(chances), rel=1e-4)
    assert result.is_complete == (len(ids) < 12)
    assert result.hits.query_checkpoint == name


def test_hits_are_those_of_the_answer_as_a_new_query(opened, traced):
    new = NewText(prompt=QUESTION, response=traced.answer)
    hits = opened.top(new=new, checkpoint="base", k=26, **SMALL)
    assert_frame_equal(traced.frame, hits.frame)
    assert traced.hits.query_variant == "chatml"
    assert [hit.sample_id for hit in traced] == hits.frame["sample_id"].to_list()
    chosen = opened.trace(QUESTION, checkpoint="base", max_answer=12, k=3, sources=["songs"], variants=["raw"], **SMALL)
    assert set(chosen.frame.select("source", "variant").rows()) == {("songs", "raw")}
    assert len(chosen) == 3


def test_other_checkpoint_answers_with_query_checkpoint(opened, checkpoints):
    result = opened.trace(QUESTION, checkpoint="base", query_checkpoint="epoch-1", max_answer=12, **SMALL)
    assert result.answer == generated(checkpoints, "epoch-1")[0].rstrip("\ufffd")
    assert result.answer != generated(checkpoints, "base")[0]
    new = NewText(prompt=QUESTION, response=result.answer)
    hits = opened.top(new=new, checkpoint="base", query_checkpoint="epoch-1", **SMALL)
    assert_frame_equal(result.frame, hits.frame)
    assert (result.hits.method, result.hits.query_checkpoint, result.hits.checkpoint) == ("dot", "epoch-1", "base")
    assert any(note.startswith("distance of `epoch-1`") for note in result.hits.notes)


def test_default_is_the_newest_checkpoint_with_sketches(scored_path, tmp_path, checkpoints):
    with Store.open(copy_store(scored_path, tmp_path / "copy")) as store:
        assert store.trace(QUESTION, max_answer=12, **SMALL).hits.checkpoint == "epoch-1"
        store.checkpoint_add("epoch-9", checkpoints["base"], epoch=9)  # without sketches
        assert store.trace(QUESTION, max_answer=12).hits.checkpoint == "epoch-1"
        store.variant_add("tiny", max_length=5)
        assert store.ingest(["epoch-9"], ["finetune"], ["tiny"], sketcher="small").n_failed == 6  # still without any
        assert store.trace(QUESTION, max_answer=12, **SMALL).hits.checkpoint == "epoch-1"
        store.ingest(["epoch-9"], ["songs"], ["raw"], sketcher="small")
        assert store.trace(QUESTION, max_answer=12, **SMALL).hits.checkpoint == "epoch-9"
        with pytest.raises(NothingToScoreError, match="no checkpoint has sketches by `adam`"):
            store.trace(QUESTION, sketcher="adam")


def test_answer_ends_where_the_model_ends_it(scored_path, checkpoints, monkeypatch):
    _, ids, _ = generated(checkpoints, "base")
    monkeypatch.setattr("lark_store.modeling.greedy.end_ids", lambda *_: {ids[3]})
    with Store.open(scored_path) as store:
        result = store.trace(QUESTION, checkpoint="base", **SMALL)
    first = ids.index(ids[3])
    assert (result.n_tokens, result.is_complete) == (first, True)
    assert "cut" not in result.said


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"checkpoint": "epoch-2"}, NameUnknownError, "no checkpoint `epoch-2`"),
        ({"max_answer": 0}, InputError, "`max_answer` must be at least 1, not 0"),
        ({"max_answer": 5000}, InputError, "5000 of an answer exceed the maximum length of `chatml`, 256"),
        ({"method": "cosin"}, InputError, "there is no method `cosin`"),
        ({"query_variant": "chat"}, NameUnknownError, "no variant `chat`"),
        ({"k": 0}, InputError, "`k` must be between 1"),
        ({"sources": ["nothing"]}, NameUnknownError, "no source `nothing`"),
    ],
)
def test_errors_name_the_argument(opened, options, error, message):
    with pytest.raises(error, match=message):
        opened.trace(QUESTION, **{"checkpoint": "base", **SMALL} | options)


def test_empty_answer_is_an_error(opened, monkeypatch):
    monkeypatch.setattr("lark_store.modeling.answers.greedy_answer", lambda *_: [])
    with pytest.raises(InputError, match="the model's answer is empty"):
        opened.trace("Is nothing said?", checkpoint="base", **SMALL)


def test_command_prints_the_answer_and_the_hits(scored_path, traced):
    line = 'trace "Is the kidney affected?" -c base -k 26 --max-answer 12 --sketcher small'
    table = lark(line, store=scored_path)
    assert table.code == 0, table.err
    figures = f"mean log-probability {traced.log_probability:.3f} over {traced.n_tokens} tokens"
    assert table.out.startswith(f"answer: {traced.answer}\nby `base`, {figures}")
    assert traced.frame["sample_id"][0] in table.out
    assert "over 26 sketches at `base`, query as `chatml`" in table.err
    rows = lark(f"{line} -f json", store=scored_path)
    assert [row["sample_id"] for row in json.loads(rows.out)] == traced.frame["sample_id"].to_list()
    assert rows.err.startswith(f"answer: {traced.answer}\n")
    assert math.isfinite(traced.log_probability)


def test_repr_has_the_answer(traced):
    assert repr(traced).startswith(f"answer: {traced.answer}\nby `base`, mean log-probability ")
    assert traced.log_probability < 0
    assert traced.about.facts == {"answer": traced.answer, **traced.hits.about.facts}
