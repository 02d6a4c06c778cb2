"""The command tree and its entry point."""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lark_store.cli import (
    answers,
    compute,
    corrections,
    domains,
    eif,
    evaluate,
    explain,
    facts,
    integrity,
    interchange,
    lifecycle,
    mcp,
    presentation,
    registry,
    samples,
    sql,
    study,
    ui,
)
from lark_store.cli.options import ENVIRONMENT, StoreOption
from lark_store.cli.output import logged, say
from lark_store.core.arrow import set_command_line
from lark_store.errors import LarkStoreError

if TYPE_CHECKING:
    from collections.abc import Iterator

_INTERRUPTED, _TERMINATED = 130, 143
# Idle OpenMP threads of torch spin for milliseconds on cores the sketch could use; 2,000 turns take microseconds.
# OpenMP reads this when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

app = typer.Typer(
    name="lark-store",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""
Which training samples drive a model's answer, at which checkpoint, and did they come from fine-tuning or pretraining?

Data flow: `init` a store, add `checkpoint`s and `source`s, `ingest` (sketch every sample's loss gradient),
`attribute` (score queries against sources), then read the results: `top`, `metrics`, `sql`, `show`.

Every command takes `--store PATH` (default `./lark.store`, environment `LARK_STORE`). Exit status: 0 success, 1 error
or failed samples, 2 wrong usage, 130 interrupted, 143 terminated.
""",
)


@app.callback(invoke_without_command=True)
def _root(
    *,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
    store: StoreOption = None,
) -> None:
    if store is not None:
        os.environ[ENVIRONMENT] = store  # the default of each command's own `--store`
    if version:
        from importlib.metadata import version as installed

        typer.echo(installed("lark-store"))
        raise typer.Exit


registry.register(app)
corrections.register(app)
compute.register(app)
answers.register(app)
explain.register(app)
facts.register(app)
sql.register(app)
interchange.register(app)
lifecycle.register(app)
samples.register(app)
presentation.register(app)
integrity.register(app)
study.register(app)
evaluate.register(app)
domains.register(app)
eif.register(app)
ui.register(app)
mcp.register(app)


def main() -> None:
    """Run the command line. Expected errors print one message, no traceback."""
    set_command_line()
    with logged(), _terminated_as_interrupted() as terminated:
        try:
            app()
        except LarkStoreError as error:
            _fail(error)
        except SystemExit as stop:
            if stop.code != _INTERRUPTED:  # typer's answer to Ctrl-C
                raise
            _stop(terminated=bool(terminated))
        except KeyboardInterrupt:  # before or after typer
            _stop(terminated=bool(terminated))
        except BaseException as error:
            from lark_store.schema.faults import fault_of, is_panic

            fault = fault_of(error) if isinstance(error, Exception) or is_panic(error) else None
            if fault is None:
                raise
            _fail(fault)


def _stop(*, terminated: bool) -> None:
    word, code = ("terminated", _TERMINATED) if terminated else ("interrupted", _INTERRUPTED)
    say(f"{word}\n\nhint: finished work is saved; run the command again to resume")
    sys.exit(code)


def _fail(error: LarkStoreError) -> None:
    say(f"error: {error.command_line}", everywhere=not error.is_shared)
    sys.exit(1)


@contextmanager
def _terminated_as_interrupted() -> Iterator[list[int]]:
    """Treat SIGTERM, which schedulers send to end a job, as Ctrl-C, so that finished work is committed.

    Yields a list; it holds the signal number after a SIGTERM.
    """
    received: list[int] = []

    def interrupt(number: int, _frame: Any) -> None:
        received.append(number)
        raise KeyboardInterrupt

    is_main_thread = threading.current_thread() is threading.main_thread()
    if not is_main_thread or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:  # an embedding program handles it
        yield received
        return
    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
