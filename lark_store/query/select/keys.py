"""The groups of searched rows by one or two keys: of the sample, of its source, or of its metadata."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lark_store.core.text import coded
from lark_store.errors import InputError
from lark_store.schema.vectors import where

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from lark_store.query.select.rows import Rows
    from lark_store.schema.database import Database

_OF_SOURCES = ("source", "stage", "domain", "variant")
BUILT_IN = (*_OF_SOURCES, "label")
_MOST_KEYS, _ROWS = 2, 1 << 14
_NAMED = 12  # keys in a message
Value = str | None


@dataclass(frozen=True)
class Grouping:
    """The groups of N rows: `values` of the keys, one tuple per group, and each row's group, `group_N`.

    `n_without` counts the rows that lack a key.
    """

    values: list[tuple[Value, ...]]
    group_N: NDArray[np.int64]
    n_without: dict[str, int]


def grouped(db: Database, rows: Rows, keys: Sequence[str]) -> Grouping:
    """Group rows by the values of one or two keys. A missing value, and null, is None.

    Raises
    ------
    InputError
        There are no keys, more than two, or no sample has one of them.
    """
    if not 1 <= len(keys) <= _MOST_KEYS or len(set(keys)) < len(keys):
        raise InputError("groups are by one key or by two", "for example `--by source`, or `--by topic --by format`")
    frame = rows.frame
    of_groups = {
        name: np.array([_of_source(group, name) for group in rows.groups], object)[frame["group"].to_numpy()]
        for name in keys
        if name in _OF_SOURCES
    }
    of_samples = _of_samples(db, rows, [name for name in keys if name not in _OF_SOURCES])
    columns = [(of_groups | of_samples)[name] for name in keys]
    numbers: dict[tuple[Value, ...], int] = {}
    group_N = np.array([numbers.setdefault(row, len(numbers)) for row in zip(*columns, strict=True)], np.int64)
    n_without = {name: sum(value is None for value in column) for name, column in zip(keys, columns, strict=True)}
    return Grouping(list(numbers), group_N, {name: n for name, n in n_without.items() if n})


def _of_source(group: Any, name: str) -> Value:
    source = group.source
    values = {"source": source.name, "stage": source.stage, "domain": source.domain, "variant": group.variant.name}
    value: Value = values[name]
    return value


def _of_samples(db: Database, rows: Rows, keys: list[str]) -> dict[str, NDArray[Any]]:
    """Return each row's value of the keys of samples and of their metadata, (N) each."""
    if not keys:
        return {}
    values: dict[tuple[str, str], tuple[Value, ...]] = {}
    known: dict[str, None] = {}
    sources = sorted({group.source.name for group in rows.groups})
    columns = ["source", "sample_id", "label", "meta"]
    for batch in db.vectors.scan("samples", columns, where(source=sources), batch_rows=_ROWS):
        for source, sample_id, label, text in zip(*(batch.column(name).to_pylist() for name in columns), strict=True):
            meta = json.loads(text) if text else {}
            known |= dict.fromkeys(meta)
            values[source, sample_id] = tuple(label if key == "label" else metadata_text(meta.get(key)) for key in keys)
    for key in keys:
        if key != "label" and key not in known:
            listed = ", ".join(coded(list(known)[:_NAMED])) or "none"
            raise InputError(
                f"no searched sample has the key `{key}`",
                f"the keys of the metadata are {listed}; others are {', '.join(coded(BUILT_IN))}",
            )
    names = rows.frame.select("source", "sample_id").iter_rows()
    lacking = (None,) * len(keys)
    by_row = [values.get(name, lacking) for name in names]
    return {key: np.array([row[n] for row in by_row], object) for n, key in enumerate(keys)}


def metadata_text(value: Any) -> Value:
    """Return a value of the metadata as text: JSON, except for texts."""
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)
