"""Generate the views' part of docs/reference/sql.md: `python -m lark_store.query.sql.reference FILE`."""

from __future__ import annotations

import sys
from pathlib import Path

from lark_store.query.sql.functions import FUNCTIONS, Function
from lark_store.query.sql.views import VIEWS

_BEGIN = "<!-- The views, by `make docs`: -->\n"
_END = "<!-- End of the views. -->\n"


def reference() -> str:
    """Return a section for each view and table function: the meaning of a row, and a table of columns."""
    sections = []
    for name, documented in (VIEWS | FUNCTIONS).items():
        title = documented.signature if isinstance(documented, Function) else name
        rows = [f"| {column} | {facts.type} | {facts.meaning} |" for column, facts in documented.columns.items()]
        table = "\n".join(["| column | type | meaning |", "|---|---|---|", *rows])
        sections.append(f"### `{title}`\n\n{documented.meaning}.\n\n{table}\n")
    return "\n".join(sections)


def renewed(text: str) -> str:
    """Return a document with the text between the two marks regenerated."""
    before, rest = text.split(_BEGIN)
    _, after = rest.split(_END)
    return f"{before}{_BEGIN}\n{reference()}\n{_END}{after}"


if __name__ == "__main__":
    document = Path(sys.argv[1])
    document.write_text(renewed(document.read_text(encoding="utf-8")), encoding="utf-8")
