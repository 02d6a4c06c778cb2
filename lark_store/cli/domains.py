"""The command that makes synthetic domains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lark_store.cli.output import say
from lark_store.cli.spec_options import takes
from lark_store.core.atomic_files import writing
from lark_store.domains import DOMAINS, make_domain
from lark_store.errors import InputError


@takes()
def make(
    name: Annotated[str, typer.Argument(help=f"{', '.join(f'`{name}`' for name in DOMAINS)}.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The file to write, `.jsonl`.")],
    draws: Annotated[int, typer.Option(help="Number of draws, each with words of its own.")] = 10,
    seed: Annotated[int, typer.Option(help="Seed of the words.")] = 0,
) -> None:
    """Write related statements about invented words, for `eif`: one JSON object per line.

    The metadata `role` says what a statement states, `draw` which statements share their words. Equal arguments give
    equal files.

    Example: `lark-store domain make transitivity --draws 10 --seed 0 -o transitivity.jsonl`
    """
    rows = make_domain(name, draws, seed)
    try:
        with writing(out) as draft:
            draft.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows), encoding="utf-8")
    except OSError as error:
        raise InputError(f"`{out}` can't be written: {error.strerror}", "choose another location") from error
    say(f"wrote {len(rows)} statements of {draws} draws to `{out}`")


def register(app: typer.Typer) -> None:
    """Add this command to the app."""
    group = typer.Typer(
        name="domain", no_args_is_help=True, rich_markup_mode="markdown", help="Synthetic domains of invented words."
    )
    group.command()(make)
    app.add_typer(group)
