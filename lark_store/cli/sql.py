"""`sql`: run one SELECT from the command line, a file or stdin, or open the SQL shell."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lark_store.cli.formats import Format
from lark_store.cli.options import ReadOptions
from lark_store.cli.output import emit, emit_frames, say
from lark_store.cli.spec_options import takes
from lark_store.display.table import NOTHING
from lark_store.errors import InputError, LarkStoreError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lark_store.store import Store

_INTERRUPTED = 130


@takes()
def sql(
    common: ReadOptions,
    query: Annotated[str | None, typer.Argument(help="One SELECT; `-` reads it from stdin.")] = None,
    file: Annotated[str | None, typer.Option("--file", metavar="PATH", help="Read the SELECT from this file.")] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Print DuckDB's plan instead of running the query.")
    ] = False,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the views and their columns with descriptions, and exit.")
    ] = False,
    timeout: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="Stop the query after this time (0: never).")
    ] = 60,
    memory: Annotated[
        str, typer.Option(metavar="SIZE", help="Stop the query if its work or result needs more memory.")
    ] = "4GB",
    max_rows: Annotated[
        int, typer.Option("--max-rows", min=0, metavar="N", help="Print only the first rows (0: all).")
    ] = 1_000_000,
) -> None:
    """Run one SELECT over the store (DuckDB's SQL, read-only); without a query, open a shell.

    Views: checkpoints, checkpoint_metrics, sources, variants, sketchers, corrections, samples, ingest_runs,
    score_runs, sketches (without vectors), predictions, coverage, self_influence, studies, evaluations, failures,
    influence, source_influence, probe_runs, probes, eif_runs, eif, eif_pairs. `--schema` prints their columns.

    Example: `lark-store sql "select source, variant, avg(max) from source_influence where checkpoint = 'epoch-2' group
    by all"`
    """
    if query is not None and file is not None:
        raise typer.BadParameter("give a query or `--file`, not both")
    if schema:
        from lark_store.query.sql.overview import schema as frames

        emit_frames(frames(), common.form, wide=common.wide)
        return
    with common.open() as opened, _exit_if_blocked():
        runner = QueryRunner(opened, timeout, memory, max_rows, wide=common.wide)
        if query is None and file is None and sys.stdin.isatty() and sys.stdout.isatty():
            from lark_store.cli.shell import Shell

            Shell(runner, common.form).run()
        else:
            runner.run(_read(query, file), common.form, explain=explain)


class QueryRunner:
    """Runs queries within limits and prints their results."""

    def __init__(self, store: Store, timeout: float, memory: str, max_rows: int, *, wide: bool = False) -> None:
        self.store = store
        self._timeout = timeout
        self._memory = memory
        self._max_rows = max_rows
        self.wide = wide
        self.about = NOTHING

    def run(self, query: str, form: str, *, explain: bool = False) -> None:
        """Run one query and print its rows or plan; report on stderr if rows were cut."""
        frame = self.store.sql(
            f"EXPLAIN {query}" if explain else query,
            timeout=self._timeout or None,
            memory=self._memory,
            max_rows=self._max_rows + 1 if self._max_rows else None,
        )
        if self._max_rows and len(frame) > self._max_rows:
            frame = frame.head(self._max_rows)
            say(f"stopped after {self._max_rows:,} rows\n\nhint: `--max-rows N` prints more, `--max-rows 0` all")
        if form == Format.table and frame.columns == ["explain_key", "explain_value"]:
            for plan in frame["explain_value"]:  # verbatim
                print(plan.rstrip("\n"))  # noqa: T201
        else:
            emit(frame, form, self.about, wide=self.wide)


def _read(query: str | None, file: str | None) -> str:
    """Return the query from the argument, the file or stdin."""
    if file is None:
        return sys.stdin.read() if query in {None, "-"} else str(query)
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InputError(f"`{file}` can't be read: {reason}", "check the path") from error


@contextmanager
def _exit_if_blocked() -> Iterator[None]:
    """Exit the process at once if a stopped query still blocks a thread."""
    from lark_store.query.sql.limits import is_held_up

    try:
        yield
    except (LarkStoreError, KeyboardInterrupt) as error:
        if not is_held_up():
            raise
        interrupted = isinstance(error, KeyboardInterrupt)
        say(f"error: {error.command_line}" if isinstance(error, LarkStoreError) else "interrupted")
        sys.stdout.flush()
        os._exit(_INTERRUPTED if interrupted else 1)


def register(app: typer.Typer) -> None:
    """Add this command to the app."""
    app.command()(sql)
