"""Arrow schemas of the Lance tables: their columns, scalar indices and names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyarrow as pa

from lark_store.schema.checksums import with_checksums
from lark_store.schema.sign_codes import code_bytes, codes_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray


def _field(name: str, kind: pa.DataType, *, null: bool = False) -> pa.Field:
    return pa.field(name, kind, nullable=null)


SAMPLES = pa.schema(
    [
        _field("source", pa.string()),
        _field("sample_id", pa.string()),
        _field("prompt", pa.string(), null=True),
        _field("response", pa.string(), null=True),
        _field("text", pa.string(), null=True),
        _field("label", pa.string(), null=True),
        _field("meta", pa.string()),
        _field("content_sha256", pa.string()),
        _field("checksum", pa.int64(), null=True),
        _field("completion", pa.string(), null=True),
        _field("messages", pa.string(), null=True),
        _field("tools", pa.string(), null=True),
    ]
)
FAILURES = pa.schema(
    [
        _field("ingest_run", pa.int64()),
        _field("checkpoint", pa.string()),
        _field("source", pa.string()),
        _field("variant", pa.string()),
        _field("sample_id", pa.string()),
        _field("reason", pa.string()),
        _field("checksum", pa.int64(), null=True),
    ]
)
INFLUENCE = pa.schema(
    [
        _field("score_run", pa.int64()),
        _field("checkpoint", pa.string()),
        _field("query_id", pa.string()),
        _field("source", pa.string()),
        _field("variant", pa.string()),
        _field("sample_id", pa.string()),
        _field("score", pa.float32()),
        _field("rank", pa.int32()),
    ]
)
SOURCE_INFLUENCE = pa.schema(
    [
        _field("score_run", pa.int64()),
        _field("checkpoint", pa.string()),
        _field("query_id", pa.string()),
        _field("source", pa.string()),
        _field("variant", pa.string()),
        _field("max", pa.float32()),
        _field("argmax", pa.string()),
        _field("mean", pa.float32()),
        _field("std", pa.float32()),
        _field("n", pa.int64()),
        _field("checksum", pa.int64(), null=True),
    ]
)
PROBES = pa.schema(
    [
        _field("probe_run", pa.int64()),
        _field("checkpoint", pa.string()),
        _field("source", pa.string()),
        _field("variant", pa.string()),
        _field("sample_id", pa.string()),
        _field("is_correct", pa.bool_(), null=True),
        _field("n_correct", pa.int32(), null=True),
        _field("n_samples", pa.int32()),
        _field("answer_logprob", pa.float64(), null=True),
        _field("n_tokens", pa.int32(), null=True),
        _field("output", pa.string(), null=True),
        _field("reason", pa.string(), null=True),
        _field("checksum", pa.int64()),
    ]
)
EIF = pa.schema(
    [
        _field("eif_run", pa.int64()),
        _field("checkpoint", pa.string()),
        _field("source", pa.string()),
        _field("sample_id", pa.string()),
        _field("queries", pa.string()),
        _field("query_id", pa.string()),
        _field("loss_before", pa.float64()),
        _field("loss_after", pa.float64()),
        _field("value", pa.float64()),
        _field("checksum", pa.int64()),
    ]
)
TABLES = {
    "samples": SAMPLES,
    "failures": FAILURES,
    "influence": INFLUENCE,
    "source_influence": SOURCE_INFLUENCE,
    "probes": PROBES,
    "eif": EIF,
}
# Scalar indices: bitmaps for few distinct values, B-trees for many.
INDICES = {
    "samples": {"source": "bitmap", "sample_id": "btree"},
    "failures": {"ingest_run": "bitmap"},
    "influence": {"score_run": "bitmap"},
    "source_influence": {"score_run": "bitmap"},
    "probes": {"probe_run": "bitmap"},
    "eif": {"eif_run": "bitmap"},
    "sketches": {
        "checkpoint": "bitmap",
        "source": "bitmap",
        "variant": "bitmap",
        "ingest_run": "bitmap",
        "row_key": "btree",
    },
    "embeddings": {"source": "bitmap", "sample_id": "btree"},
}
SKETCH_PREFIX = "sketches_"
EMBEDDING_PREFIX = "embeddings_"
SKETCH_COLUMNS = (
    "row_key",
    "checkpoint",
    "source",
    "variant",
    "sample_id",
    "ingest_run",
    "n_tokens",
    "n_loss_tokens",
    "loss",
    "grad_norm",
    "n_cut",
    "answer",
    "answer_tokens",
)
# Columns added by later versions: null in older rows; tables of snapshots may lack them.
ANSWERS = ("answer", "answer_tokens")
ADDED = {
    "n_cut": "INT",
    "checksum": "BIGINT",
    **dict.fromkeys(("completion", "messages", "tools", *ANSWERS), "STRING"),
}


def sketch_schema(k: int, dtype: str) -> pa.Schema:
    """Return the schema of a sketch table: `SKETCH_COLUMNS`, `checksum`, `code` and `vector`, (k,) of `dtype`.

    `code`: see `lark_store.schema.sign_codes`. `vector`: the sketch, normalised and scaled to norm √k to suit float16's
    range. `grad_norm`: the sketch's norm, an estimate of ‖∇L‖ that turns cosines into unbiased dot products. `loss`: in
    nats per target token. `n_cut`: tokens removed by truncation, null if unknown. `answer`: the answer that
    the checkpoint predicted, under the rule `predicted-answer`, and `answer_tokens`, its token ids as JSON. `checksum`:
    see `lark_store.schema.checksums`.
    """
    value = pa.float16() if dtype == "float16" else pa.float32()
    kinds: dict[str, pa.DataType] = {
        "ingest_run": pa.int64(),
        "n_tokens": pa.int32(),
        "n_loss_tokens": pa.int32(),
        "loss": pa.float32(),
        "grad_norm": pa.float32(),
        "n_cut": pa.int32(),
        "checksum": pa.int64(),
    }
    names = (*SKETCH_COLUMNS, "checksum")
    scalars = [_field(name, kinds.get(name, pa.string()), null=name in ADDED) for name in names]
    code = _field("code", pa.list_(pa.uint8(), code_bytes(k)))
    return pa.schema([*scalars, code, _field("vector", pa.list_(value, k))])


def embedding_schema(dimensions: int) -> pa.Schema:
    """Return the schema of an embedding table: sample keys and unit vectors, (dimensions,) float32."""
    names = [_field(name, pa.string()) for name in ("source", "sample_id", "content_sha256")]
    checksum = _field("checksum", pa.int64(), null=True)
    return pa.schema([*names, _field("vector", pa.list_(pa.float32(), dimensions)), checksum])


def sketch_rows(rows: list[dict[str, Any]], vectors_NK: NDArray[Any], schema: pa.Schema) -> pa.Table:
    """Build rows of a sketch table from dicts of `SKETCH_COLUMNS` and vectors (N, K).

    `schema` is the table's schema; tables of older versions may lack the code and the columns of `ADDED`.
    """
    arrays = {"vector": vectors_NK}
    if "code" in schema.names:
        arrays["code"] = codes_of(vectors_NK)
    scalars = [field for field in schema if field.name not in arrays]
    table = pa.Table.from_pylist(rows, schema=pa.schema(scalars))
    for name, values_ND in arrays.items():
        kind = schema.field(name).type
        values = pa.array(values_ND.reshape(-1), type=kind.value_type)
        table = table.append_column(schema.field(name), pa.FixedSizeListArray.from_arrays(values, type=kind))
    if "checksum" in schema.names:
        table = with_checksums(table)
    return table.select(schema.names).cast(schema)


def projection(schema: pa.Schema, columns: Iterable[str]) -> list[str] | dict[str, str]:
    """Return the columns for Lance to read; columns of `ADDED` missing in an older table become null."""
    names = list(columns)
    missing = {name for name in names if name in ADDED and name not in schema.names}
    if not missing:
        return names
    return {name: f"CAST(NULL AS {ADDED[name]})" if name in missing else f"`{name}`" for name in names}


def kind_of(table: str) -> str:
    """Return the kind of a table, a key of `INDICES`.

    >>> kind_of("sketches_01234567")
    'sketches'
    """
    kind = next((prefix for prefix in (SKETCH_PREFIX, EMBEDDING_PREFIX) if table.startswith(prefix)), table)
    return kind.removesuffix("_")


def sketch_table(fingerprint: str) -> str:
    """Return the name of the sketch table for a fingerprint.

    >>> sketch_table("0123456789abcdef")
    'sketches_01234567'
    """
    return SKETCH_PREFIX + fingerprint[:8]
