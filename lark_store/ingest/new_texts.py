"""Read new queries from a file or from stdin."""

from __future__ import annotations

import sys
from pathlib import Path

from lark_store.errors import InputError
from lark_store.readers import READERS, read_rows
from lark_store.readers.jsonl import parse_line
from lark_store.results import NewText

STDIN = Path("-")


def new_texts(path: Path) -> list[NewText]:
    """Return the queries in a file: each row of a data file, or any other file's whole text.

    With the path `-` they are read from stdin: JSON lines with the columns of a source, or one text per line.

    Raises
    ------
    InputError
        There is none, or a row is unreadable.
    """
    if path == STDIN:
        texts = _from_stdin()
    elif path.suffix.lower() in READERS and path.is_file():
        texts = [NewText(row=row) for row in read_rows(str(path), None, None)]
    else:
        texts = [NewText(file=path)]
    if not texts:
        raise InputError(f"`{path}` has no rows" if path != STDIN else "stdin has no query", "each row is a query")
    return texts


def _from_stdin() -> list[NewText]:
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"stdin can't be read as text: {error}", "convert it to UTF-8") from error
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if lines and lines[0][1].lstrip().startswith("{"):
        return [NewText(row=parse_line(line, f"stdin, line {number},")) for number, line in lines]
    return [NewText(text=line.removesuffix("\r")) for _, line in lines]
