"""Preference pairs: a chosen and a rejected answer to one prompt, each a sample."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lark_store.modeling.forms.base import Form
from lark_store.modeling.forms.chats import are_messages, as_context, chat, is_empty, is_messages, messages_of
from lark_store.modeling.forms.completion import completed
from lark_store.modeling.sample import Sample
from lark_store.readers.fields import is_blank

if TYPE_CHECKING:
    from lark_store.modeling.forms.chats import Message
    from lark_store.readers import Row
    from lark_store.readers.fields import Fields

SIDES = ("chosen", "rejected")


def _read(fields: Fields) -> list[Sample]:
    if any(is_blank(fields.value(side)) for side in SIDES):
        return []
    return _chats(fields) if are_messages(fields, SIDES) else _texts(fields)


def _texts(fields: Fields) -> list[Sample]:
    """Return two prompts with completions. Without a prompt it is the beginning that both sides share, as in TRL."""
    prompt, sides = fields.text("prompt"), [fields.text(side) for side in SIDES]
    if not prompt.strip():
        n = _n_shared(*sides)
        prompt, sides = sides[0][:n], [side[n:] for side in sides]
    if not all(side.strip() for side in sides):
        return []
    if not prompt.strip():
        return [Sample(f"#{name}", text=prompt + side) for name, side in zip(SIDES, sides, strict=True)]
    return [
        sample for name, side in zip(SIDES, sides, strict=True) for sample in completed(prompt, side, ending=f"#{name}")
    ]


def _n_shared(chosen: str, rejected: str) -> int:
    """Return the length of the prompt that two texts share: up to the white space before the first difference."""
    shortest = min(len(chosen), len(rejected))
    n = next((i for i in range(shortest) if chosen[i] != rejected[i]), shortest)
    if n == shortest:  # one text continues the other: its last word is the answer
        n = len(chosen[:n].rstrip())
        while n and not chosen[n - 1].isspace():
            n -= 1
    return n - 1 if n and chosen[n - 1] == " " else n


def _chats(fields: Fields) -> list[Sample]:
    """Return two chats; what both begin with is context."""
    sides = [messages_of(fields, side) for side in SIDES]
    prompt = _prompt(fields)
    meta: Row = {}
    if not all(_is_whole(side, prompt) for side in sides):
        sides = [[*prompt, *side] for side in sides]
    elif prompt and prompt[-1] not in sides[0]:
        meta = {"prompt": fields.value("prompt")}
    chosen, rejected = sides
    last = min(len(chosen), len(rejected)) - 1
    n = next((i for i in range(last) if chosen[i] != rejected[i]), last)
    if any(is_empty(side[n:]) for side in sides):
        return []
    return [
        replace(chat([*as_context(side[:n]), *side[n:]], fields, ending=f"#{name}"), meta=meta)
        for name, side in zip(SIDES, sides, strict=True)
    ]


def _prompt(fields: Fields) -> list[Message]:
    if is_blank(fields.value("prompt")):
        return []
    if is_messages(fields, "prompt"):
        return messages_of(fields, "prompt")
    return [{"role": "user", "content": fields.text("prompt")}]


def _is_whole(side: list[Message], prompt: list[Message]) -> bool:
    """Tell whether a side is the whole conversation and not only its end."""
    return not prompt or any(message in side for message in prompt) or side[0]["role"] != "assistant"


PREFERENCE = Form(
    name="preference",
    needed=SIDES,
    optional=("prompt", "tools", "functions"),
    looks_like="`chosen`, `rejected`, maybe `prompt` (DPO): texts or `[{role, content}]`; without a prompt, or with "
    "messages, both may hold the whole conversation",
    meaning="two samples, `ID#chosen` and `ID#rejected`, with the metadata `pair` and `side`",
    read=_read,
)
