"""Names are slugs: unique, immutable, and used in output and joins."""

from __future__ import annotations

import re

from lark_store.errors import NameInvalidError

SUM_SEPARATOR = " + "  # between the checkpoints of a sum of scores; names have no spaces
IMPORTED = "imported"  # the `correction` and `positions` of imported sketchers
_SLUG = re.compile(r"[a-z0-9][a-z0-9._-]*")
_MAX_LENGTH = 100


def check_name(name: str) -> str:
    """Return `name` if it is a slug.

    >>> check_name("epoch-2")
    'epoch-2'

    Raises
    ------
    NameInvalidError
        Its hint is a slug made from the name.
    """
    if _SLUG.fullmatch(name) and len(name) <= _MAX_LENGTH:
        return name
    slug = re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-._")[:_MAX_LENGTH]
    raise NameInvalidError(
        f"`{name}` is not a valid name: lower-case letters, digits, `.`, `_` and `-` only, at most {_MAX_LENGTH}",
        f"try `{slug}`" if slug else "for example `epoch-2`",
    )
