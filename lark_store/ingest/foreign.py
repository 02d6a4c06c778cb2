"""Vectors that were made elsewhere, as files hold them: .npy, Parquet, bergson's index folders.

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

from lark_store.errors import InputError
from lark_store.schema.hashes import file_hash
from lark_store.schema.paths import exists, is_file
from lark_store.schema.vectors import ROWS_PER_BATCH

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

KINDS = ("auto", "numpy", "parquet", "bergson")
MOST_DIMENSIONS = 1 << 22
FACTS = {"grad_norm": pa.float64(), "loss": pa.float32(), "n_tokens": pa.int32(), "n_loss_tokens": pa.int32()}
_FLOATS = ("float16", "float32", "float64")
_BLOCK_BYTES = 64 << 20
_ID_COLUMNS = ("sample_id", "id")  # in a bergson index's dataset


@dataclass(frozen=True)
class Block:
    """Some rows of a file, from row `start` on.

    `vectors` (B, D) floats; `facts` hold what else is known of each row, `faults` why a row has no vector.
    """

    start: int
    vectors: np.ndarray[Any, Any]
    facts: list[dict[str, Any]]
    faults: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Foreign:
    """A file of vectors: `ids` (N) in its order, the file `held` that has the numbers, and what reads it.

    `read` takes which rows are wanted, (N,) bool, and yields at least the blocks that hold some.
    """

    path: Path
    kind: str
    held: Path
    ids: list[str]
    dimensions: int
    number: str
    read: Callable[[np.ndarray[Any, Any]], Iterator[Block]]

    @cached_property
    def sha256(self) -> str:
        """The hash of the file that has the numbers."""
        return file_hash(self.held)


def open_foreign(path: Path, kind: str, ids: Path | None) -> Foreign:
    """Open a file of vectors and read its ids; the vectors are read later.

    Raises
    ------
    InputError
        There is no such file, it is not of its kind or not whole, or it has no ids.
    """
    if kind not in KINDS:
        raise InputError(f"`{kind}` is no kind of file", f"the kinds are {', '.join(f'`{k}`' for k in KINDS)}")
    if not exists(path):
        raise InputError(f"there is no file `{path}`", "check the path")
    names = None if ids is None else _lines(ids)
    try:
        foreign = _OPENERS[_guess(path) if kind == "auto" else kind](path, names)
    except InputError:
        raise
    except (OSError, ValueError, pa.ArrowException) as error:
        raise InputError(f"`{path}` can't be read: {error}", "is the file whole, and of its kind?") from error
    if not 2 <= foreign.dimensions <= MOST_DIMENSIONS:
        raise InputError(
            f"`{path}` has vectors of {foreign.dimensions:,} dimensions, not from 2 to {MOST_DIMENSIONS:,}",
            "project them to fewer first" if foreign.dimensions > 2 else "a cosine of fewer says nothing",
        )
    return foreign


def _guess(path: Path) -> str:
    if path.is_dir():
        return "bergson"
    kind = {".npy": "numpy", ".parquet": "parquet"}.get(path.suffix.lower())
    if kind is None:
        raise InputError(
            f"`{path}` is neither .npy nor .parquet nor a folder", "say what it is with `--kind numpy|parquet|bergson`"
        )
    return kind


def _lines(path: Path) -> list[str]:
    """Read the ids of a text file, one a line."""
    if not is_file(path):
        raise InputError(f"there is no file `{path}`", "`--ids` is a text file with one sample_id per line")
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except (UnicodeDecodeError, OSError) as error:
        raise InputError(f"`{path}` can't be read as text: {error}", "save it as UTF-8") from error


def _counted(path: Path, n: int, ids: list[str] | None, where: str) -> list[str]:
    """Return the ids if there is one for each of n rows."""
    if ids is None:
        raise InputError(
            f"`{path}` {where}", "name the samples with `--ids FILE`, one sample_id per line in the rows' order"
        )
    if n == 0:
        raise InputError(f"`{path}` holds no vectors", "check the file")
    if len(ids) != n:
        raise InputError(f"{len(ids)} ids for the {n} rows of `{path}`", "give one for each row, in the same order")
    return ids


def _rows_per_block(dimensions: int) -> int:
    return max(1, min(ROWS_PER_BATCH, _BLOCK_BYTES // (8 * max(1, dimensions))))


def _blocks(
    array_ND: np.memmap[Any, Any],
    wanted: np.ndarray[Any, Any],
    facts: Callable[[int, int], list[dict[str, Any]]] = lambda start, end: [{}] * (end - start),
) -> Iterator[Block]:
    """Cut a memory-mapped array into blocks; numbers that numpy lacks (bfloat16, as uint16) become float32.

    Rows that lie together are read from the file: pages that are mapped count as this process's memory.
    """
    n, dimensions = array_ND.shape
    step, size, number = _rows_per_block(dimensions), dimensions * array_ND.itemsize, array_ND.dtype
    for start in range(0, n, step):
        if wanted[start : start + step].any():
            if array_ND.flags.c_contiguous:
                end, at = min(start + step, n), array_ND.offset + start * size
                flat = np.fromfile(str(array_ND.filename), number, (end - start) * dimensions, offset=at)
                rows = flat.reshape(-1, dimensions)
            else:
                rows = np.asarray(array_ND[start : start + step])
            if rows.dtype == np.uint16:
                rows = (rows.astype(np.uint32) << 16).view(np.float32)
            yield Block(start, rows, facts(start, start + len(rows)))


# --- numpy ---------------------------------------------------------------------------------------------------------


def _numpy(path: Path, ids: list[str] | None) -> Foreign:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # numpy reads the header as Python's literals: it may fail in any way
        raise InputError(f"`{path}` is no .npy file: {error}", "save an array of floats with `numpy.save`") from error
    wanted = "save one array, (N, D), of float16, float32 or float64"
    if not isinstance(array, np.memmap):
        array.close()
        raise InputError(f"`{path}` holds several arrays", wanted)
    if array.ndim != 2 or array.dtype.name not in _FLOATS:
        raise InputError(f"`{path}` holds {array.dtype} of shape {array.shape}", wanted)
    names = _counted(path, len(array), ids, "holds no ids")
    return Foreign(path, "numpy", path, names, array.shape[1], array.dtype.name, lambda some: _blocks(array, some))


# --- Parquet -------------------------------------------------------------------------------------------------------


def _parquet(path: Path, ids: list[str] | None) -> Foreign:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        schema, n = file.schema_arrow, file.metadata.num_rows
        kind = schema.field("vector").type if "vector" in schema.names else None
        if kind is None or not _is_vector(kind):
            raise InputError(
                f"`{path}` has no column `vector` of lists of floats", f"its columns are {', '.join(schema.names)}"
            )
        if ids is None and "sample_id" in schema.names:
            ids = _texts(path, file.read(["sample_id"]).column("sample_id"))
        names = _counted(path, n, ids, "has no column `sample_id`")
        dimensions = kind.list_size if pa.types.is_fixed_size_list(kind) else _first_length(file)
    number = {"halffloat": "float16", "float": "float32", "double": "float64"}[str(kind.value_type)]
    known = [name for name in FACTS if name in schema.names]
    return Foreign(path, "parquet", path, names, dimensions, number, lambda _: _read_parquet(path, dimensions, known))


def _is_vector(kind: pa.DataType) -> bool:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return bool(is_list and pa.types.is_floating(kind.value_type))


def _texts(path: Path, column: pa.ChunkedArray) -> list[str]:
    if column.null_count:
        raise InputError(f"`{path}` has {column.null_count} rows without a sample_id", "give each row its id")
    return [str(value).strip() for value in column.to_pylist()]


def _first_length(file: Any) -> int:
    for batch in file.iter_batches(batch_size=1, columns=["vector"]):
        if batch.column(0).null_count == 0:
            return len(batch.column(0)[0])
    return 0


def _read_parquet(path: Path, dimensions: int, known: list[str]) -> Iterator[Block]:
    from pyarrow import parquet

    start = 0
    types = pa.schema([(name, FACTS[name]) for name in known])
    try:
        with parquet.ParquetFile(path, pre_buffer=False) as file:
            for batch in file.iter_batches(batch_size=_rows_per_block(dimensions), columns=["vector", *known]):
                vectors, faults = _dense(batch.column("vector"), dimensions)
                rows = pa.Table.from_batches([batch.select(known)]).cast(types).to_pylist() or [{}] * len(batch)
                facts = [{name: value for name, value in row.items() if value is not None} for row in rows]
                yield Block(start, vectors, facts, faults)
                start += len(batch)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise InputError(
            f"`{path}` can't be read: {error}", "is the file whole, and are its columns what their names say?"
        ) from error


def _dense(column: pa.Array, dimensions: int) -> tuple[np.ndarray[Any, Any], dict[int, str]]:
    """Return lists as an array (B, D), zero where there is none of this length, and the reasons of those rows."""
    import pyarrow.compute as pc

    lengths = pc.list_value_length(column).to_pylist()
    faults = {
        i: "it has no vector" if n is None else f"its vector has {n} numbers, not {dimensions}"
        for i, n in enumerate(lengths)
        if n != dimensions
    }
    whole = [i for i in range(len(column)) if i not in faults]
    values = pc.list_flatten(column.take(pa.array(whole, pa.int64())))
    if pa.types.is_float16(values.type):
        values = values.cast(pa.float32())
    dense = np.zeros((len(column), dimensions), values.type.to_pandas_dtype())
    dense[whole] = values.to_numpy(zero_copy_only=False).reshape(-1, dimensions)  # a null among them is NaN
    return dense, faults


# --- bergson -------------------------------------------------------------------------------------------------------


def _bergson(path: Path, ids: list[str] | None) -> Foreign:
    """Open an index as bergson 2.5 builds it.

    `info.json` has the number of rows (num_grads), the columns of each module (grad_sizes) and the number type
    (base_dtype); `gradients.bin` the rows, module beside module; `data.hf` the data set, whose row i has gradient i.
    """
    info = _info(path)
    dimensions, n = sum(info["grad_sizes"].values()), info["num_grads"]
    number = info["base_dtype"]
    stored = np.dtype("uint16" if number == "bfloat16" else number)
    file = path / "gradients.bin"
    if not is_file(file) or file.stat().st_size != n * dimensions * stored.itemsize or not n * dimensions:
        raise InputError(f"`{file}` has not the {n} rows that info.json says", "is the index whole?")
    data = _dataset(path / "data.hf", n)
    column = next((name for name in _ID_COLUMNS if name in data.column_names), None)
    if ids is None and column is not None:
        ids = _texts(path, data.data.column(column))
    where = f"has no column {' or '.join(f'`{c}`' for c in _ID_COLUMNS)} in its dataset"
    names = _counted(path, n, ids, f"{where} (`bergson build --nodrop_columns` keeps them)")
    array = np.memmap(file, dtype=stored, mode="r", shape=(n, dimensions))
    facts = {"length": "n_tokens"} | ({"loss": "loss"} if _is_mean(path) else {})
    known = data.select_columns([name for name in facts if name in data.column_names])

    def rows(start: int, end: int) -> list[dict[str, Any]]:
        return [{facts[key]: value for key, value in known[i].items()} for i in range(start, end)]

    return Foreign(path, "bergson", file, names, dimensions, number, lambda some: _blocks(array, some, rows))


def _info(path: Path) -> dict[str, Any]:
    file = path / "info.json"
    if not is_file(file):
        raise InputError(
            f"`{path}` is no index of bergson's: it has no info.json", "give the folder of `bergson build`"
        )
    try:
        info = json.loads(file.read_text(encoding="utf-8"))
        known = int(info["num_grads"]) >= 0 and info["base_dtype"] in (*_FLOATS, "bfloat16")
        sizes = [info["num_grads"], *info["grad_sizes"].values()]
        known = known and all(isinstance(size, int) and size >= 0 for size in sizes) and 0 not in sizes[1:]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"`{file}` is not as bergson 2.5 writes it: {error!r}", "build the index with it") from error
    if not known:
        raise InputError(f"`{file}` is not as bergson 2.5 writes it", "build the index with it")
    if info.get("attribute_tokens"):
        raise InputError(f"`{path}` has a gradient per token", "build it without `--attribute_tokens`")
    return dict(info)


def _dataset(path: Path, n: int) -> Any:
    import datasets

    try:
        data = datasets.load_from_disk(str(path))
    except Exception as error:  # the library raises many kinds
        raise InputError(f"`{path}` can't be read as a dataset: {error}", "is the index whole?") from error
    if not isinstance(data, datasets.Dataset) or len(data) != n or "query_index" in data.column_names:
        raise InputError(
            f"`{path}` has not one row for each of the {n} gradients", "build the index with `--aggregation none`"
        )
    return data


def _is_mean(path: Path) -> bool:
    """Tell whether the index's losses are means over tokens, as ours are; bergson's default is the sum."""
    config = path / "config.yaml"
    text = config.read_text(encoding="utf-8") if is_file(config) else ""
    return re.findall(r"^\s*loss_reduction:\s*(\w+)\s*$", text, re.MULTILINE) == ["mean"]


_OPENERS: dict[str, Callable[[Path, list[str] | None], Foreign]] = {
    "numpy": _numpy,
    "parquet": _parquet,
    "bergson": _bergson,
}
