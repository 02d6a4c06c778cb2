"""The versions of a Lance table: find readable ones, and roll back to them, by their manifests."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from lark_store.schema.faults import FAULTS
from lark_store.schema.table_schemas import TABLES, embedding_schema, kind_of, sketch_schema

if TYPE_CHECKING:
    import pyarrow as pa

    from lark_store.schema.vectors import VectorStore

_MAX_VERSION = (1 << 64) - 1  # Lance names manifests by the difference, so that the newest sorts first
_HINT = "latest_version_hint.json"


def manifests(vectors: VectorStore, table: str) -> dict[int, str]:
    """Return the manifest paths of a table by version, newest first."""
    paths = {}
    for path in vectors.files.list(f"{table}.lance/_versions"):
        stem, _, ending = path.rpartition("/")[2].partition(".")
        if ending == "manifest" and stem.isdigit():
            number = int(stem)
            paths[_MAX_VERSION - number if number > _MAX_VERSION >> 1 else number] = path
    return dict(sorted(paths.items(), reverse=True))


def _schema(vectors: VectorStore, table: str, version: int) -> pa.Schema | None:
    """Return the schema of a table's version, or None if it can't be opened."""
    import lance

    try:
        dataset = lance.dataset(f"{vectors.uri}/{table}.lance", version=version)
        dataset.count_rows()
    except FAULTS:
        return None
    return dataset.schema


def newest_readable(vectors: VectorStore, table: str, *, check_columns: bool = False) -> int | None:
    """Return the newest version that can be opened and, with `check_columns`, has the expected columns."""
    for version in manifests(vectors, table):
        schema = _schema(vectors, table, version)
        if schema is not None and not (check_columns and misnamed(table, schema)):
            return version
    return None


def misnamed(table: str, schema: pa.Schema) -> list[str]:
    """Return the unexpected columns of a table that lacks others, as after damage to their names.

    >>> from lark_store.schema.table_schemas import SAMPLES
    >>> misnamed("samples", SAMPLES.remove(0).append(SAMPLES.field(0).with_name("sourcf")))
    ['sourcf']
    """
    kind = kind_of(table)
    expected = {"sketches": sketch_schema(1, "float32"), "embeddings": embedding_schema(1)}.get(kind) or TABLES.get(
        kind
    )
    if expected is None or set(expected.names) <= set(schema.names):
        return []
    return [name for name in schema.names if name not in expected.names]


def unreadable_versions(vectors: VectorStore, table: str) -> list[int]:
    """Return the versions that have a manifest but can't be read."""
    return [version for version in manifests(vectors, table) if _schema(vectors, table, version) is None]


def lost_versions(vectors: VectorStore, table: str) -> int:
    """Return the number of versions after the newest manifest, according to Lance's hint file."""
    try:
        with tempfile.TemporaryDirectory(prefix="lark-") as folder:
            copy = Path(folder) / _HINT
            vectors.files.download_file(f"{table}.lance/_versions/{_HINT}", str(copy))
            newest = json.loads(copy.read_text(encoding="utf-8"))["version"]
    except (*FAULTS, KeyError, TypeError):  # the hint file is optional
        return 0
    return max(0, int(newest) - max(manifests(vectors, table), default=int(newest)))


def forget_versions(vectors: VectorStore, table: str, versions: list[int]) -> None:
    """Delete the manifests of versions, and the hint file, which may name one of them."""
    paths = manifests(vectors, table)
    for path in [paths[version] for version in versions if version in paths]:
        vectors.files.delete_file(path)
    hint = f"{table}.lance/_versions/{_HINT}"
    if hint in vectors.files.list(f"{table}.lance/_versions"):
        vectors.files.delete_file(hint)
