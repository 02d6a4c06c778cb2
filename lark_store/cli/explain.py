"""`explain`: the tokens that carry a score."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Unpack

import typer

from lark_store.cli.formats import Format
from lark_store.cli.options import NewQueryOptions, ReadOptions
from lark_store.cli.output import say
from lark_store.cli.spec_options import takes
from lark_store.errors import InputError
from lark_store.specs import Compute, ExplainOptions, ExplainSpec, SearchSpec

if TYPE_CHECKING:
    from lark_store.results import Explanation


class By(StrEnum):
    """The division that is shown."""

    position = "position"
    target = "target"


@takes(
    ExplainSpec,
    SearchSpec,
    Compute,
    file="A new query from a file: its text, or the first row of a .jsonl, .parquet or .csv.",
)
def explain(
    common: ReadOptions,
    given: NewQueryOptions,
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="[QUERY] SAMPLE",
            help="The query as in `top` (omit it for a new text), and the sample: SOURCE/ID, or an id of one source.",
        ),
    ],
    checkpoint: Annotated[
        str | None, typer.Option("--checkpoint", "-c", metavar="NAME", help="The checkpoint (default: the only one).")
    ] = None,
    by: Annotated[
        By, typer.Option(help="Tint and rank tokens by what their position or their loss carries.")
    ] = By.position,
    k: Annotated[int, typer.Option("-k", help="Tokens of each text in the table.")] = 10,
    **options: Unpack[ExplainOptions],
) -> None:
    """Print which tokens of a query and a sample carry the score between them.

    Both texts are printed, tinted red where a token makes the sample a proponent and blue where an opponent, and a
    table of the `-k` strongest tokens of each. The other formats, and `--wide`, have every token. The gradients are
    taken with the checkpoint's model, in float32.

    Example: `lark-store explain 21645374 finetune/q17 --checkpoint epoch-2`

    Example: `lark-store explain finetune/q17 --prompt "Is aspirin safe?" --response yes --checkpoint epoch-2 -f csv`
    """
    if k < 1:
        raise InputError(f"`-k` must be at least 1, not {k}", "give the number of tokens to print")
    new = given.new_text()
    if len(names) != (1 if new else 2):
        expected = "the sample alone" if new else "a query and a sample"
        raise InputError(f"`explain` takes {expected}, not {len(names)} names", "see `lark-store explain --help`")
    query = None if new else names[0]
    with common.open() as opened:
        result = opened.explain(query, names[-1], checkpoint=checkpoint, new=new, **options)
    if common.form == Format.table and not common.wide:
        _print_texts(result, by.value)
        common.emit(result.table(by.value, k), result.about)
    else:
        common.emit(result.frame, result.about)
    say(result.how)


def _print_texts(result: Explanation, by: str) -> None:
    """Print both sides' texts, tinted where the terminal has colours."""
    import sys

    from rich.console import Console

    from lark_store.display.table import terminal_width
    from lark_store.display.tokens import tokens_text
    from lark_store.display.values import plain

    console = Console(file=sys.stdout, width=terminal_width(), highlight=False, markup=False, emoji=False)
    names = {"query": (result.query_id, result.query_variant), "sample": (result.sample_id, result.variant)}
    for side, (name, variant) in names.items():
        rows = result.side(side)
        console.print(f"{side} {plain(name)} as {variant}", style="bold")
        console.print(tokens_text(rows["token"].to_list(), rows[f"by_{by}"].to_list()), soft_wrap=False)
        console.print()


def register(app: typer.Typer) -> None:
    """Add this command to the app."""
    app.command()(explain)
