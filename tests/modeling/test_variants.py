from __future__ import annotations

import pytest
from helpers.checkpoints import save_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from lark_store.errors import InputError
from lark_store.modeling.encoded import UnusableSampleError
from lark_store.modeling.rendering import Renderer, make_variant, show
from lark_store.modeling.sample import Sample

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


def test_chatml_targets_are_the_response_only(tokenizer):
    tokens = renderer(tokenizer).render(QA)
    assert text_of(tokenizer, tokens) == (
        "<|im_start|>user\nQuestion: Is the kidney affected?<|im_end|>\n<|im_start|>assistant\nmaybe<|im_end|>\n"
    )
    assert text_of(tokenizer, tokens, targets_only=True) == "maybe"
    assert tokens.rule == "response"


@pytest.mark.parametrize("response", ["n", "<", "|im_end|", "assistant", "i", "Question: Is the kidney affected?"])
def test_response_resembling_the_template_is_distinguished(tokenizer, response):
    tokens = renderer(tokenizer).render(Sample("q", prompt="user", response=response))
    assert text_of(tokenizer, tokens, targets_only=True) == response


def test_chatml_works_without_a_chat_template(tokenizer, plain_tokenizer):
    own, other = renderer(tokenizer), renderer(plain_tokenizer)
    assert own.own_chat
    assert not other.own_chat
    assert own.render(QA).input_ids == other.render(QA).input_ids
    assert own.sha256 != other.sha256


def test_raw_renders_the_sample_only(tokenizer):
    rendered = renderer(tokenizer, "raw")
    assert text_of(tokenizer, rendered.render(QA)) == "Question: Is the kidney affected?\nmaybe"
    assert text_of(tokenizer, rendered.render(QA), targets_only=True) == "maybe"
    assert text_of(tokenizer, rendered.render(TEXT)) == "A song about the sea."


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


def test_too_long_response_fails_and_is_not_cut(tokenizer):
    with pytest.raises(UnusableSampleError, match="can't be cut"):
        renderer(tokenizer, max_length=30).render(Sample("q", prompt="p", response="long " * 50))


@settings(max_examples=60, deadline=None)
@given(
    prompt=st.text(min_size=1, max_size=80).filter(lambda s: s.strip()),
    response=st.text(min_size=1, max_size=20).filter(lambda s: s.strip()),
    length=st.integers(30, 120),
)
def test_targets_cover_the_response_for_any_text(tokenizer, prompt, response, length):
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
    rendered = renderer(tokenizer, str(file))
    assert text_of(tokenizer, rendered.render(QA)) == "### Q\nQuestion: Is the kidney affected?\n### A\nmaybe"
    assert text_of(tokenizer, rendered.render(QA), targets_only=True) == "maybe"


ALPACA = "### Instruction: {{ prompt }} ### Response: {{ response }}"
EITHER = "{% if text %}{{ text }}{% else %}{{ prompt }} {{ response }}{% endif %}"
LONG_QA = Sample("long", prompt="Is the kidney affected? " * 9, response="no")
LOST = [
    (ALPACA, TEXT, "it prints `prompt`, which this sample lacks; write `{% if prompt %}{{ prompt }}{% endif %}`"),
    ("{{ 'Q: ' ~ prompt }}{{ text }}", TEXT, "it prints `prompt`, which this sample lacks"),
    ("{{ text }}", QA, "it prints `text`, which this sample lacks"),
    ("{{ [text] }}{{ prompt }}{{ response }}", QA, "it prints `text`, which this sample lacks"),
    ("{{ messages[0].get('name') }}{{ text }}", TEXT, "it prints a value that is None"),
    ("{{ response }}", QA, "omits or rewrites the sample's `prompt`; write `{% if prompt %}{{ prompt }}{% endif"),
    ("{{ prompt }}", QA, "omits or rewrites the sample's `response`"),
    ("### Text", TEXT, "omits or rewrites the sample's `text`"),
    ("{% for part in messages[0].content %}{{ part.text | default('') }}{% endfor %}", TEXT, "the sample's `text`"),
    ("{{ messages[1].content }}", QA, "omits or rewrites the sample's `prompt`"),
    ("{{ prompt[:50] }} {{ response }}", LONG_QA, "omits or rewrites the sample's `prompt`"),
    ("{{ prompt | truncate(50) }} {{ response }}", LONG_QA, "omits or rewrites the sample's `prompt`"),
    ("{% if prompt|length < 50 %}{{ prompt }}{% endif %} {{ response }}", LONG_QA, "rewrites the sample's `prompt`"),
    ("{% if 'liver' in prompt %}{{ prompt }}{% endif %} {{ response }}", QA, "rewrites the sample's `prompt`"),
    ("{% if 'kidney' not in prompt %}{{ prompt }}{% endif %} {{ response }}", QA, "the sample's `prompt`"),
    ("{{ prompt }} {{ response }} {{ prompt }}", QA, "prints `prompt` 2 times"),
    ("{{ prompt | tojson }} {{ response }}", QA, "omits or rewrites the sample's `prompt`"),
]


@pytest.mark.parametrize(("template", "sample", "reason"), LOST)
def test_rendering_without_a_part_fails_and_names_it(tokenizer, tmp_path, template, sample, reason):
    file = tmp_path / "lossy.jinja"
    file.write_text(template)
    with pytest.raises(UnusableSampleError) as caught:
        renderer(tokenizer, str(file)).render(sample)
    assert reason in str(caught.value)


