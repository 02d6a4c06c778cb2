"""Summarise the samples of a source in one line."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from lark_store.modeling.forms import FORMS

if TYPE_CHECKING:
    from lark_store.modeling.forms.base import Form
    from lark_store.modeling.sample import Sample

_SYSTEM = {"system", "developer"}


class Summary:
    """Counts the forms of rows, and the turns of chats.

    >>> from lark_store.modeling.forms.rows import make_samples
    >>> summary = Summary()
    >>> summary.add(*make_samples({"messages": [{"role": "user", "content": "Hi!"}]}, {}))
    >>> summary.line()
    '1 chat, 1.0 turns on average, 1 without an assistant turn (no targets)'
    """

    def __init__(self) -> None:
        self.rows: dict[str, int] = {}  # by form
        self._counts = dict.fromkeys(("chats", "texts", "responses", "completions", "pairs"), 0)
        self._turns = self._with_system = self._without_target = 0

    def add(self, form: Form | None, samples: list[Sample]) -> None:
        """Count the samples of one row."""
        if form is None:
            return
        self.rows[form.name] = self.rows.get(form.name, 0) + 1
        first = samples[0]
        if len(samples) > 1:
            kind = "pairs"
        elif first.messages is not None:
            kind = "chats"
            self._add_chat(first.messages)
        elif first.text is not None:
            kind = "texts"
        else:
            kind = "responses" if first.completion is None else "completions"
        self._counts[kind] += 1

    def _add_chat(self, messages: str) -> None:
        roles = [message["role"] for message in json.loads(messages)]
        self._turns += sum(role not in _SYSTEM for role in roles)
        self._with_system += any(role in _SYSTEM for role in roles)
        self._without_target += "assistant" not in roles

    def line(self) -> str:
        """Return the counts in a line; empty without samples."""
        named = {"texts": "text", "responses": "prompt with a response", "completions": "prompt with a completion"}
        plurals = {"responses": "prompts with responses", "completions": "prompts with completions"}
        parts = [self._chats()] if self._counts["chats"] else []
        if self._counts["pairs"]:
            parts.append(_counted(self._counts["pairs"], "preference pair", "preference pairs"))
        parts += [
            _counted(self._counts[kind], one, plurals.get(kind, kind))
            for kind, one in named.items()
            if self._counts[kind]
        ]
        return "; ".join(parts)

    def _chats(self) -> str:
        n = self._counts["chats"]
        line = f"{_counted(n, 'chat', 'chats')}, {self._turns / n:.1f} turns on average"
        if self._with_system:
            line += f", {self._with_system / n:.0%} with a system prompt"
        if self._without_target:
            line += f", {self._without_target:,} without an assistant turn (no targets)"
        return line

    def notes(self) -> list[str]:
        """Return the notes of the forms."""
        return [note for name in self.rows if (note := FORMS[name].note) is not None]


def _counted(n: int, one: str, several: str) -> str:
    return f"{n:,} {one if n == 1 else several}"
