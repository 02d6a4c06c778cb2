"""Names are slugs: unique, never changed, what people see and join on."""

from __future__ import annotations

import re

from lark_store.errors import NameInvalidError

_SLUG = re.compile(r"[a-z0-9][a-z0-9._-]*")
_LONGEST = 100


def check_name(name: str) -> str:
    """Return `name` if it is a slug.

    >>> check_name("epoch-2")
    'epoch-2'

    Raises
    ------
    NameInvalidError
        With a slug made from the name as its hint.
    """
    if _SLUG.fullmatch(name) and len(name) <= _LONGEST:
        return name
    slug = re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-._")[:_LONGEST]
    raise NameInvalidError(
        f"`{name}` can't be a name: lower-case letters, digits, `.`, `_` and `-` only, at most {_LONGEST}",
        f"try `{slug}`" if slug else "for example `epoch-2`",
    )
