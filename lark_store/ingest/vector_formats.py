"""Files of external vectors: .npy, Parquet, bergson index folders.

Shape letters: N rows of the file, B rows of a block, D dimensions.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from lark_store.core.hashing import file_hash
from lark_store.core.paths import exists, is_file
from lark_store.errors import InputError
from lark_store.readers.fields import id_text
from lark_store.schema.vectors import ROWS_PER_BATCH

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

KINDS = ("auto", "numpy", "parquet", "bergson")
MAX_DIMENSIONS = 1 << 22
FACTS = {"grad_norm": pa.float64(), "loss": pa.float32(), "n_tokens": pa.int32(), "n_loss_tokens": pa.int32()}
_FLOATS = ("float16", "float32", "float64")
_BLOCK_BYTES = 64 << 20
_REBUILD = "build the index again with that version"
_ID_COLUMNS = ("sample_id", "id")  # in the dataset of a bergson index


@dataclass(frozen=True)
class Block:
    """Consecutive rows of a file, from row `start`.

    `vectors` is (B, D) floats, `facts` the other known values of each row, `faults` the reason for a missing vector.
    """

    start: int
    vectors: np.ndarray[Any, Any]
    facts: list[dict[str, Any]]
    faults: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class VectorFile:
    """A file of vectors with the `ids` (N) of its rows in order; `data` is the file with the numbers.

    `read` takes a mask of rows, (N,) bool, and yields at least the blocks with selected rows.
    """

    path: Path
    kind: str
    data: Path
    ids: list[str]
    dimensions: int
    number: str
    read: Callable[[np.ndarray[Any, Any]], Iterator[Block]]

    @cached_property
    def sha256(self) -> str:
        """The hash of the file with the numbers."""
        return file_hash(self.data)


def open_vectors(path: Path, kind: str, ids: Path | None) -> VectorFile:
    """Open a file of vectors and read its ids; vectors are read later.

    Raises
    ------
    InputError
        The file is missing, incomplete or of another kind, or has no ids.
    """
    if kind not in KINDS:
        raise InputError(f"unknown file kind `{kind}`", f"the kinds are {', '.join(f'`{k}`' for k in KINDS)}")
    if not exists(path):
        raise InputError(f"there is no file `{path}`", "check the path")
    names = None if ids is None else _lines(ids)
    try:
        file = _OPENERS[_guess(path) if kind == "auto" else kind](path, names)
    except InputError:
        raise
    except (OSError, ValueError, pa.ArrowException) as error:
        raise InputError(
            f"`{path}` can't be read: {error}", "check that the file is complete and matches `--kind`"
        ) from error
    if not 2 <= file.dimensions <= MAX_DIMENSIONS:
        raise InputError(
            f"`{path}` has vectors of {file.dimensions:,} dimensions, not from 2 to {MAX_DIMENSIONS:,}",
            "project them to fewer dimensions first" if file.dimensions > 2 else "a cosine needs at least 2",
        )
    return file


def _guess(path: Path) -> str:
    if path.is_dir():
        return "bergson"
    kind = {".npy": "numpy", ".parquet": "parquet"}.get(path.suffix.lower())
    if kind is None:
        raise InputError(
            f"`{path}` is neither .npy nor .parquet nor a folder", "give its kind with `--kind numpy|parquet|bergson`"
        )
    return kind


def _lines(path: Path) -> list[str]:
    """Read ids from a text file, one per line."""
    if not is_file(path):
        raise InputError(f"there is no file `{path}`", "`--ids` is a text file with one sample_id per line")
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
        return [line.removesuffix("\r") for line in lines if line.strip()]
    except (UnicodeDecodeError, OSError) as error:
        raise InputError(f"`{path}` can't be read as text: {error}", "save it as UTF-8") from error


def _checked_ids(path: Path, n: int, ids: list[str] | None, fault: str) -> list[str]:
    """Return the ids if there is one for each of n rows; `fault` describes missing ids."""
    if ids is None:
        raise InputError(
            f"`{path}` {fault}", "name the samples with `--ids FILE`, one sample_id per line in the rows' order"
        )
    if n == 0:
        raise InputError(f"`{path}` holds no vectors", "check the file")
    if len(ids) != n:
        raise InputError(f"{len(ids)} ids for the {n} rows of `{path}`", "give one id per row, in the same order")
    return ids


def _rows_per_block(dimensions: int) -> int:
    return max(1, min(ROWS_PER_BATCH, _BLOCK_BYTES // (8 * max(1, dimensions))))


def _blocks(
    array_ND: np.memmap[Any, Any],
    mask: np.ndarray[Any, Any],
    facts: Callable[[int, int], list[dict[str, Any]]] = lambda start, end: [{}] * (end - start),
) -> Iterator[Block]:
    """Cut a memory-mapped array into blocks; bfloat16, stored as uint16, becomes float32.

    Contiguous rows are read from the file instead: mapped pages would count as this process's memory.
    """
    n, dimensions = array_ND.shape
    step, size, number = _rows_per_block(dimensions), dimensions * array_ND.itemsize, array_ND.dtype
    for start in range(0, n, step):
        if mask[start : start + step].any():
            if array_ND.flags.c_contiguous:
                end, offset = min(start + step, n), array_ND.offset + start * size
                flat = np.fromfile(str(array_ND.filename), number, (end - start) * dimensions, offset=offset)
                rows = flat.reshape(-1, dimensions)
            else:
                rows = np.asarray(array_ND[start : start + step])
            if rows.dtype == np.uint16:
                rows = (rows.astype(np.uint32) << 16).view(np.float32)
            yield Block(start, rows, facts(start, start + len(rows)))


# --- numpy ---------------------------------------------------------------------------------------------------------


def _numpy(path: Path, ids: list[str] | None) -> VectorFile:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # numpy parses the header as Python literals: any exception type
        raise InputError(f"`{path}` is not a .npy file: {error}", "save a float array with `numpy.save`") from error
    hint = "save one array, (N, D), of float16, float32 or float64"
    if not isinstance(array, np.memmap):
        array.close()
        raise InputError(f"`{path}` holds several arrays", hint)
    if array.ndim != 2 or array.dtype.name not in _FLOATS:
        raise InputError(f"`{path}` holds {array.dtype} of shape {array.shape}", hint)
    names = _checked_ids(path, len(array), ids, "has no ids")
    return VectorFile(path, "numpy", path, names, array.shape[1], array.dtype.name, lambda mask: _blocks(array, mask))


# --- Parquet -------------------------------------------------------------------------------------------------------


def _parquet(path: Path, ids: list[str] | None) -> VectorFile:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        schema, n = file.schema_arrow, file.metadata.num_rows
        kind = schema.field("vector").type if "vector" in schema.names else None
        if kind is None or not _is_vector(kind):
            raise InputError(
                f"`{path}` has no column `vector` of float lists", f"its columns are {', '.join(schema.names)}"
            )
        if ids is None and "sample_id" in schema.names:
            ids = _texts(path, file.read(["sample_id"]).column("sample_id"))
        names = _checked_ids(path, n, ids, "has no column `sample_id`")
        dimensions = kind.list_size if pa.types.is_fixed_size_list(kind) else _first_length(file)
    number = {"halffloat": "float16", "float": "float32", "double": "float64"}[str(kind.value_type)]
    facts = [name for name in FACTS if name in schema.names]
    return VectorFile(
        path, "parquet", path, names, dimensions, number, lambda _: _read_parquet(path, dimensions, facts)
    )


def _is_vector(kind: pa.DataType) -> bool:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return bool(is_list and pa.types.is_floating(kind.value_type))


def _texts(path: Path, column: pa.ChunkedArray) -> list[str]:
    try:
        values = [id_text("sample_id", value) for value in column.to_pylist()]
    except InputError as error:
        raise InputError(f"`{path}`: {error.fact}", "write ids as text or whole numbers") from error
    ids = [name for name in values if name is not None]
    if len(ids) < len(values):
        raise InputError(f"`{path}` has {len(values) - len(ids)} rows without a sample_id", "give each row an id")
    return ids


def _first_length(file: Any) -> int:
    for batch in file.iter_batches(batch_size=1, columns=["vector"]):
        if batch.column(0).null_count == 0:
            return len(batch.column(0)[0])
    return 0


def _read_parquet(path: Path, dimensions: int, columns: list[str]) -> Iterator[Block]:
    from pyarrow import parquet

    start = 0
    types = pa.schema([(name, FACTS[name]) for name in columns])
    try:
        with parquet.ParquetFile(path, pre_buffer=False) as file:
            for batch in file.iter_batches(batch_size=_rows_per_block(dimensions), columns=["vector", *columns]):
                vectors, faults = _dense(batch.column("vector"), dimensions)
                rows = pa.Table.from_batches([batch.select(columns)]).cast(types).to_pylist() or [{}] * len(batch)
                facts = [{name: value for name, value in row.items() if value is not None} for row in rows]
                yield Block(start, vectors, facts, faults)
                start += len(batch)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise InputError(
            f"`{path}` can't be read: {error}", "check that the file is complete and its columns have the right types"
        ) from error


def _dense(column: pa.Array, dimensions: int) -> tuple[np.ndarray[Any, Any], dict[int, str]]:
    """Return lists as an array (B, D), and why rows without a list of D numbers are zero."""
    import pyarrow.compute as pc

    lengths = pc.list_value_length(column).to_pylist()
    faults = {
        i: "it has no vector" if n is None else f"its vector has {n} numbers, not {dimensions}"
        for i, n in enumerate(lengths)
        if n != dimensions
    }
    complete = [i for i in range(len(column)) if i not in faults]
    values = pc.list_flatten(column.take(pa.array(complete, pa.int64())))
    if pa.types.is_float16(values.type):
        values = values.cast(pa.float32())
    dense = np.zeros((len(column), dimensions), values.type.to_pandas_dtype())
    dense[complete] = values.to_numpy(zero_copy_only=False).reshape(-1, dimensions)  # nulls become NaN
    return dense, faults


# --- bergson -------------------------------------------------------------------------------------------------------


def _bergson(path: Path, ids: list[str] | None) -> VectorFile:
    """Open an index built by bergson 2.5.

    `info.json` has the number of rows (num_grads), the columns per module (grad_sizes) and the number type
    (base_dtype). `gradients.bin` has the rows with all modules side by side; row i belongs to row i of `data.hf`.
    """
    info = _info(path)
    dimensions, n = sum(info["grad_sizes"].values()), info["num_grads"]
    number = info["base_dtype"]
    stored = np.dtype("uint16" if number == "bfloat16" else number)
    file = path / "gradients.bin"
    if not is_file(file) or file.stat().st_size != n * dimensions * stored.itemsize or not n * dimensions:
        raise InputError(f"`{file}` does not have the {n} rows in info.json", "is the index complete?")
    data = _dataset(path / "data.hf", n)
    column = next((name for name in _ID_COLUMNS if name in data.column_names), None)
    if ids is None and column is not None:
        ids = _texts(path, data.data.column(column))
    fault = f"has no column {' or '.join(f'`{c}`' for c in _ID_COLUMNS)} in its dataset"
    names = _checked_ids(path, n, ids, f"{fault} (`bergson build --nodrop_columns` keeps them)")
    array = np.memmap(file, dtype=stored, mode="r", shape=(n, dimensions))
    facts = {"length": "n_tokens"} | ({"loss": "loss"} if _is_mean(path) else {})
    columns = data.select_columns([name for name in facts if name in data.column_names])

    def rows(start: int, end: int) -> list[dict[str, Any]]:
        return [{facts[key]: value for key, value in columns[i].items()} for i in range(start, end)]

    return VectorFile(path, "bergson", file, names, dimensions, number, lambda mask: _blocks(array, mask, rows))


def _info(path: Path) -> dict[str, Any]:
    file = path / "info.json"
    if not is_file(file):
        raise InputError(
            f"`{path}` is not a bergson index: it has no info.json", "give the output folder of `bergson build`"
        )
    try:
        info = json.loads(file.read_text(encoding="utf-8"))
        is_valid = int(info["num_grads"]) >= 0 and info["base_dtype"] in (*_FLOATS, "bfloat16")
        sizes = [info["num_grads"], *info["grad_sizes"].values()]
        is_valid = is_valid and all(isinstance(size, int) and size >= 0 for size in sizes) and 0 not in sizes[1:]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"`{file}` is not in the format of bergson 2.5: {error!r}", _REBUILD) from error
    if not is_valid:
        raise InputError(f"`{file}` is not in the format of bergson 2.5", _REBUILD)
    if info.get("attribute_tokens"):
        raise InputError(f"`{path}` has a gradient per token", "build it without `--attribute_tokens`")
    return dict(info)


def _dataset(path: Path, n: int) -> Any:
    import datasets

    try:
        data = datasets.load_from_disk(str(path))
    except Exception as error:  # datasets raises many exception types
        raise InputError(f"`{path}` can't be read as a dataset: {error}", "is the index complete?") from error
    if not isinstance(data, datasets.Dataset) or len(data) != n or "query_index" in data.column_names:
        raise InputError(
            f"`{path}` does not have one row for each of the {n} gradients",
            "build the index with `--aggregation none`",
        )
    return data


def _is_mean(path: Path) -> bool:
    """Tell whether the index's losses are means over tokens, like ours; bergson's default is sums."""
    config = path / "config.yaml"
    text = config.read_text(encoding="utf-8") if is_file(config) else ""
    return re.findall(r"^\s*loss_reduction:\s*(\w+)\s*$", text, re.MULTILINE) == ["mean"]


_OPENERS: dict[str, Callable[[Path, list[str] | None], VectorFile]] = {
    "numpy": _numpy,
    "parquet": _parquet,
    "bergson": _bergson,
}
