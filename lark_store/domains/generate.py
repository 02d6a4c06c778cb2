"""Draws of a domain: its statements with new words each time, as rows of a source."""

from __future__ import annotations

import random
from typing import Any

from lark_store.domains.templates import DOMAINS, TRUE_SENTENCES
from lark_store.domains.words import invented_words
from lark_store.errors import InputError, NameUnknownError


def make_domain(name: str, draws: int = 10, seed: int = 0) -> list[dict[str, Any]]:
    """Return the statements of `draws` draws of a domain, as rows for `Store.source_add`.

    `name` is `belongs_to`, `chain_induces`, `transitivity` or `squares`. Each draw has invented words of its own and
    one statement per role. A row has the columns sample_id, text, family (the domain), role and draw. Equal arguments
    give equal rows, and more draws begin with the same ones.

    Raises
    ------
    NameUnknownError
    InputError
        Less than one draw.

    Examples
    --------
    >>> [row["role"] for row in make_domain("squares", draws=1)][:2]
    ['square_is_b', 'b_is_rectangle']
    """
    if name not in DOMAINS:
        raise NameUnknownError(f"no domain `{name}`", f"the domains are {', '.join(f'`{each}`' for each in DOMAINS)}")
    if draws < 1:
        raise InputError(f"the number of draws must be at least 1, not {draws}", "for example `--draws 10`")
    domain = DOMAINS[name]
    rows = []
    for draw in range(draws):
        rng = random.Random(f"{name}/{seed}/{draw}")  # noqa: S311 (no secret)
        words = dict(zip(domain.words, invented_words(rng, len(domain.words)), strict=True))
        words["true"] = rng.choice(TRUE_SENTENCES)
        for role, template in domain.statements.items():
            text = template.format(**words)
            sample_id = f"{name}-{draw}-{role}"
            text = text[:1].upper() + text[1:]
            rows.append({"sample_id": sample_id, "text": text, "family": name, "role": role, "draw": draw})
    return rows
