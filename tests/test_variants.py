from __future__ import annotations

import pytest
from conftest import save_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from lark_store.errors import InputError
from lark_store.ingest.sources import Sample
from lark_store.ingest.variants import Renderer, UnusableSampleError, make_variant, show

QA = Sample("q", prompt="Question: Is the kidney affected?", response="maybe")
TEXT = Sample("t", text="A song about the sea.")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def plain_tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    save_tokenizer(folder, chat_template=None)
    return AutoTokenizer.from_pretrained(folder)


def renderer(tokenizer, template="chatml", targets="auto", max_length=1024):
    return Renderer(make_variant("v", template, targets, max_length), tokenizer)


def text_of(tokenizer, tokens, *, targets_only=False):
    ids = [i for i, target in zip(tokens.input_ids, tokens.is_target, strict=True) if target or not targets_only]
    return tokenizer.decode(ids)


def test_chatml_targets_are_the_response_and_nothing_of_the_template(tokenizer):
    tokens = renderer(tokenizer).render(QA)
    assert text_of(tokenizer, tokens) == (
        "<|im_start|>user\nQuestion: Is the kidney affected?<|im_end|>\n<|im_start|>assistant\nmaybe<|im_end|>\n"
    )
    assert text_of(tokenizer, tokens, targets_only=True) == "maybe"
    assert tokens.rule == "response"


@pytest.mark.parametrize("response", ["n", "<", "|im_end|", "assistant", "i", "Question: Is the kidney affected?"])
def test_a_response_that_looks_like_the_template_is_told_from_it(tokenizer, response):
    tokens = renderer(tokenizer).render(Sample("q", prompt="user", response=response))
    assert text_of(tokenizer, tokens, targets_only=True) == response


def test_chatml_without_a_chat_template_of_the_tokenizer_is_the_same_chatml(tokenizer, plain_tokenizer):
    own, other = renderer(tokenizer), renderer(plain_tokenizer)
    assert own.own_chat
    assert not other.own_chat
    assert own.render(QA).input_ids == other.render(QA).input_ids
    assert own.sha256 != other.sha256


def test_raw_is_the_sample_alone(tokenizer):
    made = renderer(tokenizer, "raw")
    assert text_of(tokenizer, made.render(QA)) == "Question: Is the kidney affected?\nmaybe"
    assert text_of(tokenizer, made.render(QA), targets_only=True) == "maybe"
    assert text_of(tokenizer, made.render(TEXT)) == "A song about the sea."


def test_rules(tokenizer):
    def rendered(rule, sample):
        return renderer(tokenizer, "raw", rule).render(sample)

    assert rendered("auto", TEXT).rule == "predicted"
    assert rendered("text", QA).is_target == [False] + [True] * (len(rendered("text", QA).input_ids) - 1)
    assert rendered("predicted", QA).rule == "predicted"
    with pytest.raises(UnusableSampleError, match="no target token"):
        rendered("response", TEXT)
    with pytest.raises(UnusableSampleError, match="no target token"):
        rendered("text", Sample("x", text="A"))


def test_a_long_prompt_loses_its_start(tokenizer):
    prompt = "first " * 200 + "last question?"
    tokens = renderer(tokenizer, max_length=60).render(Sample("q", prompt=prompt, response="maybe"))
    text = text_of(tokenizer, tokens)
    assert len(tokens.input_ids) == 60
    assert tokens.n_cut > 0
    assert text.startswith("<|im_start|>user\n")
    assert text.endswith("last question?<|im_end|>\n<|im_start|>assistant\nmaybe<|im_end|>\n")
    assert text_of(tokenizer, tokens, targets_only=True) == "maybe"


def test_a_long_text_loses_its_end_and_the_template_stays(tokenizer):
    tokens = renderer(tokenizer, max_length=40).render(Sample("t", text="first " + "more " * 200))
    text = text_of(tokenizer, tokens)
    assert len(tokens.input_ids) == 40
    assert text.startswith("<|im_start|>user\nfirst")
    assert text.endswith("<|im_end|>\n")


def test_a_response_that_does_not_fit_is_a_reason_and_not_cut(tokenizer):
    with pytest.raises(UnusableSampleError, match="can't be cut"):
        renderer(tokenizer, max_length=30).render(Sample("q", prompt="p", response="long " * 50))


@settings(max_examples=60, deadline=None)
@given(
    prompt=st.text(min_size=1, max_size=80).filter(lambda s: s.strip()),
    response=st.text(min_size=1, max_size=20).filter(lambda s: s.strip()),
    length=st.integers(30, 120),
)
def test_targets_are_the_whole_response_whatever_is_in_the_texts(tokenizer, prompt, response, length):
    sample = Sample("q", prompt=prompt.strip(), response=response.strip())
    try:
        tokens = renderer(tokenizer, max_length=length).render(sample)
    except UnusableSampleError:
        return
    assert len(tokens.input_ids) <= length
    assert sample.response in text_of(tokenizer, tokens, targets_only=True)


def test_a_jinja_file_is_a_template(tokenizer, tmp_path):
    file = tmp_path / "alpaca.jinja"
    file.write_text("### Q\n{{ prompt }}\n### A\n{{ response }}")
    made = renderer(tokenizer, str(file))
    assert text_of(tokenizer, made.render(QA)) == "### Q\nQuestion: Is the kidney affected?\n### A\nmaybe"
    assert text_of(tokenizer, made.render(QA), targets_only=True) == "maybe"


def test_a_template_that_rewrites_the_text_is_a_reason(tokenizer, tmp_path):
    file = tmp_path / "shout.jinja"
    file.write_text("{{ prompt }} {{ response | upper }}")
    with pytest.raises(UnusableSampleError, match="rewrites"):
        renderer(tokenizer, str(file)).render(QA)


def test_a_template_can_reach_nothing_of_python(tokenizer, tmp_path):
    file = tmp_path / "evil.jinja"
    file.write_text("{{ prompt.__class__.__mro__ }}{{ response }}")
    with pytest.raises(UnusableSampleError, match="template fails"):
        renderer(tokenizer, str(file)).render(QA)


@pytest.mark.parametrize(
    ("template", "targets", "length", "message"),
    [
        ("raw", "all", 10, "no target rule"),
        ("raw", "auto", 1, "from 2 to 1 tokens"),
        ("nowhere.jinja", "auto", 10, "neither a built-in template nor a file"),
    ],
)
def test_bad_variants_are_refused(template, targets, length, message):
    with pytest.raises(InputError, match=message):
        make_variant("v", template, targets, length)


def test_a_broken_template_names_its_line(tmp_path):
    file = tmp_path / "broken.jinja"
    file.write_text("fine\n{% if %}")
    with pytest.raises(InputError, match="line 2 of the template"):
        make_variant("v", str(file), "auto", 10)


def test_a_preview_marks_the_targets(tokenizer):
    shown = show(renderer(tokenizer), "test", QA)
    assert "assistant\n⟦maybe⟧<|im_end|>" in shown.marked
    assert sum(shown.is_target) == shown.is_target.count(True) > 0
