"""Base classes of results with rows: converted to frames, and shown as tables in a terminal and in a notebook."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast, overload

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pandas as pd  # type: ignore[import-untyped]
    import polars as pl

    from lark_store.display.table import About

_SHOWN = 20  # rows
_COMPLETE = "`.to_polars()` has everything"
Item = TypeVar("Item")


class Convertible:
    """A result with rows, for polars, pandas and everything that reads the Arrow stream interface."""

    @property
    def _rows(self) -> pl.DataFrame:
        raise NotImplementedError

    @property
    def about(self) -> About:
        """What to print around the table of the rows."""
        from lark_store.display.table import NOTHING

        return NOTHING

    def to_polars(self) -> pl.DataFrame:
        """Return the rows as a polars frame."""
        return self._rows

    def to_pandas(self) -> pd.DataFrame:
        """Return the rows as a pandas frame.

        Raises
        ------
        InputError
            pandas is not installed.
        """
        try:
            import pandas  # noqa: F401, ICN001  # polars imports it too, with a longer message
        except ModuleNotFoundError as error:
            from lark_store.errors import InputError

            raise InputError("pandas is not installed", "install it with `pip install pandas`") from error
        return self._rows.to_pandas()

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        return self._rows.__arrow_c_stream__(requested_schema)

    def _first_rows(self, n: int) -> tuple[pl.DataFrame, int]:
        """Return the first rows, and the number of all rows."""
        return self._rows.head(n), len(self._rows)

    def __repr__(self) -> str:
        from lark_store.display.table import table, terminal_width

        rows, n = self._first_rows(_SHOWN)
        about = replace(self.about, complete=_COMPLETE)
        text = table(rows, terminal_width(), about, n_more=n - len(rows))
        return f"{type(self).__name__}: {n:,} row{'s' * (n != 1)}\n{text}"

    def _repr_html_(self) -> str:
        from lark_store.display.html import html

        rows, n = self._first_rows(_SHOWN)
        return html(rows, self.about, n - len(rows))


class Tabular(Convertible, Generic[Item]):
    """A result with rows, which is also a sequence of them."""

    def _item(self, row: dict[str, Any]) -> Item:
        return cast("Item", row)

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Item]:
        return map(self._item, self._rows.iter_rows(named=True))

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        if isinstance(index, slice):
            return [self._item(row) for row in self._rows[index].iter_rows(named=True)]
        number = operator.index(index)
        if not -len(self) <= number < len(self):
            raise IndexError(f"row {number} of {len(self)}")
        return self._item(self._rows.row(number, named=True))
