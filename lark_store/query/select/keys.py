"""The groups of searched rows by one or two keys: of the sample, of its source, or of its metadata."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import polars as pl

from lark_store.core.text import coded
from lark_store.errors import InputError
from lark_store.schema.vectors import where

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from lark_store.query.select.rows import Rows
    from lark_store.schema.database import Database

_OF_SOURCES = ("source", "stage", "domain", "variant")
BUILT_IN = (*_OF_SOURCES, "label")
_SAMPLE = ("source", "sample_id")
_MOST_KEYS, _ROWS = 2, 1 << 14
_NAMED = 12  # keys in a message
_CACHED_BYTES = 256 << 20
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
    of_groups = [[_of_source(group, name) if name in _OF_SOURCES else None for name in keys] for group in rows.groups]
    names = [f"_{number}" for number in range(len(keys))]
    columns = pl.DataFrame(of_groups, dict.fromkeys(names, pl.String), orient="row")[rows.frame["group"].to_numpy()]
    own = {name: key for name, key in zip(names, keys, strict=True) if key not in _OF_SOURCES}
    if own:
        values = _of_samples(db, rows, own)
        samples = rows.frame.select(_SAMPLE).join(values, on=_SAMPLE, how="left", maintain_order="left")
        columns = columns.with_columns(samples.select(*own))
    groups = columns.unique(maintain_order=True).with_row_index("_group")
    group_N = columns.join(groups, on=names, how="left", maintain_order="left", nulls_equal=True)["_group"]
    n_without = {key: columns[name].null_count() for key, name in zip(keys, names, strict=True)}
    return Grouping(
        groups.select(names).rows(), group_N.cast(pl.Int64).to_numpy(), {key: n for key, n in n_without.items() if n}
    )


def _of_source(group: Any, name: str) -> Value:
    source = group.source
    values = {"source": source.name, "stage": source.stage, "domain": source.domain, "variant": group.variant.name}
    value: Value = values[name]
    return value


def _of_samples(db: Database, rows: Rows, keys: dict[str, str]) -> pl.DataFrame:
    """Return source, sample_id and columns with the values of keys, of all samples of the rows' sources.

    `keys` are those of samples and of their metadata, by column. An open store caches the last ones.

    Raises
    ------
    InputError
        No sample has one of them.
    """
    sources = sorted({group.source.name for group in rows.groups})
    state = (db.vectors.table("samples").version, sources, keys)
    values, known = db.remember(
        "keys", state, lambda: _read(db, sources, keys), keep=lambda read: read[0].estimated_size() <= _CACHED_BYTES
    )
    for key in keys.values():
        if key != "label" and key not in known:
            listed = ", ".join(coded(list(known)[:_NAMED])) or "none"
            raise InputError(
                f"no searched sample has the key `{key}`",
                f"the keys of the metadata are {listed}; others are {', '.join(coded(BUILT_IN))}",
            )
    return values


def _read(db: Database, sources: list[str], keys: dict[str, str]) -> tuple[pl.DataFrame, dict[str, None]]:
    """Return the values of keys by column, of the samples of some sources, and the names of all keys of metadata."""
    known: dict[str, None] = {}
    schema = dict.fromkeys(keys, pl.String)
    parts = [pl.DataFrame(schema=dict.fromkeys((*_SAMPLE, *keys), pl.String))]
    for batch in db.vectors.scan("samples", [*_SAMPLE, "label", "meta"], where(source=sources), batch_rows=_ROWS):
        frame = pl.DataFrame(pl.from_arrow(batch))
        texts = frame["meta"].unique()  # many samples have the same
        metas = [json.loads(text) if text else {} for text in texts]
        for meta in metas:
            known |= dict.fromkeys(meta)
        found = [[metadata_text(meta.get(key)) for key in keys.values()] for meta in metas]
        read = pl.DataFrame(found, schema, orient="row").with_columns(meta=texts)
        frame = frame.join(read, on="meta", how="left", maintain_order="left", nulls_equal=True)
        labels = {name: pl.col("label") for name, key in keys.items() if key == "label"}
        parts.append(frame.with_columns(**labels).select(*_SAMPLE, *keys))
    return pl.concat(parts).unique(_SAMPLE, keep="last"), known


def metadata_text(value: Any) -> Value:
    """Return a value of the metadata as text: JSON, except for texts."""
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)
