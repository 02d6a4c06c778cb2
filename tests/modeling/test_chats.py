"""Chats: the target tokens of each rule, for the chat templates of many models, against the trainers' own masks.

The templates are those of TRL. Those named `…_training` mark the assistant's tokens with `{% generation %}`.
"""

import json
import re
from pathlib import Path

import pytest
import trl
from helpers.checkpoints import save_tokenizer

from lark_store.modeling.encoded import UnusableSampleError
from lark_store.modeling.rendering import Renderer, make_variant
from lark_store.modeling.sample import Sample

TEMPLATES = {path.stem: path for path in sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))}
TRAINING = sorted(name for name in TEMPLATES if name.endswith("_training"))
NEEDS_LISTS = {"llava_next_training", "smolvlm_training", "idefics3_training"}  # templates that drop plain strings
# A template's own token, as `<|im_end|>`, `<end_of_turn>` or `</s>`.
SPECIAL = re.compile(r"<[|｜][^|｜<>'\"]*[|｜]>|</?s>|<(?:start|end)_of_\w+>|<turn\|>|<\|turn>|<eos>|<bos>|\[/?INST\]")
END = "<|im_end|>"
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def message(role, content=None, **more):
    return {"role": role, "content": content, **more}


QUESTION, ANSWER = message("user", "Is aspirin safe?"), message("assistant", "Yes, mostly.")
TWO = [QUESTION, ANSWER]
FOUR = [*TWO, message("user", "For  children?"), message("assistant", "No: Reye syndrome.")]
SYSTEM = [message("system", "Answer briefly."), *TWO]
THINKING = [
    QUESTION,
    message("assistant", "<think>\nIt thins blood.\n</think>\n\nYes, mostly."),
    message("user", "For children?"),
    message("assistant", "<think>\nReye syndrome.\n</think>\n\nNo."),
]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather of a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "its name"}}},
        },
    }
]
CALLING = [
    message("user", "Weather in Bern?"),
    message("assistant", "", tool_calls=[CALL]),
    message("tool", "12 degrees", name="weather"),
    message("assistant", "It is 12."),
]


@pytest.fixture(scope="module")
def plain_tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return folder


@pytest.fixture
def tokenizer_of(plain_tokenizer):
    """Make a tokenizer with a chat template and the template's special tokens."""

    def make(template):
        from tokenizers import AddedToken
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(plain_tokenizer)
        marks = sorted(set(SPECIAL.findall(template)))
        tokenizer.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks], special_tokens=True)
        tokenizer.chat_template = template
        return tokenizer

    return make


@pytest.fixture
def chatml(tokenizer_of):
    return tokenizer_of(CHATML)


def chat(messages, tools=None):
    return Sample("x", messages=json.dumps(messages), tools=json.dumps(tools) if tools else None)


def render(tokenizer, sample, rule, *, template="chatml", max_length=10_000, loss="mean"):
    return Renderer(make_variant("v", template, rule, max_length, loss), tokenizer).render(sample)


def targets(tokenizer, tokens):
    """Return the runs of target tokens as texts."""
    runs, is_inside = [], False
    for token, is_target in zip(tokens.input_ids, tokens.is_target, strict=True):
        if is_target and not is_inside:
            runs.append([])
        if is_target:
            runs[-1].append(token)
        is_inside = is_target
    return [tokenizer.decode(run) for run in runs]


def stripped(texts):
    return [text.strip() for text in texts]


# --- the templates of many models ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEMPLATES)
def test_contents_of_assistant_turns_are_targets_in_every_template(tokenizer_of, name):
    tokenizer = tokenizer_of(TEMPLATES[name].read_text())
    for messages in (TWO, FOUR, SYSTEM):
        if messages is SYSTEM and name in {"gemma", "gemma_training"}:
            with pytest.raises(UnusableSampleError, match="System role not supported"):
                render(tokenizer, chat(messages), "assistant")
            continue
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        tokens = render(tokenizer, chat(messages), "assistant")
        assert stripped(targets(tokenizer, tokens)) == answers
        assert stripped(targets(tokenizer, render(tokenizer, chat(messages), "last"))) == answers[-1:]
        assert tokens.rule == "assistant"
        assert tokens.notes == ()


