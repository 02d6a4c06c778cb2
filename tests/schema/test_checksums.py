"""Checksums of rows: written with each row, filled by an upgrade, and different as soon as a value is."""

from __future__ import annotations

import shutil
import tarfile

import numpy as np
import pyarrow as pa
import pytest
from golden.make import HERE
from sqlalchemy import text

from lark_store import Store
from lark_store.schema.catalog_checksums import changed_rows
from lark_store.schema.checksums import row_checksums, score_checksums, with_checksums

ROWS = pa.table(
    {
        "name": ["a", "b_1", "a"],
        "n": pa.array([1, 2, None], pa.int32()),
        "loss": pa.array([0.5, float("nan"), 0.5], pa.float32()),
        "vector": pa.FixedSizeListArray.from_arrays(pa.array(np.arange(6), pa.float16()), 2),
    }
)


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
