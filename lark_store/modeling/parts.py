"""The parts of a sample: the texts that a template prints, and where they are in its output.

A template is run twice: with the sample's texts, and with a mark in place of each. The marks' places tell the places of
the texts, for any template, as long as it treats the marks as the texts.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lark_store.modeling.templates import or_missing
from lark_store.schema.chats import content_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lark_store.modeling.sample import Sample
    from lark_store.schema.chats import Message

_THINKING = re.compile(r"(</?think>)")


@dataclass(frozen=True)
class Part:
    """A text of a sample.

    `turn` is the number of its message. `is_answer`: the rule `assistant` makes it a target. `is_fixed`: truncation
    keeps it. `is_optional`: a template may omit it, as many omit the reasoning of earlier turns.
    """

    name: str
    text: str
    turn: int = 0
    is_answer: bool = False
    is_fixed: bool = False
    is_optional: bool = False


@dataclass(frozen=True)
class Span:
    """The place of a part in a rendered text, in characters."""

    part: Part
    start: int
    end: int


# --- samples without messages ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlainParts:
    """The parts of a sample without messages: its `fields` with a text."""

    fields: dict[str, str | None]

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts; a template may omit blank ones."""
        return tuple(
            Part(name, text, is_answer=name == "response", is_optional=not text.strip())
            for name, text in self.fields.items()
            if text
        )

    def variables(self, texts: Sequence[str], **_: Any) -> dict[str, Any]:
        """Return the template's variables with other texts of the parts."""
        fields = self.fields | {part.name: text for part, text in zip(self.parts, texts, strict=True)}
        if fields["text"] is not None:
            messages: list[Message] = [{"role": "user", "content": fields["text"]}]
        else:
            turns = (("user", "prompt"), ("assistant", "response"))
            messages = [{"role": role, "content": fields[name]} for role, name in turns]
        return {"messages": messages, **or_missing(fields)}


def plain_parts(sample: Sample) -> PlainParts:
    """Return the parts of a sample without messages; its completion is its `response`."""
    response = sample.response if sample.completion is None else sample.completion
    return PlainParts({"prompt": sample.prompt, "response": response, "text": sample.text})


@dataclass(frozen=True)
class DocumentParts:
    """The parts of a text in the prompt of a question: the document and the answer.

    `before` and `after` are the prompt's own words around the document.
    """

    before: str
    document: str
    after: str
    answer: str

    @property
    def parts(self) -> tuple[Part, ...]:
        """The document and the answer."""
        return Part("text", self.document), Part("response", self.answer, is_answer=True)

    def prompt(self, document: str) -> str:
        """Return the prompt with another document."""
        return f"{self.before}{document}{self.after}"

    def variables(self, texts: Sequence[str], **_: Any) -> dict[str, Any]:
        """Return the template's variables with other texts of the parts."""
        document, answer = texts
        fields = {"prompt": self.prompt(document), "response": answer, "text": None}
        return PlainParts(fields).variables([self.prompt(document), answer])


# --- chats -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChatParts:
    """The parts of a chat. `pieces` has, for a message's number and key, its literal texts and numbers of parts."""

    messages: tuple[Message, ...]
    parts: tuple[Part, ...]
    pieces: dict[tuple[int, str], list[str | int]]
    tools: list[Any] | None = None

    @property
    def tool_turns(self) -> tuple[int, ...]:
        """The numbers of the messages with tool calls."""
        return tuple(number for number, message in enumerate(self.messages) if message.get("tool_calls"))

    def variables(
        self, texts: Sequence[str], *, as_lists: bool = False, without_calls: int | None = None
    ) -> dict[str, Any]:
        """Return the template's variables with other texts of the parts.

        `as_lists` gives contents as lists of one text part, which some templates need; `without_calls` is the number of
        a message without its tool calls.
        """
        messages = []
        for number, message in enumerate(self.messages):
            given = {key: value for key, value in message.items() if key != "weight"}
            for key in ("content", "reasoning_content"):
                if (number, key) in self.pieces:
                    pieces = self.pieces[number, key]
                    text = "".join(piece if isinstance(piece, str) else texts[piece] for piece in pieces)
                    given[key] = [{"type": "text", "text": text}] if as_lists and key == "content" else text
            if number == without_calls:
                del given["tool_calls"]
                given["content"] = given.get("content") or ""
            messages.append(given)
        missing = dict.fromkeys(("prompt", "response", "text"), None)
        tools = {} if self.tools is None else {"tools": self.tools}
        return {"messages": messages, **tools, **or_missing(missing)}


