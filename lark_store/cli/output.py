"""Print rows to stdout in the chosen format; messages and progress go to stderr."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lark_store.cli.formats import FORMATS, Format
from lark_store.cli.tables import print_table
from lark_store.core.text import distinct_notes
from lark_store.display.progress import ProgressBar, is_first_rank
from lark_store.display.table import NOTHING, About

if TYPE_CHECKING:
    from collections.abc import Iterator

    import polars as pl

__all__ = ["ProgressBar", "emit", "emit_frames", "emit_noted", "is_first_rank", "say", "say_coverage"]


def say(message: str, *, everywhere: bool = False) -> None:
    """Print a message on stderr: from the first process only, or with `everywhere` from each, with its rank."""
    if is_first_rank():
        print(message, file=sys.stderr)  # noqa: T201
    elif everywhere:
        print(f"rank {os.environ['RANK']}: {message}", file=sys.stderr)  # noqa: T201


class _Messages(logging.Handler):
    """Prints what lark-store logs: choices it made as they are, warnings as notes."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "note: " if record.levelno >= logging.WARNING else ""
        say(prefix + record.getMessage())


@contextmanager
def logged() -> Iterator[None]:
    """Print the messages of lark-store's loggers on stderr."""
    logger, handler = logging.getLogger("lark_store"), _Messages()
    before, logger.propagate = (logger.level, logger.propagate), False
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before


def say_coverage(coverage: pl.DataFrame, rows: pl.DataFrame) -> None:
    """Print notes on the groups in `rows` that were searched only in part."""
    keys = ["checkpoint", "source", "variant"]
    groups = rows.select(keys)
    if "against_source" in rows.columns:
        opposite = rows.select("checkpoint", source="against_source", variant="against_variant")
        groups = groups.vstack(opposite.select(keys))
    coverage = coverage.join(groups, on=keys, how="semi", maintain_order="left")
    for note in coverage["note"].drop_nulls():
        say(f"note: {note}")
    is_partial = coverage["chosen"].is_not_null()
    if is_partial.any() and not is_partial.all():
        complete = ", ".join(f"`{name}`" for name in coverage.filter(~is_partial)["source"].unique(maintain_order=True))
        say(f"note: {complete} was searched in full; comparisons favour it over partly searched sources")


def emit(frame: pl.DataFrame, form: str, about: About = NOTHING, *, wide: bool = False, by: str | None = None) -> None:
    """Print a frame on stdout as `table`, `json`, `jsonl`, `csv` or `md`; only `table` rounds and shortens.

    With `wide` a table is printed in full. With `by` a table is divided by the values of this column.
    """
    if form == Format.table:
        print_table(frame, about=about, wide=wide, by=by)
    else:
        FORMATS[Format(form)](frame)


def emit_noted(frame: pl.DataFrame, form: str, about: About = NOTHING, *, wide: bool = False) -> None:
    """Print a frame without its column `note`, then each distinct note on stderr."""
    emit(frame.drop("note"), form, about, wide=wide)
    for note in distinct_notes(frame["note"]):
        say(f"note: {note}")


def emit_frames(frames: dict[str, pl.DataFrame], form: str, *, wide: bool = False) -> None:
    """Print several named frames: titled tables, or one JSON object with a list of rows per frame."""
    import json

    if form in {"json", "jsonl"}:
        rows = {name: json.loads(frame.write_json()) for name, frame in frames.items()}
        print(json.dumps(rows, indent=2 if form == "json" else None, ensure_ascii=False))  # noqa: T201
        return
    for name, frame in frames.items():
        if form == "table":
            print_table(frame, f"{name} ({len(frame)})", wide=wide)
        else:
            print(f"## {name}\n" if form == "md" else f"# {name}")  # noqa: T201
            emit(frame, form)
            print()  # noqa: T201