KEPT = [
    (EITHER, QA, "Question: Is the kidney affected? maybe"),
    (EITHER, TEXT, "A song about the sea."),
    ("{{ text or prompt }}{{ response or '' }}", TEXT, "A song about the sea."),
    ("{{ text | default(prompt) }} {{ response }}", QA, "Question: Is the kidney affected? maybe"),
    ("{% if text is none %}{{ prompt }} {{ response }}{% else %}{{ text }}{% endif %}", QA, "Question: Is the "),
    ("{% if text == none %}{{ prompt }} {{ response }}{% else %}{{ text }}{% endif %}", QA, "Question: Is the "),
    ("{% if text is not none %}{{ text }}{% else %}{{ prompt }}{% endif %}", TEXT, "A song about the sea."),
    ("{% if text != none and text is defined %}{{ text }}{% endif %}", TEXT, "A song about the sea."),
    ("{% if prompt|length > 50 %}{{ prompt }}{% endif %} {{ response }}", LONG_QA, "Is the kidney affected? Is the"),
    ("{{ prompt[:500] }} {{ response }}", LONG_QA, "Is the kidney affected? Is the"),
]


@pytest.mark.parametrize(("template", "sample", "start"), KEPT)
def test_template_can_test_for_parts(tokenizer, tmp_path, template, sample, start):
    file = tmp_path / "either.jinja"
    file.write_text(template)
    tokens = renderer(tokenizer, str(file)).render(sample)
    assert text_of(tokenizer, tokens).startswith(start)
    assert "None" not in text_of(tokenizer, tokens)


def test_chat_template_dropping_strings_fails_clearly(tmp_path):
    of_parts = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n"
        "{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}"
        "<|im_end|>\n{% endfor %}"
    )
    save_tokenizer(tmp_path, chat_template=of_parts)
    rendered = renderer(AutoTokenizer.from_pretrained(tmp_path))
    assert rendered.own_chat
    reason = "the tokenizer's chat template omits or rewrites the sample's `{}`; use a variant with the template"
    for sample, part in ((QA, "prompt"), (TEXT, "text")):
        with pytest.raises(UnusableSampleError) as caught:
            rendered.render(sample)
        assert reason.format(part) in str(caught.value)


@pytest.mark.parametrize("trim", ["trim", "replace('x', 'x')"])
def test_white_space_is_kept_unless_the_template_trims_it(tokenizer, tmp_path, trim):
    file = tmp_path / "trim.jinja"
    file.write_text(f"Q {{{{ prompt | {trim} }}}} A[{{{{ response | {trim} }}}}]")
    tokens = renderer(tokenizer, str(file)).render(Sample("q", prompt="\n  Is it?\n", response="  yes\n"))
    exact = "Q \n  Is it?\n A[  yes\n]"
    assert text_of(tokenizer, tokens) == ("Q Is it? A[yes]" if trim == "trim" else exact)
    assert text_of(tokenizer, tokens, targets_only=True).strip() == "yes"


def test_completely_truncated_part_fails(tokenizer):
    whole = renderer(tokenizer).render(QA)
    without = len(whole.input_ids) - sum(whole.is_content) + whole.n_targets  # the template and the response
    with pytest.raises(
        UnusableSampleError, match=f"truncation to {without} tokens leaves nothing of its `prompt`; use"
    ):
        renderer(tokenizer, max_length=without).render(QA)
    tokens = renderer(tokenizer, max_length=without + 1).render(QA)
    assert tokens.n_cut == len(whole.input_ids) - without - 1
    assert "?<|im_end|>" in text_of(tokenizer, tokens)


def test_a_part_without_a_token_fails(tmp_path):
    from tokenizers import normalizers

    save_tokenizer(tmp_path)
    deaf = AutoTokenizer.from_pretrained(tmp_path)
    deaf.backend_tokenizer.normalizer = normalizers.Replace("kidney", "")
    with pytest.raises(UnusableSampleError, match="the tokenizer has no token for its `response`"):
        renderer(deaf, "raw", "text").render(Sample("q", prompt="Which organ?", response="kidney"))


def test_template_rewriting_the_text_fails_the_sample(tokenizer, tmp_path):
    file = tmp_path / "shout.jinja"
    file.write_text("{{ prompt }} {{ response | upper }}")
    with pytest.raises(UnusableSampleError, match="rewrites"):
        renderer(tokenizer, str(file)).render(QA)


def test_template_has_no_access_to_python(tokenizer, tmp_path):
    file = tmp_path / "evil.jinja"
    file.write_text("{{ prompt.__class__.__mro__ }}{{ response }}")
    with pytest.raises(UnusableSampleError, match="template fails"):
        renderer(tokenizer, str(file)).render(QA)


@pytest.mark.parametrize(
    ("template", "targets", "length", "message"),
    [
        ("raw", "all", 10, "unknown target rule `all`"),
        ("raw", "auto", 1, "from 2 to .*, not 1"),
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
    rendered = show(renderer(tokenizer), "test", QA)
    assert "assistant\n⟦maybe⟧<|im_end|>" in rendered.marked
    assert sum(rendered.is_target) == rendered.is_target.count(True) > 0
