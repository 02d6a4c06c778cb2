"""Rows of a .json file: a list of objects, an object with one list, or JSON lines."""

from __future__ import annotations

import codecs
import json
from itertools import chain
from typing import TYPE_CHECKING, Any

from lark_store.errors import InputError
from lark_store.readers.base import Row, open_bytes
from lark_store.readers.json_text import RepeatedKeyError, check_pairs, fault, unique_keys
from lark_store.readers.jsonl import read_jsonl

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_PIECE = 1 << 20
_LONGEST_WORD = 16  # a longer word is wrong, not cut off at the end of a piece
_SPACE = " \t\r\n"
_HINT = "a .json file has a list of objects: [{…}, {…}]"


def read_json(path: Path) -> Iterator[Row]:
    """Read rows of a .json file. A list is read piece by piece, an object as a whole."""
    text = _Text(path)
    if text.peek() == "[":
        yield from _objects(path, text.items())
        return
    if text.peek() != "{":
        found = text.peek()
        raise InputError(f"`{path}` is not JSON: it begins with `{found}`" if found else f"`{path}` is empty", _HINT)
    first = text.value()
    if text.peek():  # more objects: JSON lines under another name
        yield from read_jsonl(path)
        return
    lists = {key: value for key, value in first.items() if isinstance(value, list)}
    rows = {key: value for key, value in lists.items() if value and all(isinstance(item, dict) for item in value)}
    if len(rows) != 1 or len(lists) > 1:
        names = ", ".join(f"`{key}`" for key in first) or "no keys"
        raise InputError(
            f"`{path}` holds one object with {names}, not a list of rows",
            'write a list of objects, [{…}], or an object with one such list, {"data": [{…}]}',
        )
    yield from next(iter(rows.values()))


def _objects(path: Path, values: Iterator[Any]) -> Iterator[Row]:
    for number, value in enumerate(values, 1):
        if not isinstance(value, dict):
            raise InputError(
                f"`{path}`, row {number}: it is {'a text' if isinstance(value, str) else type(value).__name__}, "
                "not an object",
                'write each row as an object such as {"text": "…"}',
            )
        yield value


class _Text:
    """The text of a JSON file, decoded as far as it was needed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._pieces = _pieces(path)
        self._text = ""
        self._place = 0
        self._line = 1  # of the start of `_text`
        self._decoder = json.JSONDecoder(object_pairs_hook=unique_keys)

    def peek(self) -> str:
        """Return the next character that is not white space; empty at the end."""
        while True:
            while self._place < len(self._text) and self._text[self._place] in _SPACE:
                self._place += 1
            if self._place < len(self._text):
                return self._text[self._place]
            if not self._more():
                return ""

    def items(self) -> Iterator[Any]:
        """Yield the values of the list that begins here; nothing may follow it."""
        self._place += 1
        if self.peek() == "]":
            self._place += 1
        else:
            while True:
                self.peek()
                yield self.value()
                mark = self.peek()
                self._place += 1
                if mark == "]":
                    break
                if mark != ",":
                    raise self._not_json("a comma or `]` is missing", self._place - 1)
        if self.peek():
            raise self._not_json("text follows the list", self._place)

    def value(self) -> Any:
        """Return the value that begins here."""
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._place)
                check_pairs(self._text[self._place : end], value)
            except json.JSONDecodeError as error:
                behind = error.pos - self._place
                is_cut = error.msg.startswith("Unterminated") or error.pos > len(self._text) - _LONGEST_WORD
                if not (is_cut and self._more()):
                    raise self._not_json(error.msg, self._place + behind) from error
                continue
            except (RepeatedKeyError, RecursionError, ValueError) as error:
                raise fault(error, f"`{self._path}`, from line {self._line_of(self._place)},") from error
            if end == len(self._text) and self._more():  # a number may go on
                continue
            self._place = end
            return value

    def _more(self) -> bool:
        """Read on, at least as much as is left: a long value is not decoded for each piece."""
        rest = self._text[self._place :]
        self._line += self._text.count("\n", 0, self._place)
        added: list[str] = []
        while sum(map(len, added)) < max(1, len(rest)):
            piece = next(self._pieces, None)
            if piece is None:
                break
            added.append(piece)
        self._text, self._place = rest + "".join(added), 0
        return bool(added)

    def _line_of(self, place: int) -> int:
        return self._line + self._text.count("\n", 0, place)

    def _not_json(self, fact: str, place: int) -> InputError:
        return InputError(f"`{self._path}`, line {self._line_of(place)}, is not JSON: {fact}", _HINT)


def _pieces(path: Path) -> Iterator[str]:
    """Yield the text of a file, piece by piece."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    with open_bytes(path) as file:
        for data in chain(iter(lambda: file.read(_PIECE), b""), [b""]):
            if text := decoder.decode(data, final=not data):
                yield text
