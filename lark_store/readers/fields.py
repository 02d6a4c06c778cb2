"""The fields of a row: its values, exact texts and id, by a mapping of names to columns."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import TYPE_CHECKING, Any
from uuid import UUID

from lark_store.errors import InputError
from lark_store.readers.paths import follow, has_column, listed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lark_store.readers.base import Row

_IDS = ("sample_id", "id")


class Fields:
    """The fields of a row. `columns` maps names of fields to columns; a field without one is in the column of its name.

    `strip` removes white space around each text.

    Raises
    ------
    InputError
        A mapped column is missing.
    """

    def __init__(self, row: Row, columns: Mapping[str, str], *, strip: bool) -> None:
        self.row = row
        self.columns = columns
        self._strip = strip
        for name, column in columns.items():
            if "." not in name and not has_column(row, column):
                raise InputError(f"there is no column `{column}`", f"the columns are {listed(row)}")

    def column(self, name: str) -> str:
        """Return the column of a field."""
        return self.columns.get(name, name)

    def has(self, name: str) -> bool:
        """Tell whether the row has a field; its value may be null."""
        return has_column(self.row, self.column(name))

    def value(self, name: str) -> Any:
        """Return a field's value; None if it is missing."""
        return follow(self.row, self.column(name))[1]

    def text(self, name: str) -> str:
        """Return a field's exact text: one line per item of a list, empty for a missing value.

        Raises
        ------
        InputError
            The column holds no text.
        """
        text = text_of(name, self.column(name), self.value(name))
        return text.strip() if self._strip else text

    def renamed(self, prefix: str) -> dict[str, str]:
        """Return the mapped names below a prefix: `messages.role=from` gives {"role": "from"}."""
        start = f"{prefix}."
        return {name.removeprefix(start): to for name, to in self.columns.items() if name.startswith(start)}


def is_blank(value: object) -> bool:
    """Tell whether a value is missing, empty or white space."""
    if isinstance(value, str):
        return not value.strip()
    return _is_missing(value) or (isinstance(value, list | dict) and not value)


def finite(value: Any) -> Any:
    """Copy a value with None for NaN and infinity, which JSON lacks."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


# --- texts ---------------------------------------------------------------------------------------------------------


def _check_kind(field: str, column: str, value: object) -> None:
    """Refuse a value without a text form."""
    hint = f"map another column with `--column {field}=COLUMN`"
    if isinstance(value, dict) and value:
        raise InputError(
            f"column `{column}` holds a dict, not text",
            f"map one of its keys with `--column {field}={column}.KEY`; the keys are {listed(value)}",
        )
    if isinstance(value, list):
        kinds = " and ".join(sorted({type(part).__name__ for part in value}))
        raise InputError(f"column `{column}` holds a list of {kinds}, not only text", hint)
    if isinstance(value, dict | bytes | bytearray | memoryview):
        raise InputError(f"column `{column}` holds {type(value).__name__}, not text", hint)


def text_of(field: str, column: str, value: object) -> str:
    """Return a value's exact text: one line per item of a list, empty for a missing value.

    Raises
    ------
    InputError
        The value has no text form.
    """
    if _is_missing(value):
        return ""
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return "\n".join(value)
    _check_kind(field, column, value)
    return str(value)


# --- ids -----------------------------------------------------------------------------------------------------------


def id_text(column: str, value: object) -> str | None:
    r"""Return an id's exact text; None if it is null, NaN or blank.

    >>> id_text("id", " a\n"), id_text("id", 2**70), id_text("id", float("nan"))
    (' a\n', '1180591620717411303424', None)

    Raises
    ------
    InputError
        The value is neither text nor a whole number.
    """
    if _is_missing(value):
        return None
    if isinstance(value, str):
        return value if value.strip() else None
    if not isinstance(value, list):
        _check_kind("sample_id", column, value)
    if isinstance(value, bool) or not isinstance(value, int | Decimal | UUID):
        hint = "write ids as text or whole numbers, or map another column with `--column sample_id=COLUMN`"
        if isinstance(value, float):
            hint += "; pandas turns integers with missing values into floats unless their type is `Int64`"
        raise InputError(f"column `{column}` holds {type(value).__name__} `{str(value)[:40]}`, not an id", hint)
    return str(value)


def id_of(row: Row, columns: Mapping[str, str]) -> tuple[str | None, str | None]:
    """Return the id's column and the id: from the mapped column, else `sample_id`, else `id`, else (None, None).

    Raises
    ------
    InputError
        The value is not an id, or the mapped column is empty.
    """
    mapped = columns.get("sample_id")
    for column in (mapped,) if mapped is not None else _IDS:
        has, value = follow(row, column)
        sample_id = id_text(column, value) if has else None
        if sample_id is not None:
            return column, sample_id
    if mapped is not None:
        raise InputError(
            f"column `{mapped}` has no id in this row",
            "give each row an id; without `--column sample_id=…` ids are hashes of the texts",
        )
    return None, None


def id_columns(columns: Mapping[str, str], used: str | None) -> set[str]:
    """Return the id columns, which are not metadata; an `id` column counts as metadata if another column is used."""
    id_column = columns.get("sample_id", "sample_id")
    return {id_column} if used == id_column else {id_column, "id"}
