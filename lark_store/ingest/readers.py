"""Files, folders and Hugging Face datasets to rows: each row a dict of columns."""

from __future__ import annotations

import csv
import io
import json
import re
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa

from lark_store.errors import InputError
from lark_store.schema.vectors import ROWS_PER_TEXT_BATCH

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Row = dict[str, Any]
_BATCH_BYTES = 64 << 20
_PACKED = {
    b"\x1f\x8b": "compressed with gzip",
    b"PK\x03\x04": "a zip archive",
    b"\x28\xb5\x2f\xfd": "compressed with zstd",
    b"BZh": "compressed with bzip2",
    b"\xfd7zXZ": "compressed with xz",
}
# What Arrow raises on damaged files, and on values that Python has no type for (a year of 60,000).
_BROKEN = (pa.ArrowException, csv.Error, OSError, ValueError, OverflowError, SystemError, RecursionError)
_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")
_HUB_NAME = re.compile(r"((?P<organisation>[\w.-]{1,96})/)?[\w.-]{1,96}", re.ASCII)


# --- files ---------------------------------------------------------------------------------------------------------


def _lines(path: Path) -> Iterator[str]:
    """Decode a file line by line: the error of a file opened as text counts bytes from the last chunk it read."""
    at = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                raise InputError(
                    f"`{path}` is not UTF-8: line {number}, byte {at + error.start + 1} of the file ({error.reason})",
                    "save it as UTF-8",
                ) from error
            at += len(line)
            # the csv module wants each line with its own end, which may be "\r" alone
            yield from io.StringIO(text.removeprefix("\ufeff") if number == 1 else text, newline="")


