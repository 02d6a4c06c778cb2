"""`mcp`: read-only tools over a store, for agents."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lark_store.cli.options import SnapshotOption, StoreOption, open_store
from lark_store.cli.spec_options import takes

if TYPE_CHECKING:
    import typer


@takes()
def mcp(store: StoreOption = None, snapshot: SnapshotOption = None) -> None:
    """Serve read-only tools (show, sql, top, explain) to an agent over standard input and output (MCP).

    Needs `pip install 'lark-store[mcp]'`. Your agent's settings name this command.

    Example: `lark-store mcp --store /data/lark.store`
    """
    from lark_store.agents import serve

    with open_store(store, snapshot) as opened:
        serve(opened)


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command()(mcp)
