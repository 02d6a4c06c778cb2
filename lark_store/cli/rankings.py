"""Print the results of `top`: one ranking, one per query, or several checkpoints side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lark_store.cli.formats import Format
from lark_store.cli.output import say
from lark_store.results import Hits

if TYPE_CHECKING:
    from lark_store.cli.options import ReadOptions
    from lark_store.store.rankings import Rankings


def emit_hits(result: Hits | Rankings, common: ReadOptions) -> None:
    """Print rankings on stdout, and how they were made on stderr.

    Of several, a table shows the checkpoints of a query side by side; the other formats have a row per query,
    checkpoint and sample.
    """
    if isinstance(result, Hits):
        common.emit(result.frame, result.about)
        say(result.how)
        return
    if common.form == Format.table:
        _print_tables(result, common)
    else:
        common.emit(result.frame)
    _say_how(result)


def _print_tables(rankings: Rankings, common: ReadOptions) -> None:
    checkpoints = {hits.checkpoint for hits in rankings}
    for query, frame in rankings.side_by_side.items():
        if len(checkpoints) == 1:  # its caption names the query
            own = next(hits for hits in rankings if hits.query_id == query)
            common.emit(own.frame, own.about)
        else:
            print(f"query {query}")  # noqa: T201
            common.emit(frame)


def _say_how(rankings: Rankings) -> None:
    """Print each line once; the number of significant hits belongs to one query and checkpoint."""
    lines: dict[str, None] = {}
    for hits in rankings:
        for line in hits.how.splitlines():
            prefix = f"{hits.query_id} at {hits.checkpoint}: " if line.startswith("against ") else ""
            lines[prefix + line] = None
    for line in lines:
        say(line)
