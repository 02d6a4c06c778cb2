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


def without_blanks(frame: pl.DataFrame) -> tuple[pl.DataFrame, list[str]]:
    """Mark the names of groups that a table would show as blanks: null, and texts of spaces; return the legend."""
    import polars as pl

    names = [name for name in ("group_name", "subgroup_name") if name in frame.columns]
    taken = {value for name in names for value in frame[name]}
    null, empty = (
        next(mark for mark in (word, *(sign * n for n in range(1, len(taken) + 2))) if mark not in taken)
        for word, sign in (("null", "∅"), ('""', "␣"))
    )
    marked = [pl.col(name).fill_null(null) for name in names]
    is_empty = [pl.col(name).str.strip_chars() == "" for name in names]
    legend = [f"{null}: samples without the key"] if None in taken else []
    legend += [f"{empty}: an empty text"] if any(value is not None and not value.strip() for value in taken) else []
    cells = [pl.when(blank).then(pl.lit(empty)).otherwise(cell) for cell, blank in zip(marked, is_empty, strict=True)]
    return frame.with_columns(cell.alias(name) for name, cell in zip(names, cells, strict=True)), legend
