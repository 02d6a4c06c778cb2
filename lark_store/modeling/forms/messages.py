"""Chats of OpenAI and TRL: a list of messages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lark_store.modeling.forms.base import Form
from lark_store.modeling.forms.chats import chat, is_empty, is_list, messages_of

if TYPE_CHECKING:
    from lark_store.modeling.sample import Sample
    from lark_store.readers.fields import Fields


def _read(fields: Fields) -> list[Sample]:
    messages = messages_of(fields, "messages")
    return [] if is_empty(messages) else [chat(messages, fields)]


MESSAGES = Form(
    name="messages",
    needed=("messages",),
    optional=("tools", "functions"),
    looks_like="`messages: [{role, content}]`, maybe `tools` (OpenAI, TRL)",
    meaning="a chat; its assistant turns are the targets, except those with `weight: 0`",
    read=_read,
    fits=lambda fields: is_list(fields, "messages"),
)
