"""Tables for notebooks, as HTML. Everything that comes from data is escaped."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from lark_store.display.table import SEPARATOR, legend, more_rows, shared_facts, take_shared
from lark_store.display.texts import shortened, starts
from lark_store.display.values import rounded

if TYPE_CHECKING:
    from collections.abc import Sequence

    import polars as pl

    from lark_store.display.table import About
    from lark_store.display.values import Column

_LONGEST = 160  # of a text; a longer one opens on a click
_TABLE = "border-collapse: collapse"
_CELL = "text-align: {}; vertical-align: top; padding: 0.2em 0.8em 0.2em 0"
_TEXT = "max-width: 60em; white-space: pre-wrap"


def html(frame: pl.DataFrame, about: About, n_more: int = 0) -> str:
    """Return a frame as a table in HTML; `n_more` rows of the result are not in the frame."""
    columns = [rounded(series) for series in frame]
    shared = take_shared(columns, about) if len(frame) > 1 and not n_more else {}
    above = SEPARATOR.join(shared_facts(shared, about.facts))
    below = SEPARATOR.join([*legend(frame, about), *more_rows(n_more)])
    cells = [_cells(column, frame[column.name]) for column in columns]
    head = "".join(f"<th style='{_style(column)}'>{escape(column.name)}</th>" for column in columns)
    rows = "".join(f"<tr>{''.join(row)}</tr>" for row in zip(*cells, strict=True))
    table = f"<table style='{_TABLE}'><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f"<div>{_paragraph(above)}{table}{_paragraph(below)}</div>"


def _paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>" if text else ""


def _style(column: Column) -> str:
    return _CELL.format("right" if column.is_number else "left")


def _cells(column: Column, series: pl.Series) -> Sequence[str]:
    """Return a column's cells; a long text opens on a click."""
    done = []
    for cell, value, start in zip(column.cells, series.to_list(), starts(column.cells), strict=True):
        content = escape(cell)
        if isinstance(value, str) and len(cell) > _LONGEST:
            beginning = " ".join(shortened(cell, _LONGEST, 1, start))
            content = (
                f"<details><summary>{escape(beginning)}</summary><div style='{_TEXT}'>{escape(value)}</div></details>"
            )
        done.append(f"<td style='{_style(column)}'>{content}</td>")
    return done
