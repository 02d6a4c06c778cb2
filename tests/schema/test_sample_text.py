"""The text of a sample for search and for reading, in Python and as an expression, for each form of content."""

from __future__ import annotations

import json

import polars as pl
import pytest

from lark_store.modeling.sample import Sample
from lark_store.schema.chats import (
    CONTENT,
    chat_text,
    content_text,
    dialogue,
    message_text,
    sample_hash,
    search_text,
    shown_text,
    whole_text,
)

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}
CHAT = [
    {"role": "user", "content": [{"type": "text", "text": "Is "}, "it?"]},
    {"role": "assistant", "content": None, "reasoning_content": "Hm.", "tool_calls": [CALL]},
    {"role": "tool", "content": ""},
    {"role": "assistant", "content": "Yes."},
]
CALLED = '[{"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}]'
READ = f"user: Is it?\nassistant: Hm.\n{CALLED}\ntool: \nassistant: Yes."
FORMS = [
    ({"prompt": "a", "response": "b"}, "a\nb", None),
    ({"prompt": "a ", "completion": " b"}, "a  b", None),
    ({"text": " a\n"}, " a\n", None),
    ({"text": ""}, "", None),
    ({"messages": json.dumps(CHAT)}, f"Is it?\nHm.\n{CALLED}\n\nYes.", READ),
    ({"messages": json.dumps(CHAT[:1]), "tools": "[1]"}, "Is it?", "user: Is it?"),
]


@pytest.mark.parametrize(("content", "text", "read"), FORMS)
def test_text_of_each_form(content, text, read):
    values = [content.get(name) for name in CONTENT]
    assert whole_text(*values) == text
    frame = pl.DataFrame([values], schema=dict.fromkeys(CONTENT, pl.String), orient="row")
    assert frame.select(text=search_text())["text"].to_list() == [text]
    assert frame.select(text=shown_text())["text"].to_list() == [text if read is None else read]


def test_text_of_messages():
    assert [content_text(content) for content in (None, "", "a", [], ["a", {"text": "b"}])] == ["", "", "a", "", "ab"]
    assert message_text({"content": "b", "reasoning_content": "a", "tool_calls": []}) == "a\nb"
    assert message_text({"role": "user"}) == ""
    assert chat_text('[{"content": "a"}, {"content": "b"}]') == "a\nb"
    assert dialogue('[{"role": "user", "content": "a"}, {"role": "assistant"}]') == "user: a\nassistant: "


def test_hash_has_later_columns_only_if_one_is_set():
    short = sample_hash("a", "b", None)
    assert sample_hash("a", "b", None, None, None, None) == short
    assert len({short, *(sample_hash("a", "b", None, *more) for more in (("c",), (None, "c"), (None, None, "c")))}) == 4


def test_another_answer_replaces_the_samples_own():
    assert Sample("a", prompt="p", response="r").with_answer("n") == Sample("a", prompt="p", response="n")
    assert Sample("a", prompt="p", completion="c").with_answer("n") == Sample("a", prompt="p", completion="n")
    turns = [("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4"), ("user", "5")]
    messages = [{"role": role, "content": content} for role, content in turns]
    chat = Sample("a", messages=json.dumps(messages))
    assert chat.answer == "4"
    assert Sample("a", messages=json.dumps(messages[:1])).answer == Sample("a", text="t").answer == ""
    expected = [*messages[:3], messages[3] | {"content": "ä"}, messages[4]]
    assert chat.with_answer("ä").messages == json.dumps(expected, ensure_ascii=False)
    row = {"sample_id": "a", "text": "t", "meta": '{"n": 1}'}
    assert Sample.of_row(row) == Sample("a", text="t", meta={"n": 1})
