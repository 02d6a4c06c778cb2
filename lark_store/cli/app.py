"""The command tree and its entry point."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from lark_store.cli import ask, care, doors, manage, sql, study, trust, work
from lark_store.cli.options import ENVIRONMENT, StoreOption
from lark_store.cli.output import say
from lark_store.errors import LarkStoreError

_INTERRUPTED = 130
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
or samples that failed, 2 wrong usage, 130 interrupted.
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
work.register(app)
ask.register(app)
sql.register(app)
doors.register(app)
care.register(app)
trust.register(app)
study.register(app)


def main() -> None:
    """Run the command line; a foreseeable fault ends in one clear message, never in a traceback."""
    try:
        app()
    except LarkStoreError as error:
        say(f"error: {error}", everywhere=not error.is_shared)
        sys.exit(1)
    except SystemExit as stop:
        if stop.code == _INTERRUPTED:  # typer's answer to Ctrl-C
            say("interrupted\n\nhint: what was written is kept; run the command again to go on")
        raise