def _read_jsonl(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            yield _json_object(line, f"`{path}`, line {number},")


def _json_object(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
        if _HALF_PAIR.search(line):
            json.dumps(row, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise InputError(
            f"{where} is not JSON: {error.msg} at column {error.colno}",
            "each line of a .jsonl file is one JSON object",
        ) from error
    except UnicodeEncodeError as error:
        raise InputError(
            rf"{where} holds `\u{ord(error.object[error.start]):04x}`, half of a surrogate pair, which is no text",
            r"write both halves, for example `\ud83d\ude42`, or leave it out",
        ) from error
    except RecursionError as error:
        raise InputError(f"{where} is nested too deeply", "leave that part out, or write it as a string") from error
    except ValueError as error:  # Python's guard against numbers that take long to convert
        raise InputError(
            f"{where} holds an integer of more than {sys.get_int_max_str_digits()} digits", "write it as a string"
        ) from error
    if not isinstance(row, dict):
        raise InputError(f"{where} is not a JSON object", 'for example {"text": "…"}')
    return row


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        _check_columns(path, file.schema_arrow.names)
        n = file.metadata.num_rows
        size = sum(file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups))
        rows = min(ROWS_PER_TEXT_BATCH, max(1, _BATCH_BYTES * n // max(1, size)))
        for batch in file.iter_batches(batch_size=rows):
            yield from batch.to_pylist()


def _check_columns(path: Path, names: list[str]) -> None:
    """Refuse columns of one name: a row would silently have the last of them."""
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"`{path}` has two columns named `{twice}`", "give each column a name of its own")


def _read_csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(1 << 30)
    # strict: a quote that is never closed would swallow all rows after it
    rows = csv.DictReader(_lines(path), delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
    _check_columns(path, list(rows.fieldnames or []))
    for row in rows:
        if None in row:
            raise InputError(
                f"`{path}`: the row that ends at line {rows.line_num} has more cells than the header has columns",
                'put a cell that holds the delimiter in quotes: "…"',
            )
        yield row


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".tsv": _read_csv,
}


def _read_file(path: Path) -> Iterator[Row]:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"`{path}` has an unknown format", f"known are {', '.join(READERS)} and datasets")
    _check_not_packed(path)
    try:
        yield from reader(path)
    except InputError:
        raise
    except UnicodeDecodeError as error:
        raise InputError(f"`{path}` can't be read: it holds text that is not UTF-8", "save it as UTF-8") from error
    except _BROKEN as error:
        raise InputError(
            f"`{path}` can't be read: {error}", "is the file whole, and of the format its name says?"
        ) from error


def _check_not_packed(path: Path) -> None:
    """Refuse what is compressed under another name; a pipe can be read once only."""
    if not path.is_file():
        return
    try:
        with path.open("rb") as file:
            head = file.read(8)
    except OSError as error:
        raise InputError(f"`{path}` can't be read: {error.strerror}", "check its permissions") from error
    kind = next((kind for magic, kind in _PACKED.items() if head.startswith(magic)), None)
    if kind is not None:
        raise InputError(f"`{path}` is {kind}, not what its name says", "unpack it first")


# --- datasets ------------------------------------------------------------------------------------------------------


def _read_dataset(name: str, config: str | None, split: str | None) -> Iterator[Row]:
    import datasets

    saved = any((Path(name) / file).is_file() for file in ("state.json", "dataset_dict.json"))
    try:
        data = datasets.load_from_disk(name) if saved else datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the library raises many kinds: no network, no such name, no such config
        fact = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"`{name}` can't be read as a dataset: {fact}",
            "give a file (.jsonl, .parquet, .csv), a folder made by `save_to_disk`, or a Hugging Face name with "
            "`--config` and `--split`",
        ) from error
    if saved:
        data = _chosen(name, data, config, split)
    if not isinstance(data, datasets.Dataset):
        raise InputError(f"`{name}` has splits {_quoted(data)}", "choose one with `--split`")
    _check_columns(Path(name), data.column_names)
    try:
        yield from data
    except Exception as error:  # damaged files, values that Python has no type for, images that can't be decoded, …
        raise InputError(f"`{name}` can't be read as a dataset: {error}", "is it whole?") from error


def _chosen(name: str, data: Any, config: str | None, split: str | None) -> Any:
    """Return the split of a saved dataset that was asked for, or `data` as it is."""
    if config is not None:
        raise InputError(f"`{name}` is a saved dataset, without configurations", "leave out `--config`")
    if split is None:
        return data
    if not isinstance(data, dict):
        raise InputError(f"`{name}` has no splits, so no `{split}`", "leave out `--split`")
    if split not in data:
        raise InputError(f"`{name}` has no split `{split}`; it has {_quoted(data)}", "choose one with `--split`")
    return data[split]


def _quoted(names: Any) -> str:
    return ", ".join(f"`{name}`" for name in names)


# --- which of them -------------------------------------------------------------------------------------------------


def _what_is_at(path: Path) -> Literal["file", "folder"] | None:
    """Look at a path; None where nothing can be there, also for names that `Path.exists` raises an error for."""
    try:
        mode = path.stat().st_mode
    except PermissionError as error:
        raise InputError(f"`{path}` can't be read: {error.strerror}", "check its permissions") from error
    except (OSError, ValueError):
        return None
    return "folder" if stat.S_ISDIR(mode) else "file"


def _check_hub_name(uri: str, *, options: bool) -> None:
    """Refuse what is a wrong path rather than a name of the Hugging Face hub, which is slow to say no."""
    if Path(uri).suffix.lower() in {*READERS, ".json", ".txt", ".gz"} or uri.startswith(("/", "./", "../", "~")):
        raise InputError(f"there is no file `{uri}`", "check the path")
    name = _HUB_NAME.fullmatch(uri)
    if not name or not (options or (name["organisation"] and not Path(name["organisation"]).is_dir())):
        raise InputError(
            f"there is no file or folder `{uri}`",
            "check the path; hub names look like `org/name`, and others are tried with `--config` or `--split` only",
        )


def read_rows(uri: str, config: str | None = None, split: str | None = None) -> Iterator[Row]:
    """Stream the rows of a .jsonl, .parquet, .csv or .tsv file, a folder, or a Hugging Face dataset.

    Raises
    ------
    InputError
        The path is wrong, the format unknown, or a row can't be read; it names the line where it can.
    """
    if not uri.strip():
        raise InputError("the path is empty", "give a file, a folder or the name of a Hugging Face dataset")
    path = Path(uri)
    there = _what_is_at(path)
    options = config is not None or split is not None
    if there == "file":
        if options:
            raise InputError(f"`{uri}` is a file, without configurations or splits", "leave out `--config`, `--split`")
        yield from _read_file(path)
        return
    if there == "folder" and path.suffix.lower() in READERS:
        raise InputError(f"there is no file `{uri}`: it is a folder", "check the path")
    if there is None:
        _check_hub_name(uri, options=options)
    yield from _read_dataset(uri, config, split)
