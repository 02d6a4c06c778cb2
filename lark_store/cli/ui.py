"""`ui`: the explorer in the browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lark_store.cli.options import SnapshotOption, StoreOption
from lark_store.cli.output import say
from lark_store.cli.spec_options import takes

_LOOPBACK = "127.0.0.1"


@takes()
def ui(
    store: StoreOption = None,
    snapshot: SnapshotOption = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port (default: a free one).")] = 0,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="The address to listen at; another one needs `--token-file`.")
    ] = _LOOPBACK,
    token_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A file with the token of the address (default: a new one each time)."),
    ] = None,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the address in a browser.")] = False,
) -> None:
    """Explore the store in a browser: queries, their training samples, tables, SQL. It changes nothing.

    Prints the address, and serves it until Ctrl-C. Only who knows the address, with its token, can read the store.

    Example: `lark-store ui --open`

    Example: `lark-store ui --port 8000`, then `ssh -L 8000:127.0.0.1:8000 MACHINE` from another machine
    """
    from lark_store.ui import serve

    def started(address: str) -> None:
        print(address, flush=True)  # noqa: T201  # the command's output
        say("Ctrl-C ends it")
        if open_browser:
            import webbrowser

            if not webbrowser.open(address):
                say("no browser could be opened\n\nhint: open the address yourself")

    serve(store, snapshot=snapshot, host=host, port=port, token_file=token_file, started=started)


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command()(ui)
