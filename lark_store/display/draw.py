"""Draw columns of text as a table: for a terminal, or as Markdown."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lark_store.display.values import Column


def draw(columns: Sequence[Column], headers: Sequence[str], *, markdown: bool = False) -> str:
    """Return a table with the columns' cells; both cells and headers may have several lines."""
    if markdown:
        drawn = Table(box=box.MARKDOWN)
    else:
        drawn = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for column, header in zip(columns, headers, strict=True):
        name = Text(header.replace("|", "\\|") if markdown else header)
        drawn.add_column(name, justify="right" if column.is_number else "left", no_wrap=True, overflow="crop")
    for row in zip(*(column.cells for column in columns), strict=True):
        drawn.add_row(*(Text(cell.replace("|", "\\|") if markdown else cell) for cell in row))
    console = Console(width=100_000)  # the cells fit already
    with console.capture() as captured:
        console.print(drawn)
    drawn_lines = [line.rstrip() for line in captured.get().strip("\n").split("\n")]
    return "\n".join(line for line in drawn_lines if line or not markdown)  # Markdown has empty borders
