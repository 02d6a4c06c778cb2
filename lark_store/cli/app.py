"""The command tree and its entry point."""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lark_store.cli import ask, care, corrections, doors, evaluate, manage, sql, study, trust, work
from lark_store.cli.options import ENVIRONMENT, StoreOption
from lark_store.cli.output import say
from lark_store.errors import LarkStoreError

if TYPE_CHECKING:
    from collections.abc import Iterator

_INTERRUPTED, _TERMINATED = 130, 143
# Threads of torch that wait for work spin for milliseconds, on cores that the sketch could use; 2,000 turns are some
# microseconds. Read by the OpenMP library when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

app = typer.Typer(
    name="lark-store",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="""
Which training samples drive a model's answer, at which checkpoint, and did they come from fine-tuning or pretraining?

The way of the data: `init` a store, add `checkpoint`s and `source`s, `ingest` (sketch every sample's loss gradient),
`attribute` (score queries against sources), then ask: `top`, `metrics`, `sql`, `show`.

Every command takes `--store PATH` (default `./lark.store`, environment `LARK_STORE`). Exit status: 0 done, 1 an error
or samples that failed, 2 wrong usage, 130 interrupted, 143 terminated.
""",
)


@app.callback(invoke_without_command=True)
def _root(
    *,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.", is_eager=True)] = False,
    store: StoreOption = None,
) -> None:
    if store is not None:
        os.environ[ENVIRONMENT] = store  # where the commands' own `--store` looks when it is not given
    if version:
        from importlib.metadata import version as installed

        typer.echo(installed("lark-store"))
        raise typer.Exit


manage.register(app)
corrections.register(app)
work.register(app)
ask.register(app)
sql.register(app)
doors.register(app)
care.register(app)
trust.register(app)
study.register(app)
evaluate.register(app)


def main() -> None:
    """Run the command line; a foreseeable fault ends in one clear message, never in a traceback."""
    with _terminated_as_interrupted() as terminated:
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
        except Exception as error:
            from lark_store.schema.faults import fault_of

            known = fault_of(error)
            if known is None:
                raise
            _fail(known)


def _stop(*, terminated: bool) -> None:
    how, code = ("terminated", _TERMINATED) if terminated else ("interrupted", _INTERRUPTED)
    say(f"{how}\n\nhint: what was written is kept; run the command again to go on")
    sys.exit(code)


def _fail(error: LarkStoreError) -> None:
    say(f"error: {error}", everywhere=not error.is_shared)
    sys.exit(1)


@contextmanager
def _terminated_as_interrupted() -> Iterator[list[int]]:
    """Let SIGTERM, by which schedulers end a job, be a Ctrl-C: what is in hand is committed.

    Yields a list that has the signal once it came.
    """
    seen: list[int] = []

    def interrupt(number: int, _frame: Any) -> None:
        seen.append(number)
        raise KeyboardInterrupt

    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if not ours:  # whoever runs us looks after it
        yield seen
        return
    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
