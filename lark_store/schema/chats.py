"""The content of stored samples: their columns, hash and text; messages of a chat are JSON, as given.

A message has a `role` and a `content`, text or a list of text parts; it may have `reasoning_content`, `tool_calls`,
`name` and `weight`.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from lark_store.core.hashing import content_hash

if TYPE_CHECKING:
    from collections.abc import Callable

    import polars as pl

    Message = dict[str, Any]

CONTENT = ("prompt", "response", "text", "completion", "messages", "tools")  # columns of `samples`


def sample_hash(prompt: str | None, response: str | None, text: str | None, *more: str | None) -> str:
    """Return the hash of a sample's `CONTENT`; without a completion, messages and tools as before schema 0009."""
    return content_hash(prompt, response, text, *(more if any(more) else ()))


def content_text(content: Any) -> str:
    """Return the text of a message's content: itself, or its text parts joined.

    >>> content_text([{"type": "text", "text": "Hello "}, {"type": "text", "text": "there"}])
    'Hello there'
    """
    if isinstance(content, list):
        return "".join(part if isinstance(part, str) else part["text"] for part in content)
    return content or ""


def message_text(message: Message) -> str:
    """Return all text of a message: reasoning, content and tool calls, a line each."""
    calls = message.get("tool_calls")
    return "\n".join([*turn_texts(message), *([json.dumps(calls, ensure_ascii=False)] if calls else [])])


def turn_texts(message: Message) -> list[str]:
    """Return what a message says: its reasoning and its content, without tool calls."""
    return [part for part in (message.get("reasoning_content"), content_text(message.get("content"))) if part]


def chat_text(messages: str) -> str:
    """Return the text of a chat for search: its messages' texts, joined by newlines."""
    return "\n".join(map(message_text, json.loads(messages)))


def dialogue(messages: str) -> str:
    r"""Return a chat to read: each message with its role.

    >>> dialogue('[{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "Yes."}]')
    'user: Is it?\nassistant: Yes.'
    """
    return "\n".join(f"{message['role']}: {message_text(message)}" for message in json.loads(messages))


def whole_text(
    prompt: str | None,
    response: str | None,
    text: str | None,
    completion: str | None = None,
    messages: str | None = None,
    tools: str | None = None,  # noqa: ARG001  # with it, the parameters are `CONTENT`
) -> str:
    """Return the text of a sample for search."""
    if messages is not None:
        return chat_text(messages)
    if text is not None:
        return text
    return f"{prompt}{completion}" if completion is not None else f"{prompt}\n{response}"


def search_text() -> pl.Expr:
    """Return the expression of `whole_text` over the columns `CONTENT`."""
    return _text_expression(chat_text)


def shown_text() -> pl.Expr:
    """Return the expression of a sample's text to read: a chat as dialogue, others as `whole_text`."""
    return _text_expression(dialogue)


def _text_expression(of_chat: Callable[[str], str]) -> pl.Expr:
    import polars as pl

    return pl.coalesce(
        "text",
        pl.concat_str(["prompt", "completion"]),
        pl.concat_str(["prompt", "response"], separator="\n"),
        pl.col("messages").map_elements(of_chat, return_dtype=pl.String),
    )
