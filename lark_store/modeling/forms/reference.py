"""Generate the table of forms in docs/data.md: `python -m lark_store.modeling.forms.reference FILE`."""

from __future__ import annotations

import sys
from pathlib import Path

from lark_store.modeling.forms import FORMS
from lark_store.modeling.forms.chat_checks import SHAREGPT_ROLES

_BEGIN = "<!-- The forms, by `make docs`: -->\n"
_END = "<!-- End of the forms. -->\n"


def reference() -> str:
    """Return the table of forms, in the order of detection, and that of ShareGPT's roles."""
    forms = [f"| {form.name} | {form.looks_like} | {form.meaning} |" for form in FORMS.values()]
    roles = {role: [name for name, to in SHAREGPT_ROLES.items() if to == role] for role in SHAREGPT_ROLES.values()}
    rows = [f"| `{role}` | {', '.join(f'`{name}`' for name in names)} |" for role, names in roles.items()]
    return "\n".join(
        [
            "| form | a row has | it becomes |",
            "|---|---|---|",
            *forms,
            "",
            "| role | in ShareGPT |",
            "|---|---|",
            *rows,
            "",
        ]
    )


def renewed(text: str) -> str:
    """Return a document with the text between the two marks regenerated."""
    before, rest = text.split(_BEGIN)
    _, after = rest.split(_END)
    return f"{before}{_BEGIN}\n{reference()}\n{_END}{after}"


if __name__ == "__main__":
    document = Path(sys.argv[1])
    document.write_text(renewed(document.read_text(encoding="utf-8")), encoding="utf-8")