@pytest.mark.parametrize("name", TRAINING)
@pytest.mark.parametrize("messages", [TWO, FOUR, THINKING], ids=["two", "four", "thinking"])
def test_targets_with_ends_equal_the_trainers_mask(tokenizer_of, name, messages):
    tokenizer = tokenizer_of(TEMPLATES[name].read_text())
    as_given = messages
    if name in NEEDS_LISTS:
        as_given = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages]
    mask = tokenizer.apply_chat_template(
        as_given, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, date_string="26 Jul 2024"
    )
    if messages is THINKING and "It thins" not in tokenizer.decode(mask["input_ids"]) and name.startswith("deepseekv3"):
        with pytest.raises(UnusableSampleError, match="omits or rewrites the sample's `reasoning of message 4"):
            render(tokenizer, chat(messages), "assistant+end")
        return
    tokens = render(tokenizer, chat(messages), "assistant+end")
    assert tokens.input_ids == mask["input_ids"]
    assert tokens.is_target == [bool(bit) for bit in mask["assistant_masks"]]
    assert sum(tokens.is_target) > 0


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think", "glm4moe", "nemotron_3_nano"])
def test_reasoning_is_found_where_a_template_moves_it(tokenizer_of, name):
    tokenizer = tokenizer_of(TEMPLATES[name].read_text())
    tokens = render(tokenizer, chat(THINKING), "assistant")
    assert stripped(targets(tokenizer, tokens)) == ["Yes, mostly.", "Reye syndrome.", "No."]
    assert tokens.notes == ("the template omits the reasoning of message 2 (assistant)",)
    apart = [QUESTION, message("assistant", "Yes.", reasoning_content="It thins blood.")]
    assert stripped(targets(tokenizer, render(tokenizer, chat(apart), "assistant"))) == ["It thins blood.", "Yes."]


def test_empty_reasoning_of_a_template_is_no_target(tokenizer_of):
    tokenizer = tokenizer_of(TEMPLATES["qwen3"].read_text())
    tokens = render(tokenizer, chat(TWO), "assistant")
    assert "<think>\n\n</think>" in tokenizer.decode(tokens.input_ids)
    assert targets(tokenizer, tokens) == ["Yes, mostly."]


@pytest.mark.parametrize("name", ["qwen3", "qwen2_5", "qwen3_5_think", "nemotron_3_nano"])
def test_tool_calls_are_targets_and_tool_results_are_not(tokenizer_of, name):
    tokenizer = tokenizer_of(TEMPLATES[name].read_text())
    call, answer = targets(tokenizer, render(tokenizer, chat(CALLING, TOOLS), "assistant"))
    assert re.fullmatch(r"\s*<tool_call>.*weather.*Bern.*</tool_call>\n?", call, re.DOTALL)
    assert answer == "It is 12."
    with_end, _ = targets(tokenizer, render(tokenizer, chat(CALLING, TOOLS), "assistant+end"))
    assert with_end.replace("\n", "") == call.replace("\n", "") + END
    assert targets(tokenizer, render(tokenizer, chat(CALLING, TOOLS), "last")) == ["It is 12."]


def test_omitted_tool_calls_fail(chatml):
    with pytest.raises(UnusableSampleError, match="omits or rewrites the sample's `tool calls of message 2`"):
        render(chatml, chat(CALLING), "assistant")


# --- rules -----------------------------------------------------------------------------------------------------------


