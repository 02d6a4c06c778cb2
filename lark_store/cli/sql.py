"""`sql`: one SELECT from the command line, a file or stdin, or a shell of its own."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lark_store.cli.options import Format, FormatOption, SnapshotOption, StoreOption, open_store
from lark_store.cli.output import emit, emit_frames, say
from lark_store.errors import InputError, LarkStoreError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import polars as pl

    from lark_store.store import Store

_INTERRUPTED = 130


def sql(
    query: Annotated[str | None, typer.Argument(help="One SELECT; `-`: read it from stdin.")] = None,
    file: Annotated[str | None, typer.Option("--file", metavar="PATH", help="Read the SELECT from this file.")] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Print DuckDB's plan instead of running the query.")
    ] = False,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the views and their columns with what they mean, and stop.")
    ] = False,
    timeout: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="End the query after this time (0: never).")
    ] = 60,
    memory: Annotated[
        str, typer.Option(metavar="SIZE", help="End the query when its work or its result needs more.")
    ] = "4GB",
    max_rows: Annotated[
        int, typer.Option("--max-rows", min=0, metavar="N", help="Print only the first rows (0: all).")
    ] = 1_000_000,
    store: StoreOption = None,
    snapshot: SnapshotOption = None,
    form: FormatOption = Format.table,
) -> None:
    """Run one SELECT over the store (DuckDB's SQL, read-only); without a query, open a shell for many.

    Views: checkpoints, checkpoint_metrics, sources, variants, sketchers, corrections, samples, ingest_runs,
    score_runs, sketches (without vectors), coverage, self_influence, studies, evaluations, failures, influence,
    source_influence. `--schema` prints their columns.

    Example: `lark-store sql "select source, variant, avg(max) from source_influence where checkpoint = 'epoch-2' group
    by all"`
    """
    if query is not None and file is not None:
        raise typer.BadParameter("give a query or `--file`, not both")
    if schema:
        from lark_store.query.sql.views import schema as frames

        emit_frames(frames(), form)
        return
    with open_store(store, snapshot) as opened, _leaving_at_once():
        asker = Asker(opened, timeout, memory, max_rows)
        if query is None and file is None and sys.stdin.isatty() and sys.stdout.isatty():
            from lark_store.cli.shell import Shell

            Shell(asker, form).run()
        else:
            asker.ask(_read(query, file), form, explain=explain)


class Asker:
    """Runs queries within the limits that were given, and prints the answers."""

    def __init__(self, store: Store, timeout: float, memory: str, max_rows: int) -> None:
        self.store = store
        self._timeout = timeout
        self._memory = memory
        self._max_rows = max_rows

    def ask(self, query: str, form: str, *, explain: bool = False) -> None:
        """Run one query and print its rows, or its plan; say on stderr when there are more rows."""
        frame = self.store.sql(
            f"EXPLAIN {query}" if explain else query,
            timeout=self._timeout or None,
            memory=self._memory,
            max_rows=self._max_rows + 1 if self._max_rows else None,
        )
        if self._max_rows and len(frame) > self._max_rows:
            frame = frame.head(self._max_rows)
            say(f"cut after {self._max_rows:,} rows\n\nhint: `--max-rows N` prints more of them, 0 all")
        _print(frame, form)


def _print(frame: pl.DataFrame, form: str) -> None:
    """Print rows, a plan as the drawing that it is."""
    if form == Format.table and frame.columns == ["explain_key", "explain_value"]:
        for plan in frame["explain_value"]:
            print(plan.rstrip("\n"))  # noqa: T201
    else:
        emit(frame, form)


def _read(query: str | None, file: str | None) -> str:
    """Return the query that was given, in whichever way."""
    if file is None:
        return sys.stdin.read() if query in {None, "-"} else str(query)
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InputError(f"`{file}` can't be read: {reason}", "check the path") from error


@contextmanager
def _leaving_at_once() -> Iterator[None]:
    """End the process at once if a query that was ended still holds up one of its threads."""
    from lark_store.query.sql.stop import is_held_up

    try:
        yield
    except (LarkStoreError, KeyboardInterrupt) as error:
        if not is_held_up():
            raise
        interrupted = isinstance(error, KeyboardInterrupt)
        say("interrupted" if interrupted else f"error: {error}")
        sys.stdout.flush()
        os._exit(_INTERRUPTED if interrupted else 1)


def register(app: typer.Typer) -> None:
    """Put this command into the tree."""
    app.command()(sql)
