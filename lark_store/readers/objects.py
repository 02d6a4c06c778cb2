"""Rows of Python objects: dicts, frames that share Arrow data, and datasets, without importing their libraries."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from lark_store.errors import InputError
from lark_store.readers.arrow import rows_of_batches
from lark_store.readers.base import Row, StructRow

if TYPE_CHECKING:
    from collections.abc import Iterator

EXAMPLE = 'for example [{"text": "…"}]'


def describe(data: object) -> str:
    """Return what an object is, as the place of a source: `Python: polars.DataFrame`."""
    kind = type(data)
    package = kind.__module__.partition(".")[0]
    return f"Python: {kind.__name__}" if package == "builtins" else f"Python: {package}.{kind.__name__}"


def rows_of_object(data: Any) -> Iterator[Row]:
    """Stream the rows of an object.

    Raises
    ------
    InputError
        It has no rows.
    """
    if _is_dataset(data):
        return map(StructRow, data.with_format(None))
    if hasattr(data, "__arrow_c_stream__"):
        return _rows_of_stream(data)
    if isinstance(data, Mapping):
        if data and all(map(_is_dataset, data.values())):
            names = ", ".join(f"`{name}`" for name in data)
            raise InputError(f"the dataset has the splits {names}", f'give one of them: data["{next(iter(data))}"]')
        raise InputError("a dict is not a list of rows", f"give a list of dicts, {EXAMPLE}")
    if hasattr(data, "collect") and not isinstance(data, Iterable):
        raise InputError(f"a {type(data).__name__} holds no rows yet", "give its frame: `data.collect()`")
    if not isinstance(data, Iterable) or isinstance(data, bytes | bytearray):
        raise InputError(
            f"{type(data).__name__} holds no rows",
            f"give a path, a list of dicts ({EXAMPLE}), a frame of polars, pandas or Arrow, or a dataset",
        )
    return _rows_of_dicts(data)


def _is_dataset(data: object) -> bool:
    return any(
        kind.__module__.startswith("datasets.") and kind.__name__ in {"Dataset", "IterableDataset"}
        for kind in type(data).__mro__
    )


def _rows_of_stream(data: Any) -> Iterator[Row]:
    import pyarrow as pa

    try:
        batches = pa.RecordBatchReader.from_stream(data)
        names = batches.schema.names
    except (pa.ArrowException, TypeError, ValueError, NotImplementedError) as error:
        raise InputError(f"{type(data).__name__} is not a table: {error}", "give a frame with columns") from error
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"the frame has two columns named `{twice}`", "give each column a unique name")
    return rows_of_batches(batches)


def _rows_of_dicts(data: Iterable[Any]) -> Iterator[Row]:
    for number, row in enumerate(data, 1):
        if not isinstance(row, Mapping):
            raise InputError(f"row {number} is {type(row).__name__}, not a dict", f"give a list of dicts, {EXAMPLE}")
        plain, is_struct = _plain(row)
        yield StructRow(plain) if is_struct else plain


def _plain(value: Any) -> tuple[Any, bool]:
    """Return a value without NumPy's types and tuples, and whether it has an array of structs, as pandas reads them."""
    if isinstance(value, Mapping):
        items = {key: _plain(item) for key, item in value.items()}
        return {key: item for key, (item, _) in items.items()}, any(is_struct for _, is_struct in items.values())
    if isinstance(value, list | tuple):
        parts = [_plain(item) for item in value]
        return [part for part, _ in parts], any(is_struct for _, is_struct in parts)
    if type(value).__module__ == "numpy":
        listed = value.tolist()
        has_structs = isinstance(listed, list) and any(isinstance(item, dict) for item in listed)
        plain, is_struct = _plain(listed) if isinstance(listed, list) else (listed, False)
        return plain, has_structs or is_struct
    return value, False
