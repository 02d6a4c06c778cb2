"""Labels of groups in charts."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    Group = tuple[str | None, ...]


def unique_labels(groups: Iterable[Group], keys: Sequence[str]) -> dict[Group, str]:
    """Return a label for each group, from its values of the keys; no two groups have the same.

    Values are in quotes where they are empty, or where the label would be that of another group.

    >>> unique_labels([("sea", "book"), ("sea", None)], ["topic", "format"])
    {('sea', 'book'): 'sea · book', ('sea', None): 'sea · (no format)'}
    >>> list(unique_labels([("(no topic)",), (None,), ("law",)], ["topic"]).values())
    ['"(no topic)"', '(no topic)', 'law']
    """
    from lark_store.charts.readable import visible

    distinct = dict.fromkeys(groups)
    quoted = {group for group in distinct if any(value is not None and not value.strip() for value in group)}
    while True:
        labels = {group: _label(group, keys, is_quoted=group in quoted) for group in distinct}
        n_of = Counter(map(visible, labels.values()))
        same = {group for group, label in labels.items() if n_of[visible(label)] > 1} - quoted
        if not same:
            return labels
        quoted |= same


def _label(group: Group, keys: Sequence[str], *, is_quoted: bool = False) -> str:
    """Join the values; in quotes as JSON, so that a label has one reading."""
    texts = []
    for key, value in zip(keys, group, strict=True):
        if value is None:
            texts.append(f"(no {key})")
        else:
            texts.append(json.dumps(value, ensure_ascii=not value.isprintable()) if is_quoted else value)
    return " · ".join(texts)
