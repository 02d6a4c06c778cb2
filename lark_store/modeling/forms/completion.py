"""Prompts with completions of TRL: two texts, or two lists of messages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lark_store.modeling.forms.base import Form
from lark_store.modeling.forms.chats import are_messages, as_context, chat, is_empty, messages_of
from lark_store.modeling.sample import Sample
from lark_store.readers.fields import is_blank

if TYPE_CHECKING:
    from lark_store.readers.fields import Fields


def completed(prompt: str, completion: str, ending: str = "") -> list[Sample]:
    """Return the sample of a prompt and its completion; none if one of them is blank."""
    if not prompt.strip() or not completion.strip():
        return []
    return [Sample(ending, prompt=prompt, completion=completion)]


def _read(fields: Fields) -> list[Sample]:
    if is_blank(fields.value("prompt")) or is_blank(fields.value("completion")):
        return []
    if not are_messages(fields, ("prompt", "completion")):
        return completed(fields.text("prompt"), fields.text("completion"))
    prompt, completion = messages_of(fields, "prompt"), messages_of(fields, "completion")
    if is_empty(prompt) or is_empty(completion):
        return []
    return [chat([*as_context(prompt), *completion], fields)]


COMPLETION = Form(
    name="completion",
    needed=("prompt", "completion"),
    optional=("tools", "functions"),
    looks_like="`prompt`, `completion` (TRL): both texts, or both `[{role, content}]`",
    meaning="one text with nothing added between the two, and the completion as target; or one chat, in which only "
    "the completion's turns are targets",
    read=_read,
)
