"""Samples: a chat, a prompt with its response or completion, or a text."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

from lark_store.schema.chats import CONTENT, content_text, sample_hash, whole_text

if TYPE_CHECKING:
    from lark_store.readers import Row

SAMPLE_COLUMNS = ("sample_id", *CONTENT, "meta")  # of the table `samples`


@dataclass(frozen=True)
class Sample:
    """A sample of a source: a `prompt` with its `response` or `completion`, a `text`, or the `messages` of a chat.

    `messages` and `tools` are JSON. Nothing stands between a prompt and its completion.
    """

    sample_id: str
    prompt: str | None = None
    response: str | None = None
    text: str | None = None
    label: str | None = None
    meta: Row = field(default_factory=dict)
    completion: str | None = None
    messages: str | None = None
    tools: str | None = None

    @classmethod
    def of_row(cls, row: dict[str, Any]) -> Self:
        """Return the sample of a row of `SAMPLE_COLUMNS`."""
        return cls(**row | {"meta": json.loads(row["meta"])})

    @property
    def content(self) -> tuple[str | None, ...]:
        """The values of `CONTENT`, the columns of its content."""
        return tuple(getattr(self, name) for name in CONTENT)

    @property
    def content_sha256(self) -> str:
        """The hash of its content."""
        return sample_hash(*self.content)

    @property
    def answer(self) -> str:
        """Its response, its completion, or the content of its chat's last assistant turn; empty if it has none."""
        turns = [turn for turn in json.loads(self.messages or "[]") if turn["role"] == "assistant"]
        return content_text(turns[-1].get("content")) if turns else self.response or self.completion or ""

    def with_answer(self, answer: str) -> Self:
        """Return the sample with another answer."""
        if self.messages is None:
            return replace(self, response=answer) if self.completion is None else replace(self, completion=answer)
        messages = json.loads(self.messages)
        last = max(number for number, message in enumerate(messages) if message["role"] == "assistant")
        messages[last] = messages[last] | {"content": answer}
        return replace(self, messages=json.dumps(messages, ensure_ascii=False))

    @property
    def whole(self) -> str:
        """Its text for search: a prompt and its response are joined by a newline."""
        return whole_text(*self.content)
