"""Read rows, as dicts of columns, from files, folders, Hugging Face datasets and Python objects.

To add a file format, write its reader in a module of its own and list it in `READERS`. `fields` has the texts and
the id of a row, `inputs` what a source is read from.
"""

from __future__ import annotations

import csv
import re
import stat
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lark_store.core.text import joined
from lark_store.errors import InputError
from lark_store.readers.arrow import read_arrow
from lark_store.readers.base import COMPRESSIONS, Row, compression_of, format_of
from lark_store.readers.dataset import read_dataset
from lark_store.readers.delimited import read_csv, read_tsv
from lark_store.readers.json_list import read_json
from lark_store.readers.jsonl import read_jsonl
from lark_store.readers.parquet import read_parquet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["READERS", "Row", "extensions", "files_of", "is_data_file", "path_kind", "read_file", "read_rows"]

READERS: dict[str, Callable[[Path], Iterator[Row]]] = {  # by extension
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".feather": read_arrow,
    ".csv": read_csv,
    ".tsv": read_tsv,
}
_COMPRESSED = {
    b"\x1f\x8b": ("compressed with gzip", ".gz"),
    b"PK\x03\x04": ("a zip archive", ""),
    b"\x28\xb5\x2f\xfd": ("compressed with zstd", ".zst"),
    b"BZh": ("compressed with bzip2", ""),
    b"\xfd7zXZ": ("compressed with xz", ""),
}
_HUB_NAME = re.compile(r"((?P<organisation>[\w.-]{1,96})/)?[\w.-]{1,96}", re.ASCII)
# The splits of a folder, as `datasets` recognises them in the names of files.
_SPLITS = {"train": "train|training", "validation": "validation|valid|val|dev", "test": "test|testing|eval|evaluation"}


def is_data_file(path: Path) -> bool:
    """Tell by its name whether a file has rows that a reader knows."""
    return format_of(path) in READERS


def read_file(path: Path, form: str | None = None) -> Iterator[Row]:
    """Stream the rows of a file, whose format is `form` or else follows from its name.

    Raises
    ------
    InputError
    """
    reader = READERS.get(format_of(path) if form is None else f".{form.removeprefix('.').lower()}")
    if reader is None and form is not None:
        raise InputError(
            f"unknown format `{form}`", f"the formats are {', '.join(e.removeprefix('.') for e in READERS)}"
        )
    if reader is None:
        raise InputError(
            f"`{path}` has an unknown file format",
            f"use {', '.join(READERS)} or a dataset, or name the format with `--input-format`",
        )
    _check_not_compressed(path)
    from pyarrow import ArrowException

    # Raised for damaged files, and by Arrow for values outside Python's range (year 60,000).
    broken = (ArrowException, csv.Error, OSError, ValueError, OverflowError, SystemError, RecursionError)
    try:
        yield from reader(path)
    except InputError:
        raise
    except UnicodeDecodeError as error:
        raise InputError(f"`{path}` is not UTF-8", "save it as UTF-8") from error
    except (*broken, EOFError, zlib.error) as error:
        raise InputError(
            f"`{path}` can't be read: {error}", "check that the file is complete and matches its extension"
        ) from error


def _check_not_compressed(path: Path) -> None:
    """Refuse compressed files with another extension. Skips pipes, which can be read only once."""
    if not path.is_file():
        return
    try:
        with path.open("rb") as file:
            head = file.read(8)
    except OSError as error:
        raise InputError(f"`{path}` can't be read: {error.strerror}", "check its permissions") from error
    kind, ending = next((kind for magic, kind in _COMPRESSED.items() if head.startswith(magic)), ("", ""))
    if kind and not (ending and compression_of(path) == ending):
        raise InputError(
            f"`{path}` is {kind}, despite its name",
            f"rename it to `{path.name}{ending}`" if ending else "unpack it first",
        )


def path_kind(path: Path) -> Literal["file", "folder"] | None:
    """Return the kind of a path; None if nothing exists there or the name is invalid."""
    try:
        mode = path.stat().st_mode
    except PermissionError as error:
        raise InputError(f"`{path}` can't be read: {error.strerror}", "check its permissions") from error
    except (OSError, ValueError):
        return None
    return "folder" if stat.S_ISDIR(mode) else "file"


def _check_hub_name(uri: str, *, options: bool) -> None:
    """Refuse wrong paths before asking the Hugging Face hub, which is slow to refuse."""
    if Path(uri).suffix.lower() in {*READERS, *COMPRESSIONS, ".txt"} or uri.startswith(("/", "./", "../", "~")):
        raise InputError(f"there is no file `{uri}`", "check the path")
    name = _HUB_NAME.fullmatch(uri)
    if not name or not (options or (name["organisation"] and not Path(name["organisation"]).is_dir())):
        raise InputError(
            f"there is no file or folder `{uri}`",
            "check the path; hub names look like `org/name`, or need `--config` or `--split`",
        )


def read_rows(uri: str, config: str | None = None, split: str | None = None, form: str | None = None) -> Iterator[Row]:
    """Stream rows of a file, a folder of files, a saved dataset, or a Hugging Face dataset.

    Raises
    ------
    InputError
        The path is wrong, the format unknown, or a row unreadable; the error names the line if known.
    """
    if not uri.strip():
        raise InputError("the path is empty", "give a file, a folder or the name of a Hugging Face dataset")
    path = Path(uri)
    kind = path_kind(path)
    options = config is not None or split is not None
    if kind == "file":
        if options:
            raise InputError(f"`{uri}` is a file, without configurations or splits", "omit `--config` and `--split`")
        yield from read_file(path, form)
        return
    if kind == "folder" and is_data_file(path):
        raise InputError(f"`{uri}` is a folder, not a file", "check the path")
    if kind is None:
        _check_hub_name(uri, options=options)
    files = files_of(path) if kind == "folder" and not options else []
    for file in files:
        yield from read_file(file, form)
    if files:
        return
    yield from read_dataset(uri, config, split)


def files_of(folder: Path) -> list[Path]:
    """Return the data files of a folder without splits and inner folders; none if `datasets` has to sort them out."""
    entries = [entry for entry in sorted(folder.iterdir()) if not entry.name.startswith(".")]
    files = [entry for entry in entries if is_data_file(entry) and entry.is_file()]
    is_saved = any(entry.name in {"state.json", "dataset_dict.json"} for entry in entries)
    if is_saved or any(entry.is_dir() for entry in entries):
        return []
    splits = {_split_of(file.name) for file in files}
    return files if len(splits) == 1 else []


def _split_of(name: str) -> str | None:
    """Return the split that a file's name names."""
    for split, words in _SPLITS.items():
        if re.search(rf"(?<![a-z])({words})(?![a-z])", name.lower()):
            return split
    return None


def extensions() -> str:
    """Return the extensions of all file formats in a sentence."""
    return f"{joined(READERS, 'or')}, also with {joined(COMPRESSIONS, 'or')}"
