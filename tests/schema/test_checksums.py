"""Checksums of rows: written with each row, filled by an upgrade, and different as soon as a value is."""

from __future__ import annotations

import hashlib
import shutil
import tarfile

import numpy as np
import pyarrow as pa
import pytest
from golden.make import HERE
from sqlalchemy import text

from lark_store import Store
from lark_store.schema.catalog_checksums import changed_rows
from lark_store.schema.checksums import checksum, row_checksums, score_checksums, with_checksums

ROWS = pa.table(
    {
        "name": ["a", "b_1", "a"],
        "n": pa.array([1, 2, None], pa.int32()),
        "loss": pa.array([0.5, float("nan"), 0.5], pa.float32()),
        "vector": pa.FixedSizeListArray.from_arrays(pa.array(np.arange(6), pa.float16()), 2),
    }
)


def blake(*parts):
    """BLAKE2b of parts, as a signed number of 8 bytes."""
    return int.from_bytes(hashlib.blake2b(b"".join(parts), digest_size=8).digest(), "little", signed=True)


def test_checksum_of_stored_rows_is_unchanged_by_versions():
    """Stores hold these numbers: names in order, values as JSON, then vectors as bytes."""
    vector = np.array([[0, 1], [2, 3], [4, 5]], np.float16)
    expected = [
        blake(b'{"loss": 0.5, "n": 1, "name": "a"}', vector[0].tobytes()),
        blake(b'{"loss": NaN, "n": 2, "name": "b_1"}', vector[1].tobytes()),
        blake(b'{"loss": 0.5, "name": "a"}', vector[2].tobytes()),
    ]
    assert row_checksums(ROWS).tolist() == expected
    assert row_checksums(ROWS.select(["vector", "n", "loss", "name"])).tolist() == expected
    code = pa.FixedSizeListArray.from_arrays(pa.array([7, 8, 9], pa.uint8()), 1)
    wider = ROWS.append_column("code", code)  # its bytes come before the vector's
    assert row_checksums(wider)[0] == blake(b'{"loss": 0.5, "n": 1, "name": "a"}', b"\x07", vector[0].tobytes())
    assert checksum({"b": 1, "a": "ä", "checksum": 5, "c": None}, b"x") == blake(b'{"a": "\\u00e4", "b": 1}', b"x")


def test_checksum_of_scores_covers_the_hits_of_their_query_by_rank():
    keys = {"score_run": [1, 1, 2], "query_id": ["a", "b", "a"]}
    hits = pa.table({"rank": [2, 1, 1], "score": [0.5, 0.75, 0.25], **keys, "query_id": ["a", "a", "a"]})
    sums = pa.table({**keys, "max": [0.75, 0.0, 0.25]})
    first = b'[{"query_id": "a", "rank": 1, "score": 0.75, "score_run": 1}, '
    first += b'{"query_id": "a", "rank": 2, "score": 0.5, "score_run": 1}]'
    assert score_checksums(sums, hits).tolist() == [
        blake(b'{"max": 0.75, "query_id": "a", "score_run": 1}', first),
        blake(b'{"max": 0.0, "query_id": "b", "score_run": 1}', b"[]"),
        blake(
            b'{"max": 0.25, "query_id": "a", "score_run": 2}',
            b'[{"query_id": "a", "rank": 1, "score": 0.25, "score_run": 2}]',
        ),
    ]


def test_checksums_are_equal_only_for_equal_rows():
    assert (row_checksums(ROWS) == row_checksums(ROWS.combine_chunks())).all()
    assert len(set(row_checksums(ROWS).tolist())) == 3


@pytest.mark.parametrize(
    ("column", "value"),
    [("name", "A"), ("n", 3), ("n", None), ("loss", 0.50000006), ("vector", [0.0, 1.001])],
)
def test_changed_value_changes_only_its_rows_checksum(column, value):
    rows = ROWS.to_pylist()
    rows[0][column] = value
    changed = pa.Table.from_pylist(rows, schema=ROWS.schema)
    assert (row_checksums(changed) != row_checksums(ROWS)).tolist() == [True, False, False]


def test_added_null_column_changes_no_checksum():
    wider = ROWS.append_column("n_cut", pa.nulls(3, pa.int32()))
    assert (row_checksums(wider) == row_checksums(ROWS)).all()
    checked = with_checksums(ROWS)
    assert (row_checksums(checked) == row_checksums(ROWS)).all()
    assert checked.column("checksum").to_pylist() == row_checksums(ROWS).tolist()


def stored(store, name):
    return store._db.vectors.table(name).to_lance().to_table()


def checked_rows(store):
    """Return how many rows of each table have the checksum of their content; fails if one has another or none."""
    vectors, counts = store._db.vectors, {}
    for name in ["samples", *vectors.sketch_tables()]:
        rows = stored(store, name)
        assert rows.column("checksum").to_pylist() == row_checksums(rows).tolist(), name
        counts[name.split("_")[0]] = len(rows)
    sums = stored(store, "source_influence")
    assert sums.column("checksum").to_pylist() == score_checksums(sums, stored(store, "influence")).tolist()
    return counts | {"scores": len(sums)}


def damaged(store):
    with store._db.engine.connect() as connection:
        return list(changed_rows(connection))


def test_every_row_is_written_with_its_checksum(scored):
    assert checked_rows(scored) == {"samples": 20, "sketches": 60, "scores": 40}
    assert damaged(scored) == []


@pytest.mark.parametrize("schema", ["0001", "0003", "0007"])
def test_upgrade_fills_checksums_of_older_rows(schema, tmp_path):
    with tarfile.open(HERE / f"{schema}.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    Store.db_upgrade(tmp_path / "golden.store")
    with Store.open(tmp_path / "golden.store") as store:
        counts = checked_rows(store)
        assert min(counts.values()) > 0
        assert damaged(store) == []
        assert store.sql("SELECT count(*), count(n_cut) FROM sketches").row(0) == (counts["sketches"], 0)
    shutil.rmtree(tmp_path / "golden.store")


@pytest.mark.parametrize(
    ("table", "change"),
    [
        ("checkpoint", "learning_rate = learning_rate * 2"),
        ("checkpoint_metric", "value = value + 1e-9"),
        ("source", "stage = 'finetune'"),
        ("score_run", "recipe = replace(recipe, '100', '200')"),
        ("ingest_run", "started_at = replace(started_at, '20', '19')"),
    ],
)
def test_a_changed_value_of_the_catalog_is_found(scored_copy, table, change):
    with scored_copy._db.engine.begin() as connection:
        n = connection.execute(text(f"UPDATE {table} SET {change}")).rowcount
    result = damaged(scored_copy)
    assert n >= len(result) > 0
    assert {(name, missing) for name, _, missing in result} == {(table, False)}
