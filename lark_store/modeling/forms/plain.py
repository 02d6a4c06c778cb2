"""Prompts with responses, questions with answers, and plain texts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lark_store.modeling.forms.base import Form
from lark_store.modeling.sample import Sample

if TYPE_CHECKING:
    from lark_store.readers.fields import Fields


def _responded(prompt: str, response: str) -> list[Sample]:
    return [Sample("", prompt=prompt, response=response)]


def _read_response(fields: Fields) -> list[Sample]:
    prompt, response = fields.text("prompt"), fields.text("response")
    return _responded(prompt, response) if prompt.strip() and response.strip() else []


def _read_question(fields: Fields) -> list[Sample]:
    question, context, answer = (fields.text(name) for name in ("question", "context", "answer"))
    if not question.strip() or not answer.strip():
        return []
    return _responded((f"Context: {context}\n\n" if context.strip() else "") + f"Question: {question}", answer)


def _read_text(fields: Fields) -> list[Sample]:
    text = fields.text("text")
    return [Sample("", text=text)] if text.strip() else []


RESPONSE = Form(
    name="response",
    needed=("prompt", "response"),
    looks_like="`prompt`, `response`",
    meaning="a prompt and its response, which is the target; the format variant joins them",
    read=_read_response,
)
QUESTION = Form(
    name="question",
    needed=("question", "answer"),
    optional=("context",),
    looks_like="`question`, `answer`, maybe `context`",
    meaning="the prompt `Context: …` and `Question: …`, and the answer as its response",
    read=_read_question,
)
TEXT = Form(
    name="text",
    needed=("text",),
    looks_like="`text`",
    meaning="a text, as for pretraining",
    read=_read_text,
)
