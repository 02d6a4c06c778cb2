"""Lance tables for DuckDB."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyarrow as pa

from lark_store.core.arrow import skip_pandas
from lark_store.schema.table_schemas import projection

skip_pandas()
from pyarrow.dataset import Dataset  # noqa: E402  # it would import pandas

if TYPE_CHECKING:
    from collections.abc import Iterable


class _SomeColumns(Dataset):  # type: ignore[misc]  # pyarrow has no types
    """Some columns of a Lance dataset, from which DuckDB reads only the columns and rows that it needs."""

    def __init__(self, dataset: Any, names: list[str]) -> None:
        self._dataset, self._names = dataset, names
        whole = dataset.schema  # made anew each time
        self._schema = pa.schema([whole.field(name) for name in names])

    @property
    def schema(self) -> pa.Schema:
        return self._schema

    def scanner(self, columns: list[str] | None = None, filter: Any = None) -> Any:  # noqa: A002  # pyarrow's names
        return self._dataset.scanner(columns=self._names if columns is None else columns, filter=filter)


def whole_rows(dataset: Any, columns: Iterable[str]) -> Any:
    """Return columns of a Lance dataset for DuckDB, as a scanner if it lacks columns of `ADDED`.

    DuckDB reads only the needed columns and rows of a dataset, but all of a scanner.
    """
    selected = projection(dataset.schema, columns)
    if not isinstance(selected, list):
        return dataset.scanner(columns=selected)
    return _SomeColumns(dataset, selected)