def chat_parts(sample: Sample) -> ChatParts:
    """Return the parts of a chat. Tags `<think>` within a content stay, so that templates find them."""
    messages: tuple[Message, ...] = tuple(json.loads(sample.messages or "[]"))
    last = max((n for n, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
    parts: list[Part] = []
    pieces: dict[tuple[int, str], list[str | int]] = {}
    for number, message in enumerate(messages):
        for key in ("reasoning_content", "content"):
            if not message.get(key):
                continue
            row: list[str | int] = []
            pieces[number, key] = row
            for text, is_reasoning in _segments(message, key):
                if not text.strip() or text in {"<think>", "</think>"}:
                    row.append(text)
                    continue
                row.append(len(parts))
                is_optional = is_reasoning and number != last
                parts.append(_part(message, number, text, is_reasoning=is_reasoning, is_optional=is_optional))
    return ChatParts(messages, tuple(parts), pieces, json.loads(sample.tools) if sample.tools else None)


def _segments(message: Message, key: str) -> list[tuple[str, bool]]:
    """Return the texts of a message's content, each with whether it is reasoning."""
    text = content_text(message[key])
    if message["role"] != "assistant" or key != "content" or "</think>" not in text:
        return [(text, key != "content")]
    pieces = _THINKING.split(text)
    end = len(pieces) - 1 - pieces[::-1].index("</think>")
    return [(piece, number < end) for number, piece in enumerate(pieces)]


def _part(message: Message, number: int, text: str, *, is_reasoning: bool, is_optional: bool) -> Part:
    role = message["role"]
    return Part(
        f"{'reasoning' if is_reasoning else 'content'} of message {number + 1} ({role})",
        text,
        turn=number,
        is_answer=role == "assistant" and message.get("weight") != 0,
        is_fixed=role in {"system", "developer"},
        is_optional=is_optional,
    )


Layout = PlainParts | DocumentParts | ChatParts


def parts_of(sample: Sample) -> PlainParts | ChatParts:
    """Return the parts of a sample."""
    return plain_parts(sample) if sample.messages is None else chat_parts(sample)


# --- places ----------------------------------------------------------------------------------------------------------


def mark(number: int, text: str) -> str:
    """Return a placeholder for a part, of the text's length if possible.

    It uses Unicode's private use area, so its place in the output is the part's place, whatever the part holds.
    """
    return "\ue0f0" + str(number).ljust(len(text) - 2, "\ue0f2") + "\ue0f1"


def _forms(text: str) -> list[str]:
    """Return a part's text, its trimmed forms, and its form within JSON."""
    trimmed = [getattr(text, method)(*chars) for chars in ((), ("\n",)) for method in ("strip", "lstrip", "rstrip")]
    return list(dict.fromkeys([text, *trimmed, json.dumps(text, ensure_ascii=False)[1:-1]]))


def find_spans(parts: Sequence[Part], marks: Sequence[str], skeleton: str, rendered: str) -> list[Span] | None:
    """Return the place of each part whose mark is in the skeleton; None if the texts and marks differ otherwise.

    `skeleton` is the output with the marks, each at most once, and `rendered` the output with the texts.
    """
    order = sorted((n for n in range(len(parts)) if marks[n] in skeleton), key=lambda n: skeleton.index(marks[n]))
    literals, rest = [], skeleton
    for number in order:
        before, rest = rest.split(marks[number], 1)
        literals.append(before)
    places = _align([*literals, rest], [_forms(parts[number].text) for number in order], rendered)
    if places is None:
        return None
    return [Span(parts[number], *place) for number, place in zip(order, places, strict=True)]


def _align(literals: list[str], options: list[list[str]], rendered: str) -> list[tuple[int, int]] | None:
    """Return the place of one option of each, such that the literals and the options make up the text, or None."""
    chosen: list[tuple[int, int, int]] = []
    place, first = len(literals[0]), 0
    if not rendered.startswith(literals[0]) or (not options and rendered != literals[0]):
        return None
    while len(chosen) < len(options):
        forms, after = options[len(chosen)], literals[len(chosen) + 1]
        is_last = len(chosen) + 1 == len(options)
        for number in range(first, len(forms)):
            end = place + len(forms[number])
            fits = rendered.startswith(forms[number], place) and rendered.startswith(after, end)
            if fits and (not is_last or end + len(after) == len(rendered)):
                chosen.append((place, end, number))
                place, first = end + len(after), 0
                break
        else:
            if not chosen:
                return None
            place, _, number = chosen.pop()
            first = number + 1
    return [(start, end) for start, end, _ in chosen]


def search_spans(parts: Sequence[Part], rendered: str) -> list[Span] | None:
    """Return the place of each part by its text; None if one is missing or occurs twice."""
    spans = []
    for part in parts:
        text = part.text.strip()
        if rendered.count(text) != 1:
            if text and not (part.is_optional and text not in rendered):
                return None
            continue
        start = rendered.index(text)
        spans.append(Span(part, start, start + len(text)))
    return spans


def inserted(rendered: str, without: str) -> tuple[int, int] | None:
    """Return the place of the text that `rendered` has and `without` lacks; None if they differ otherwise."""
    limit = min(len(rendered), len(without))
    after = next((n for n in range(limit) if rendered[-1 - n] != without[-1 - n]), limit)
    before = next((n for n in range(limit - after) if rendered[n] != without[n]), limit - after)
    if without[before : len(without) - after].strip():
        return None
    return before, len(rendered) - after
