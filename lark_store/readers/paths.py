"""Columns of a row, and paths into its structs and lists: `context.contexts`, `abstract.sections.0.text`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lark_store.readers.base import Row


def listed(row: Row) -> str:
    """List the columns of a row."""
    return ", ".join(f"`{key}`" for key in row) or "no columns"


def has_column(row: Row, column: str) -> bool:
    """Tell whether `row` has a column."""
    return follow(row, column)[0]


def follow(row: Row, column: str) -> tuple[bool, Any]:
    """Return whether `row` has a column, and its value.

    Parts of a path are keys of structs and positions in lists. Whatever is inside null, or behind the end of a list, is
    null.

    >>> follow({"abstract": {"sections": [{"text": "One."}]}}, "abstract.sections.0.text")
    (True, 'One.')
    >>> follow({"text": "One."}, "abstract")
    (False, None)
    """
    value: Any = row
    for part in _parts(row, column):
        if value is None:
            return True, None
        if isinstance(value, list) and part.isdecimal():
            value = value[int(part)] if int(part) < len(value) else None
        elif isinstance(value, dict) and part in value:
            value = value[part]
        else:
            return False, None
    return True, value


def without(row: Row, columns: Iterable[str]) -> Row:
    """Copy `row` without some columns; the neighbours of a nested value stay."""
    rest: Any = row
    paths = [_parts(row, column) for column in columns]
    for parts in sorted(paths, key=_positions, reverse=True):  # the last of a list first: positions stay right
        rest = _without(rest, parts)
    return dict(rest)


def _positions(parts: list[str]) -> list[tuple[int, str]]:
    return [(int(part) if part.isdecimal() else -1, part) for part in parts]


def _parts(row: Row, column: str) -> list[str]:
    """Split a path `a.b` into its parts, unless a column has this exact name."""
    return [column] if column in row else column.split(".")


def _without(value: Any, parts: list[str]) -> Any:
    """Copy a struct or a list without the value at a path, and without what that leaves empty."""
    head, *inner = parts
    if isinstance(value, list) and head.isdecimal():
        i = int(head)
        kept = [_without(value[i], inner)] if inner and i < len(value) and isinstance(value[i], dict | list) else []
        return [*value[:i], *(part for part in kept if part), *value[i + 1 :]]
    if not isinstance(value, dict):
        return value
    rest = {key: part for key, part in value.items() if key != head}
    if inner and isinstance(value.get(head), dict | list) and (part := _without(value[head], inner)):
        rest[head] = part
    return rest
