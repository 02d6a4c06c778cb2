"""Rows of a JSON-lines file: one object per line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lark_store.errors import InputError
from lark_store.readers.base import Row, decoded_lines
from lark_store.readers.json_text import parse

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def read_jsonl(path: Path) -> Iterator[Row]:
    """Read rows of a JSON-lines file."""
    for number, line in enumerate(decoded_lines(path), start=1):
        if line.strip():
            yield parse_line(line, f"`{path}`, line {number},")


def parse_line(line: str, location: str) -> Row:
    """Read the row of one line; an error begins with `location`."""
    row = parse(line, location, "a .jsonl file has one JSON object per line")
    if not isinstance(row, dict):
        raise InputError(f"{location} is not a JSON object", 'write an object such as {"text": "…"}')
    return row
