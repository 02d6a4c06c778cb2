"""Lists in sentences."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


def joined(words: Iterable[str], conjunction: str) -> str:
    """Join words by commas, the last two by a conjunction.

    >>> joined(["a", "b", "c"], "or"), joined(["a"], "or")
    ('a, b or c', 'a')
    """
    *first, last = words
    return f"{', '.join(first)} {conjunction} {last}" if first else last


def coded(names: Iterable[str]) -> list[str]:
    """Put names into backticks.

    >>> coded(["a", "b"])
    ['`a`', '`b`']
    """
    return [f"`{name}`" for name in names]


def distinct_notes(cells: Iterable[str | None]) -> list[str]:
    r"""Return the notes in a column `note`, each once; a cell holds several, joined by a line break and `note: `.

    >>> distinct_notes(["one\nnote: two", None, "two"])
    ['one', 'two']
    """
    return list(dict.fromkeys(note for cell in cells if cell for note in cell.split("\nnote: ")))
