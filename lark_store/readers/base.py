"""Shared by the readers of rows: bytes of compressed files, lines, columns."""

from __future__ import annotations

import gzip
import io
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from lark_store.core.arrow import skip_pandas
from lark_store.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pyarrow as pa

Row = dict[str, Any]  # a row's values by column
COMPRESSIONS = (".gz", ".zst")
_BUFFER = 1 << 20


class StructRow(dict[str, Any]):
    """A row of a columnar file: its structs have all keys of their type, null where a value has none."""


def rows_of_batch(batch: pa.RecordBatch) -> Iterator[StructRow]:
    """Yield the rows of a batch of Arrow."""
    return map(StructRow, batch.to_pylist())


# --- bytes ---------------------------------------------------------------------------------------------------------


def compression_of(path: Path) -> str:
    """Return the ending of a compressed file: `.gz`, `.zst`, or an empty text.

    >>> compression_of(Path("rows.jsonl.GZ")), compression_of(Path("rows.jsonl"))
    ('.gz', '')
    """
    ending = path.suffix.lower()
    return ending if ending in COMPRESSIONS else ""


def format_of(path: Path) -> str:
    """Return the ending that names a file's format, also of a compressed file.

    >>> format_of(Path("rows.JSONL.gz")), format_of(Path("rows"))
    ('.jsonl', '')
    """
    return (Path(path.stem) if compression_of(path) else path).suffix.lower()


def open_bytes(path: Path) -> IO[bytes]:
    """Open a file, unpacked if its name ends in `.gz` or `.zst`."""
    compression = compression_of(path)
    if not compression:
        return path.open("rb")
    if compression == ".gz":
        return cast("IO[bytes]", gzip.open(path, "rb"))
    skip_pandas()
    import pyarrow as pa

    return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"), _BUFFER)


@contextmanager
def seekable(path: Path) -> Iterator[Path]:
    """Yield the path of a file that can be read in any order: the file, or an unpacked copy for the meantime."""
    if not compression_of(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="lark-store-") as folder, open_bytes(path) as packed:
        copy = Path(folder) / path.stem
        with copy.open("wb") as file:
            shutil.copyfileobj(packed, file, _BUFFER)
        yield copy


# --- text ----------------------------------------------------------------------------------------------------------


def decoded_lines(path: Path) -> Iterator[str]:
    """Decode a file line by line, to report exact byte positions of errors."""
    offset = 0
    with open_bytes(path) as lines:
        for number, line in enumerate(lines, start=1):
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                raise InputError(
                    f"`{path}` is not UTF-8: line {number}, byte {offset + error.start + 1} of the file "
                    f"({error.reason})",
                    "save it as UTF-8",
                ) from error
            offset += len(line)
            # the csv module needs line ends, which may be "\r" alone
            yield from io.StringIO(text.removeprefix("\ufeff") if number == 1 else text, newline="")


def check_columns(path: Path, names: list[str]) -> None:
    """Refuse repeated column names, of which a row would keep the last."""
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"`{path}` has two columns named `{twice}`", "give each column a unique name")