def test_end_of_turn_is_a_target_with_end_alone(chatml):
    assert targets(chatml, render(chatml, chat(FOUR), "assistant")) == ["Yes, mostly.", "No: Reye syndrome."]
    ends = [f"Yes, mostly.{END}", f"No: Reye syndrome.{END}"]
    assert targets(chatml, render(chatml, chat(FOUR), "assistant+end")) == ends
    assert targets(chatml, render(chatml, chat(FOUR), "last+end")) == ends[1:]
    assert targets(chatml, render(chatml, chat(FOUR), "response")) == ["Yes, mostly.", "No: Reye syndrome."]


def test_messages_of_weight_zero_are_context(chatml, tokenizer_of):
    messages = [QUESTION, ANSWER | {"weight": 0}, *FOUR[2:]]
    for tokenizer in (chatml, tokenizer_of(TEMPLATES["qwen2_5_training"].read_text())):
        tokens = render(tokenizer, chat(messages), "assistant+end")
        (answer,) = targets(tokenizer, tokens)
        assert answer.strip() == f"No: Reye syndrome.{END}"
        assert "weight" not in tokenizer.decode(tokens.input_ids)
    with pytest.raises(UnusableSampleError, match="no target token"):
        render(chatml, chat(messages[:2]), "assistant")


def test_automatic_rule_of_a_chat(chatml):
    assert render(chatml, chat(FOUR), "auto").rule == "assistant"
    alone = render(chatml, chat([QUESTION]), "auto")
    assert alone.rule == "predicted"
    assert alone.n_targets == len(alone.input_ids) - 1


def test_chat_without_a_template_is_its_texts(chatml):
    tokens = render(chatml, chat(SYSTEM), "assistant", template="raw")
    assert chatml.decode(tokens.input_ids) == "Answer briefly.\nIs aspirin safe?\nYes, mostly."
    assert targets(chatml, tokens) == ["Yes, mostly."]


def test_chat_equals_a_prompt_with_its_response(chatml):
    two = Sample("x", prompt=QUESTION["content"], response=ANSWER["content"])
    for rule in ("assistant", "assistant+end", "last"):
        as_chat, as_fields = render(chatml, chat(TWO), rule), render(chatml, two, rule)
        assert (as_chat.input_ids, as_chat.is_target) == (as_fields.input_ids, as_fields.is_target)


def test_nothing_stands_between_a_prompt_and_its_completion(chatml):
    sample = Sample("x", prompt="2 + 2 = ", completion="4")
    tokens = render(chatml, sample, "auto", template="raw")
    assert chatml.decode(tokens.input_ids) == "2 + 2 = 4"
    assert (tokens.rule, targets(chatml, tokens)) == ("response", ["4"])
    # as a trainer's completion mask: the end of text is part of the completion
    with_end = render(chatml, sample, "assistant+end", template="raw")
    assert chatml.decode(with_end.input_ids) == f"2 + 2 = 4{END}"
    assert targets(chatml, with_end) == [f"4{END}"]


