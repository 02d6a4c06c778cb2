"""Print a frame as a table: the one place where commands print tables. `lark_store.display` makes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lark_store.display.table import NOTHING, About, full_table, table, terminal_width

if TYPE_CHECKING:
    import polars as pl


def print_table(
    frame: pl.DataFrame, title: str | None = None, about: About = NOTHING, *, wide: bool = False, by: str | None = None
) -> None:
    """Print a frame as a table that fits into the terminal, or with `wide` in full.

    With `by` the rows are divided: a table with a title for each value of this column.
    """
    if by is not None and not wide and len(frame) > 1:
        for (value,), part in frame.group_by(by, maintain_order=True):
            print_table(part.drop(by), f"{value} ({len(part)})", about)
        return
    if title:
        print(title)  # noqa: T201
    print(full_table(frame) if wide else table(frame, terminal_width(), about))  # noqa: T201
    print()  # noqa: T201


def print_markdown(frame: pl.DataFrame) -> None:
    """Print a frame as a table in Markdown, in full."""
    print(full_table(frame, markdown=True))  # noqa: T201
