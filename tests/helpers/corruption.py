"""Damages of a store, each with the findings which `db check` must report."""

from __future__ import annotations

import json
import math
import shutil
import sqlite3
import tempfile
from contextlib import closing

import numpy as np
import pyarrow as pa
import pytest

from helpers.stores import sketch_table
from lark_store.schema.catalog_checksums import fill_checksums
from lark_store.schema.checksums import with_checksums
from lark_store.schema.table_schemas import FAILURES
from lark_store.schema.vectors import where


def rewrite_sketch(store, sample, change):
    """Change a question's sketch behind the store's back."""
    source = "finetune" if len(sample) == 2 else "test"
    key = f"base/{source}/chatml/{sample}"
    table = sketch_table(store)
    (row,) = table.to_lance().to_table(filter=f"row_key = '{key}'").to_pylist()
    new = row | change(row)
    new["vector"] = np.asarray(new["vector"], np.float16)
    table.delete(f"row_key = '{key}'")
    table.add(with_checksums(pa.Table.from_pylist([new], schema=table.schema)))


def check_findings(store, **options):
    return store.db_check(**options).select("severity", "what", "n").rows()


def change_catalog(store, *statements, checksums=True):
    """Change the catalog behind the store's back; without `checksums`, rows keep their old checksums."""
    if store._db.engine.dialect.name == "postgresql":
        with store._db.location.catalog.transaction() as server:
            for statement in statements:
                server.exec_driver_sql(statement)
    else:
        with closing(sqlite3.connect(store.path / "catalog.sqlite", isolation_level=None)) as db:
            for statement in statements:
                db.execute(statement)
    if checksums:
        with store._db.engine.begin() as connection:
            fill_checksums(connection)


def lance_table(store, name):
    return store._db.vectors.table(name)


def take_rows(store, name, condition):
    return lance_table(store, name).to_lance().to_table(filter=condition)


def replace_rows(store, name, condition, **columns):
    """Write rows anew with other values, and keep the indices as they were kept."""
    rows = take_rows(store, name, condition).to_pylist()
    schema = lance_table(store, name).schema
    lance_table(store, name).delete(condition)
    new = pa.Table.from_pylist([row | columns for row in rows], schema=schema)
    lance_table(store, name).add(with_checksums(new) if "checksum" in schema.names else new)
    store._db.vectors.refresh_indices(lance_table(store, name))


def change_sketch(store, sample, **columns):
    rewrite_sketch(store, sample, lambda _: columns)
    store._db.vectors.refresh_indices(sketch_table(store))


def change_vector(store, sample, make):
    rewrite_sketch(store, sample, lambda row: {"vector": make(row["vector"])})
    store._db.vectors.refresh_indices(sketch_table(store))


def duplicate_rows(store, name, condition, n=1):
    subset = take_rows(store, name, condition)
    for _ in range(n):
        lance_table(store, name).add(subset)
    store._db.vectors.refresh_indices(lance_table(store, name))


def delete_rows(store, name, condition):
    lance_table(store, name).delete(condition)


def drop_folder(store, name):
    shutil.rmtree(store.path / "vectors" / f"{name}.lance")


def drop_file(store, name, pattern):
    next((store.path / "vectors" / f"{name}.lance").glob(pattern)).unlink()


def drop_files(store, name, pattern):
    for path in (store.path / "vectors" / f"{name}.lance").glob(pattern):
        path.unlink()


def add_orphan_file(store, name):
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"half a file")
        file.flush()
        store._db.vectors.files.upload_file(file.name, f"{name}.lance/data/0101orphan.lance")


def move_to_other_table(store):
    """Let a row name a run whose sketches are in another table."""
    store.sketcher_add("other", k=256)
    run = store.ingest(["base"], ["finetune"], ["raw"], sketcher="other").units["run"].item()
    (name,) = [
        n
        for n in store._db.vectors.sketch_tables()
        if lance_table(store, n).schema.field("vector").type.list_size > 256
    ]
    replace_rows(store, name, "row_key = 'base/finetune/chatml/q1'", ingest_run=run)


def sketch_table_name(store):
    return sketch_table(store).name


def interrupt_runs(store):
    change_catalog(
        store, "UPDATE ingest_run SET status = 'running' WHERE id = 1", "UPDATE score_run SET status = 'failed'"
    )


def interrupt_snapshot(store):
    store.snapshot_create("half")
    (store.path / "snapshots" / "half.json").unlink()


def lose_version(store):
    store.snapshot_create("paper")
    lance_table(store, "samples").to_lance().tags.delete("lark-snapshot-paper")
    store.sample_remove("songs", ["sea-1"])
    store.attribute(["base", "epoch-1"], queries="test", sketcher="small")
    store.db_optimize(keep_versions_days=0)


def leave_locks(store):
    locks = store.path / "locks"
    locks.mkdir(exist_ok=True)
    (locks / "ingest-dead.json").write_text(json.dumps({"doing": "ingesting", "touches": None}))
    (locks / "score-0123.lock").touch()


