"""Frames as tables of a page, and samples as texts."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import polars as pl

from lark_store.core.tabular import writable
from lark_store.core.words import words
from lark_store.display.values import rounded
from lark_store.schema.chats import message_text, shown_text, turn_texts

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

LONGEST = 220  # characters of a cell; a longer one opens on a click
_LONG = 40  # characters of a text that gets a column of a least width
WHOLE = 5_000  # characters of one that is open
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_SEARCHED = ["query_id", "prompt", "response", "completion", "text"]
_WORD = re.compile(r"\w+|\W+")


@dataclass(frozen=True)
class Cell:
    """A cell: its text, where a click leads, and the whole of a text that is too long for a table."""

    text: str
    href: str | None = None
    whole: str | None = None


@dataclass(frozen=True)
class Head:
    """A column's head; a click sorts by it if it has an address. A column with long texts gets a width."""

    name: str
    is_number: bool
    href: str | None = None
    is_long: bool = False


@dataclass(frozen=True)
class Table:
    """A table: the heads of its columns, and rows of cells. `n_more` further rows are not shown."""

    heads: list[Head]
    rows: list[list[Cell]]
    n_more: int = 0


def table(
    frame: pl.DataFrame,
    links: Mapping[str, Callable[[dict[str, Any]], str | None]] | None = None,
    *,
    most: int = 500,
    sorts: Mapping[str, str] | None = None,
) -> Table:
    """Return a frame as a table: values rounded for people; `links` make addresses from rows, for columns by name."""
    shown = frame.head(most)
    columns = [rounded(series) for series in shown]
    heads = [
        Head(
            column.name.replace("_", " "),
            column.is_number,
            (sorts or {}).get(column.name),
            not column.is_number and any(len(cell) > _LONG for cell in column.cells),
        )
        for column in columns
    ]
    named = shown.to_dicts() if links else [{}] * len(shown)
    cells = [_cells(column.cells, column.is_number, shown[column.name].to_list()) for column in columns]
    for place, column in enumerate(columns):
        if link := (links or {}).get(column.name):
            cells[place] = [
                Cell(cell.text, link(row), cell.whole) for cell, row in zip(cells[place], named, strict=True)
            ]
    return Table(heads, [list(row) for row in zip(*cells, strict=True)], len(frame) - len(shown))


def _cells(cells: list[str], is_number: bool, values: list[Any]) -> list[Cell]:
    if is_number:
        return [Cell(re.sub(r"^-(?=[\d.])", "−", cell)) for cell in cells]
    return [
        Cell(f"{cell[:LONGEST].rstrip()}…", whole=_bounded(visible(str(value)))) if len(cell) > LONGEST else Cell(cell)
        for cell, value in zip(cells, values, strict=True)
    ]


def csv_of(frame: pl.DataFrame) -> str:
    """Return a frame as CSV, with nested values as JSON."""
    return writable(frame, nested=False).write_csv()


def _bounded(text: str) -> str:
    """Return a text that is not too long for a cell that opens."""
    more = len(text) - WHOLE
    return text if more <= 0 else f"{text[:WHOLE]}… ({more:,} more characters)"


def visible(text: str) -> str:
    """Return a text with its control characters, those of writing direction too, shown as �."""
    return _CONTROL.sub("�", text)


def with_text(frame: pl.DataFrame) -> pl.DataFrame:
    """Return samples with one `text` for people, a chat as its dialogue, instead of the columns of their parts."""
    parts = ["prompt", "response", "completion", "messages"]
    return frame.with_columns(text=shown_text()).drop(parts)


def containing(frame: pl.DataFrame, search: str) -> pl.DataFrame:
    """Return the samples whose id or text contains a text, in any case; of a chat, what is said in its turns."""
    said = pl.col("messages").map_elements(_said, return_dtype=pl.String)
    whole = pl.concat_str([*_SEARCHED, said], separator="\n", ignore_nulls=True)
    return frame.filter(whole.str.to_lowercase().str.contains(search.lower(), literal=True))


def _said(messages: str) -> str:
    found = (part for message in json.loads(messages) for part in turn_texts(message))
    return "\n".join(found)


@dataclass(frozen=True)
class Part:
    """A part of a sample: its name, such as `prompt` or the role of a message, and its text in marked pieces."""

    name: str
    pieces: list[tuple[str, bool]]


def parts_of(row: Mapping[str, Any], marked: frozenset[str] = frozenset()) -> list[Part]:
    """Return the parts of a row of the view `samples`, a chat message by message; words in `marked` are marked."""
    if row.get("messages"):
        texts = [(str(message["role"]), message_text(message)) for message in json.loads(row["messages"])]
        if row.get("tools"):
            texts.insert(0, ("tools", row["tools"]))
    else:
        names = ("prompt", "response", "completion", "text")
        texts = [(name, row[name]) for name in names if row.get(name) is not None]
    return [Part(name, pieces(text, marked)) for name, text in texts]


def pieces(text: str, marked: frozenset[str]) -> list[tuple[str, bool]]:
    """Divide a text into pieces, and say which are words of `marked`."""
    found: list[tuple[str, bool]] = []
    for piece in _WORD.findall(visible(text)):
        is_marked = piece.lower() in marked
        if found and found[-1][1] == is_marked:
            found[-1] = (found[-1][0] + piece, is_marked)
        else:
            found.append((piece, is_marked))
    return found


def words_of(parts: list[Part]) -> frozenset[str]:
    """Return the words of a sample, without the most common English ones, in lower case."""
    text = "\n".join(piece for part in parts for piece, _ in part.pieces)
    return frozenset(words([text])[0])
