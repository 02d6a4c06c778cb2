"""Forms of rows: what people's data looks like, and the samples that it becomes.

To add a form, write a module like `alpaca` and list it in `FORMS`. Detection tries the forms in this order; help,
messages and documentation are generated from it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lark_store.errors import InputError
from lark_store.modeling.forms.alpaca import ALPACA
from lark_store.modeling.forms.chat_checks import ROLES
from lark_store.modeling.forms.completion import COMPLETION
from lark_store.modeling.forms.messages import MESSAGES
from lark_store.modeling.forms.plain import QUESTION, RESPONSE, TEXT
from lark_store.modeling.forms.preference import PREFERENCE
from lark_store.modeling.forms.sharegpt import SHAREGPT

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from lark_store.modeling.forms.base import Form
    from lark_store.readers.fields import Fields

FORMS: dict[str, Form] = {
    form.name: form for form in (MESSAGES, SHAREGPT, PREFERENCE, COMPLETION, ALPACA, RESPONSE, QUESTION, TEXT)
}
_PLAIN = (RESPONSE, QUESTION, TEXT)  # their order among themselves never changes: stored samples rely on it


def fields_of_forms() -> tuple[str, ...]:
    """Return the fields of samples: those of all forms, `sample_id` and `label`."""
    plain_last = sorted(FORMS.values(), key=lambda form: form not in _PLAIN)
    names = [name for form in plain_last for name in form.fields]
    return tuple(dict.fromkeys(["sample_id", *names, "label"]))


def needed() -> str:
    """Return the columns that a row needs in a sentence."""
    return ", or ".join(form.needs for form in FORMS.values())


def forms_help() -> str:
    """Return the forms as a list in Markdown."""
    return "\n".join(f"- {form.looks_like} → {form.meaning}" for form in FORMS.values())


def check_columns(columns: Iterable[str]) -> None:
    """Check the names of fields in a mapping.

    `messages.KEY` names a key of messages, `role.ROLE` a role.

    Raises
    ------
    InputError
    """
    known = fields_of_forms()
    for name in columns:
        prefix, _, key = name.partition(".")
        if name in known or (prefix == "messages" and key):
            continue
        if prefix == "role" and key:
            if key in ROLES:
                continue
            raise InputError(f"unknown role `{key}`", f"the roles are {', '.join(ROLES)}")
        raise InputError(f"unknown sample field `{name}`", f"the fields are {', '.join(known)}")


def forms_of(fields: Fields) -> list[Form]:
    """Return the forms that a row may have, the likeliest first.

    Forms with a mapped field come before the others: `--column text=abstract` reads the text of a row with `messages`
    too.

    Raises
    ------
    InputError
        The row has none.
    """
    having = [form for form in _in_order(fields.columns) if all(fields.has(name) for name in form.needed)]
    fitting = [form for form in having if form.fits(fields)]
    if having:
        return fitting or having[:1]
    raise InputError(
        f"a row needs {needed()}; this one has {', '.join(f'`{key}`' for key in fields.row) or 'no columns'}",
        "map columns, for example `--column text=abstract`",
    )


def _in_order(columns: Mapping[str, str]) -> list[Form]:
    mapped = {name.partition(".")[0] for name in columns}
    is_plain_mapped = any(mapped & set(form.needed) for form in _PLAIN)
    return sorted(
        FORMS.values(), key=lambda form: not (is_plain_mapped if form in _PLAIN else mapped & set(form.needed))
    )
