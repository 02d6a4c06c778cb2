"""What a source is read from: paths, patterns, standard input, hub names, or Python objects."""

from __future__ import annotations

import glob
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from lark_store.errors import InputError
from lark_store.readers import files_of, is_data_file, path_kind, read_file, read_rows
from lark_store.readers.objects import EXAMPLE, describe, rows_of_object

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lark_store.readers.base import Row

SourceData: TypeAlias = Any  # a path, paths, or an object with rows
STDIN = "-"
_MOST_NAMED = 4


@dataclass(frozen=True)
class ReadOptions:
    """How to read: a dataset's configuration and split, and the format of a file without a known ending."""

    config: str | None = None
    split: str | None = None
    form: str | None = None


@dataclass(frozen=True)
class Input:
    """The rows of a source. `uri` says what they come from; `parts` yields (place, rows) of each file, once."""

    uri: str
    parts: Iterator[tuple[str, Iterator[Row]]]


def open_input(data: SourceData, options: ReadOptions) -> Input:
    """Return what a source is read from; rows are read when they are asked for.

    Raises
    ------
    InputError
        A pattern matches no file, or an object holds no rows.
    """
    paths = _paths(data)
    if paths is None:
        if (options.config, options.split, options.form) != (None, None, None):
            raise InputError(f"`{describe(data)}` has no configuration, split or file format", "omit these options")
        uri = describe(data)
        return Input(uri, iter([(uri, rows_of_object(data))]))
    matching = [path for given in paths for path in _matching(given)]
    if matching.count(STDIN) > 1:
        raise InputError("standard input (`-`) is given twice", "give it once")
    is_split = options.config is not None or options.split is not None
    files = matching if is_split else [file for path in matching for file in _inside(path)]
    return Input(_names(matching), ((file, _rows(file, options)) for file in files))


def _paths(data: Any) -> list[str] | None:
    """Return the paths in an argument; None if it is no path, or a list of something else."""
    items = data if isinstance(data, list | tuple) else [data]
    if not items or not all(isinstance(item, str | os.PathLike) for item in items):
        return None
    paths = [os.fspath(item) for item in items]
    if isinstance(data, list | tuple) and not any(map(_is_path, items)) and any(" " in str(item) for item in items):
        raise InputError("a list of texts is not a list of rows", f"give a list of dicts, {EXAMPLE}")
    for path in paths:
        try:
            path.encode()
        except (UnicodeEncodeError, AttributeError) as error:
            raise InputError(f"the path {path!r} is not UTF-8", "rename the file") from error
    return paths


def _is_path(item: object) -> bool:
    path = Path(os.fspath(item))  # type: ignore[call-overload]
    return path_kind(path) is not None or is_data_file(path) or glob.has_magic(str(path))


def _matching(given: str) -> list[str]:
    """Return the files that a pattern matches, sorted, or the path itself if it exists or is no pattern."""
    if not glob.has_magic(given) or path_kind(Path(given)) is not None:
        return [given]
    matches = sorted(glob.glob(str(Path(given).expanduser()), recursive=True))  # noqa: PTH207  # absolute patterns too
    if not matches:
        raise InputError(f"no file matches `{given}`", "check the pattern; `**` also matches inner folders")
    return matches


def _inside(path: str) -> list[str]:
    """Return the data files of a folder without splits; else the path."""
    files = files_of(Path(path)) if path_kind(Path(path)) == "folder" and not is_data_file(Path(path)) else []
    return [str(file) for file in files] or [path]


def _names(paths: list[str]) -> str:
    named = [path if path != STDIN else "stdin" for path in paths]
    if len(named) <= _MOST_NAMED:
        return ", ".join(named)
    return f"{', '.join(named[:_MOST_NAMED])}, … ({len(named)} files)"


def _rows(path: str, options: ReadOptions) -> Iterator[Row]:
    if path == STDIN:
        return _rows_of_stdin(options)
    return read_rows(path, options.config, options.split, options.form)


def _rows_of_stdin(options: ReadOptions) -> Iterator[Row]:
    """Copy standard input to a temporary file, which a reader may read in any order, and yield its rows."""
    if options.config is not None or options.split is not None:
        raise InputError("standard input has no configurations or splits", "omit `--config` and `--split`")
    with tempfile.TemporaryDirectory(prefix="lark-store-") as folder:
        copy = Path(folder) / f"stdin.{(options.form or 'jsonl').removeprefix('.')}"
        with copy.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
        try:
            yield from read_file(copy)
        except InputError as error:
            raise InputError(error.fact.replace(str(copy), "stdin"), error.hint) from error
