"""Chats of ShareGPT: a list of turns with `from` and `value`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lark_store.modeling.forms.base import Form
from lark_store.modeling.forms.chats import chat, is_empty, is_list, messages_of

if TYPE_CHECKING:
    from lark_store.modeling.sample import Sample
    from lark_store.readers.fields import Fields


def _read(fields: Fields) -> list[Sample]:
    messages = messages_of(fields, "conversations")
    if is_empty(messages):
        return []
    system = fields.text("system")
    if system.strip():
        messages = [{"role": "system", "content": system}, *messages]
    return [chat(messages, fields)]


SHAREGPT = Form(
    name="sharegpt",
    needed=("conversations",),
    optional=("system", "tools", "functions"),
    looks_like="`conversations: [{from, value}]`, maybe `system` and `tools` (ShareGPT)",
    meaning="a chat; `human` becomes `user`, `gpt` becomes `assistant`, and `system` its first message",
    read=_read,
    fits=lambda fields: is_list(fields, "conversations"),
)