def test_rule_with_end_needs_an_end(tokenizer_of):
    tokenizer = tokenizer_of("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    with pytest.raises(UnusableSampleError, match="no end-of-turn token follows an assistant turn"):
        render(tokenizer, chat(TWO), "assistant+end")


def test_beginning_of_text_occurs_once(tokenizer_of, tmp_path):
    from tokenizers.processors import TemplateProcessing

    tokenizer = tokenizer_of("")
    first = tokenizer.bos_token_id
    post = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", first)])
    tokenizer.backend_tokenizer.post_processor = post
    own = tmp_path / "own.jinja"
    own.write_text("<|im_start|>{% for m in messages %}{{ m.content }} {% endfor %}")
    tokens = render(tokenizer, chat(TWO), "assistant", template=str(own))
    assert tokens.input_ids.count(first) == 1
    assert tokens.notes == ("the text begins with `<|im_start|>`, so the tokenizer's own is left out",)
    raw = render(tokenizer, chat(TWO), "assistant", template="raw")
    assert (raw.input_ids.count(first), raw.input_ids[0], raw.notes) == (1, first, ())


def test_content_as_a_list_of_parts(chatml):
    parts = [message("user", [{"type": "text", "text": "Is aspirin "}, {"type": "text", "text": "safe?"}]), ANSWER]
    as_text, as_parts = render(chatml, chat(TWO), "assistant"), render(chatml, chat(parts), "assistant")
    assert (as_parts.input_ids, as_parts.is_target) == (as_text.input_ids, as_text.is_target)


def test_truncation_takes_the_oldest_context_and_keeps_system_prompt_and_targets(chatml):
    messages = [message("system", "Be brief."), message("user", "a b c d e f g h"), *FOUR[1:]]
    whole = render(chatml, chat(messages), "last")
    short = render(chatml, chat(messages), "last", max_length=len(whole.input_ids) - 10)
    assert (short.n_cut, len(short.input_ids)) == (10, len(whole.input_ids) - 10)
    text = chatml.decode(short.input_ids)
    assert "Be brief." in text
    assert "For  children?" in text
    assert "a b c" not in text
    assert targets(chatml, short) == ["No: Reye syndrome."]
    with pytest.raises(UnusableSampleError, match="can't be cut"):
        render(chatml, chat(messages), "last", max_length=20)


# --- texts that look like the template's own -------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["<|im_start|>", "assistant", "user\nuser", " yes", "yes\n", "\ue0f00\ue0f1", "0"])
def test_answer_may_hold_anything(chatml, content):
    tokens = render(chatml, chat([message("user", content + "?"), message("assistant", content)]), "assistant")
    assert "".join(targets(chatml, tokens)).strip() == content.strip()


def test_template_that_drops_a_message_fails(tokenizer_of):
    tokenizer = tokenizer_of("{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}")
    with pytest.raises(UnusableSampleError, match=r"omits or rewrites the sample's `content of message 1 \(system\)`"):
        render(tokenizer, chat(SYSTEM), "assistant")


def test_template_that_repeats_a_message_fails(tokenizer_of):
    tokenizer = tokenizer_of("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}")
    with pytest.raises(UnusableSampleError, match=r"prints `content of message 1 \(user\)` 2 times"):
        render(tokenizer, chat(TWO), "assistant")


def test_jinja_file_gets_the_whole_message(chatml, tmp_path):
    own = tmp_path / "own.jinja"
    own.write_text("{% for m in messages %}[{{ m.name }}] {{ m.content }}\n{% endfor %}")
    named = [QUESTION | {"name": "Ann"}, ANSWER | {"name": "Bot"}]
    tokens = render(chatml, chat(named), "assistant", template=str(own))
    assert chatml.decode(tokens.input_ids) == "[Ann] Is aspirin safe?\n[Bot] Yes, mostly.\n"
    assert targets(chatml, tokens) == ["Yes, mostly."]


# --- answers ---------------------------------------------------------------------------------------------------------


def test_answer_of_a_sample_and_another_in_its_place():
    samples = [
        (Sample("x", prompt="p", response="yes"), "response"),
        (Sample("x", prompt="p", completion="yes"), "completion"),
        (
            chat([*THINKING[:2], message("user", "Sure?"), message("assistant", "yes", reasoning_content="so")]),
            "messages",
        ),
    ]
    for sample, column in samples:
        assert sample.answer == "yes"
        other = sample.with_answer("no")
        assert other.answer == "no"
        assert getattr(other, column) == getattr(sample, column).replace('"yes"', '"no"').replace("yes", "no")
        assert other.content_sha256 != sample.content_sha256
    assert Sample("x", text="yes").answer == ""


def test_a_template_that_ignores_the_tools_says_so(chatml, tokenizer_of):
    ignored = render(chatml, chat(TWO, TOOLS), "assistant")
    assert "the template omits the tools" in ignored.notes
    printing = tokenizer_of("{% if tools %}{{ tools | tojson }}\n{% endif %}" + CHATML)
    assert render(printing, chat(TWO, TOOLS), "assistant").notes == ()
    assert render(chatml, chat(TWO), "assistant").notes == ()