def invert_codes(store):
    name = sketch_table_name(store)
    rewrite_sketch(store, "q2", lambda row: {"code": [255 - byte for byte in row["code"]]})
    store._db.vectors.refresh_indices(lance_table(store, name))


ROW = "row_key = 'base/finetune/chatml/q1'"
OTHER = {"source": "songs", "sample_id": "sea-1"}
FAILURE = {
    "ingest_run": 999,
    "checkpoint": "base",
    "source": "songs",
    "variant": "raw",
    "sample_id": "a",
    "reason": "b",
}
# Damages which `db repair` can mend: the function which makes each, and the findings of `db check`.
BREAKS = {
    "a wrong count": (
        lambda s: change_catalog(s, "UPDATE ingest_run SET n_sketched = n_sketched + 2 WHERE id = 1"),
        {("error", "count", 2)},
    ),
    "rows that were lost": (
        lambda s: delete_rows(s, sketch_table_name(s), ROW),
        {("error", "count", 1), ("error", "scores", 1)},
    ),
    "rows of no run": (
        lambda s: change_sketch(s, "q1", ingest_run=999),
        {("error", "orphan rows", 1), ("error", "count", 1), ("error", "scores", 1)},
    ),
    "a removal that was cut off": (
        lambda s: change_catalog(s, "UPDATE ingest_run SET status = 'superseded', n_sketched = 0 WHERE id = 5"),
        {("warning", "unfinished removal", 5), ("error", "scores", 1)},
    ),
    "a row of another table's run": (
        move_to_other_table,
        {("error", "fingerprint", 1), ("error", "count", 1), ("error", "scores", 1)},
    ),
    "a row that names another source": (lambda s: change_sketch(s, "q1", source="songs"), {("error", "names", 1)}),
    "a row that names no checkpoint": (lambda s: change_sketch(s, "q1", checkpoint="bass"), {("error", "names", 1)}),
    "a wrong key": (lambda s: change_sketch(s, "q1", row_key="q1"), {("error", "row key", 1)}),
    "a gradient without length": (lambda s: change_sketch(s, "q1", grad_norm=0.0), {("error", "norm", 1)}),
    "a gradient of infinite length": (lambda s: change_sketch(s, "q1", grad_norm=math.inf), {("error", "norm", 1)}),
    "a loss that is no number": (lambda s: change_sketch(s, "q1", loss=math.nan), {("error", "nan", 1)}),
    "a vector of zeros": (
        lambda s: change_vector(s, "q1", lambda v: [0.0] * len(v)),
        {("error", "norm", 1), ("warning", "code", 1)},
    ),
    "a vector that is too long": (
        lambda s: change_vector(s, "q1", lambda v: [2 * x for x in v]),
        {("error", "norm", 1)},
    ),
    "a vector with an infinite number": (
        lambda s: change_vector(s, "q1", lambda v: [math.inf, *v[1:]]),
        {("error", "nan", 1)},
    ),
    "another's code": (invert_codes, {("warning", "code", 1)}),
    "a sketch that is there twice": (
        lambda s: duplicate_rows(s, sketch_table_name(s), ROW, 2),
        {("error", "duplicate key", 2), ("error", "count", 2), ("error", "scores", 1)},
    ),
    "a sketch that two runs made": (
        lambda s: (
            duplicate_rows(s, sketch_table_name(s), ROW),
            change_catalog(s, "UPDATE ingest_run SET n_sketched = 7 WHERE id = 1"),
        ),
        {("error", "duplicate key", 1), ("error", "scores", 1)},
    ),
    "a sample that is gone": (
        lambda s: delete_rows(s, "samples", where(**OTHER)),
        {("error", "sample", 4), ("error", "scores", 1)},
    ),
    "a sample that is there twice": (
        lambda s: duplicate_rows(s, "samples", where(**OTHER)),
        {("error", "duplicate key", 1)},
    ),
    "failures of no run": (
        lambda s: lance_table(s, "failures").add(with_checksums(pa.Table.from_pylist([FAILURE], schema=FAILURES))),
        {("warning", "orphan rows", 1)},
    ),
    "a hit that was lost": (
        lambda s: delete_rows(s, "influence", "score_run = 1 AND rank = 2 AND query_id = 'q101'"),
        {("error", "scores", 1)},
    ),
    "a maximum that is another": (
        lambda s: replace_rows(s, "source_influence", "score_run = 1 AND query_id = 'q101'", max=0.5),
        {("error", "scores", 1)},
    ),
    "a query whose sums were lost": (
        lambda s: delete_rows(s, "source_influence", "score_run = 2 AND query_id = 'q101'"),
        {("error", "scores", 1)},
    ),
    "scores that are there twice": (
        lambda s: duplicate_rows(s, "source_influence", "score_run = 3"),
        {("error", "scores", 1)},
    ),
    "scores of other names": (
        lambda s: replace_rows(s, "influence", "score_run = 3", source="songs"),
        {("error", "scores", 2)},
    ),
    "scores that are no numbers": (
        lambda s: replace_rows(s, "source_influence", "score_run = 3", mean=math.nan),
        {("error", "scores", 1)},
    ),
    "a score run that counts other samples": (
        lambda s: change_catalog(s, "UPDATE score_run SET n_samples = 4 WHERE id = 1"),
        {("error", "scores", 3)},
    ),
    "scores of no run": (
        lambda s: replace_rows(s, "influence", "score_run = 3", score_run=999),
        {("error", "orphan rows", 20), ("error", "scores", 1)},
    ),
    "scores of a superseded run": (
        lambda s: change_catalog(s, "UPDATE score_run SET status = 'superseded' WHERE id = 1"),
        {("warning", "orphan rows", 24), ("warning", "orphan rows", 4)},
    ),
    "runs that were cut off": (
        interrupt_runs,
        {("note", "stale run", 6), ("note", "stale run", 28), ("note", "stale run", 24)},
    ),
    "a table of failures that is gone": (lambda s: drop_folder(s, "failures"), {("error", "missing table", 1)}),
    "a table of scores that is gone": (lambda s: drop_folder(s, "influence"), {("error", "missing table", 1)}),
    "a table of sketches that is gone": (
        lambda s: drop_folder(s, sketch_table_name(s)),
        {
            ("error", "missing table", 6),
            ("error", "missing table", 4),
            ("error", "missing table", 5),
            ("error", "scores", 2),
        },
    ),
    "an index file that is gone": (
        lambda s: drop_files(s, "samples", "_indices/*/*"),
        {("error", "index", 1)},
    ),
    "an index that is gone": (
        lambda s: lance_table(s, "samples").drop_index("source_idx"),
        {("warning", "index", 1)},
    ),
    "rows that no index has": (
        lambda s: (
            lance_table(s, "influence").delete("score_run = 999"),
            lance_table(s, "influence").add(
                take_rows(s, "influence", "score_run = 1 AND rank = 1 AND query_id = 'q100'")
            ),
            lance_table(s, "influence").delete("score_run = 1"),
            change_catalog(s, "UPDATE score_run SET status = 'superseded' WHERE id = 1"),
            lance_table(s, "influence").add(take_rows(s, "influence", "score_run = 2 AND rank = 1")),
        ),
        {("warning", "index", 1), ("warning", "orphan rows", 4), ("error", "scores", 1)},
    ),
    "a file that no version has": (lambda s: add_orphan_file(s, "samples"), {("warning", "unverified file", 1)}),
    "a snapshot that was cut off": (interrupt_snapshot, {("note", "snapshot", 1)}),
    "what killed processes left": (leave_locks, {("note", "lock", 2)}),
}
# Damages which no repair can mend.
LOSSES = {
    "a text that changed": (
        lambda s: replace_rows(s, "samples", where(**OTHER), text="another"),
        {("error", "content", 1)},
    ),
    "a sample that is there twice with two texts": (
        lambda s: (duplicate_rows(s, "samples", where(**OTHER)), change_duplicate(s)),
        {("error", "duplicate key", 1), ("error", "content", 1)},
    ),
    "samples of a source that is not in the catalog": (
        lambda s: (
            replace_rows(s, "samples", "source = 'songs' AND sample_id = 'sea-1'", source="sonnets"),
            lance_table(s, sketch_table_name(s)).delete("sample_id = 'sea-1'"),
            s.db_repair(),
        ),
        {("warning", "unknown source", 1)},
    ),
    "the samples' table is gone": (lambda s: drop_folder(s, "samples"), {("error", "missing table", 1)}),
    "a data file that is gone": (
        lambda s: drop_file(s, "samples", "data/*.lance"),
        {("error", "missing file", 1), ("error", "unreadable", 1)},
    ),
    "a version that a snapshot needs": (lose_version, {("error", "missing version", 1)}),
    "a snapshot's catalog": (
        lambda s: (s.snapshot_create("paper"), (s.path / "snapshots" / "paper.sqlite").unlink()),
        {("error", "snapshot", 1)},
    ),
    "a checkpoint's folder": (
        lambda s: change_catalog(s, "UPDATE checkpoint SET path = '/nowhere/base' WHERE id = 1"),
        {("note", "checkpoint files", 1)},
    ),
}


def change_duplicate(store):
    """Change the text of one of two samples of the same name."""
    row = take_rows(store, "samples", where(**OTHER)).to_pylist()[0]
    delete_rows(store, "samples", where(**OTHER))
    rows = [row, row | {"text": "another"}]
    lance_table(store, "samples").add(pa.Table.from_pylist(rows, schema=lance_table(store, "samples").schema))
    store._db.vectors.refresh_indices(lance_table(store, "samples"))


FOLDER_ONLY = (
    *("the samples' table is gone", "a data file that is gone", "what killed processes left", "a snapshot's catalog"),
    *("a version that a snapshot needs", "a table of failures that is gone", "a table of scores that is gone"),
    *("a table of sketches that is gone", "an index file that is gone", "a snapshot that was cut off"),
)


def damage_cases(broken):
    """Return the damages and their findings as parameters of a test."""
    return [
        pytest.param(*case, id=name, marks=[pytest.mark.folder] if name in FOLDER_ONLY else [])
        for name, case in broken.items()
    ]
