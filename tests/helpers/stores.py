"""Fill, copy and read stores."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import polars as pl

from lark_store import Store
from lark_store import store as package
from lark_store.schema.table_schemas import SKETCH_PREFIX


def fill_store(store: Store, checkpoints: dict[str, Path], texts: dict[str, Path]) -> None:
    """Add the checkpoints and sources, and a sketcher `small` of 1,024 bins."""
    for epoch, (name, path) in enumerate(checkpoints.items()):
        store.checkpoint_add(name, path, epoch=epoch, learning_rate=2e-4, metrics={"accuracy": 0.5 + epoch / 10})
    store.source_add("finetune", texts["finetune"], stage="finetune", domain="medical")
    store.source_add("medical", texts["medical"], stage="pretrain", domain="medical")
    store.source_add("songs", texts["songs"], stage="pretrain", domain="entertainment")
    store.source_add("test", texts["test"], stage="query")
    store.sketcher_add("small", k=1024)


def store_label(path: Path) -> str:
    """Return the name by which another process opens the store at a path."""
    return package.location_of(path).label


def copy_store(source, target):
    """Copy an idle store to another path; returns the path."""
    if Path(source).is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("locks"))
    else:
        with tempfile.TemporaryDirectory() as folder, Store.open(source) as opened:
            Store.db_restore(opened.db_backup(Path(folder) / "backup").path, to=target)
    return Path(target)


CHECKPOINTS = ["base", "epoch-1"]
TABLES = ("samples", "sketches", "failures", "influence", "source_influence")


def count_rows(store, view, condition="true"):
    return store.sql(f"select count(*) from {view} where {condition}").item()


def store_contents(store):
    """Return every row visible to readers."""
    views = {view: sorted(map(repr, store.sql(f"select * from {view}").rows())) for view in TABLES}
    runs = {view: store.sql(f"select * from {view} order by 1").rows() for view in ("ingest_runs", "score_runs")}
    return views | runs | {"sketches": read_sketches(store).rows()}


def attribute_all(store):
    return store.attribute(CHECKPOINTS, queries="test", sketcher="small")


VIEWS = ("checkpoints", "sources", "samples", "sketches", "ingest_runs", "score_runs", "influence", "source_influence")


def read_answers(store):
    """Return the answers of a store: its views, metrics, hits and `show`."""
    rows = {view: store.sql(f"select * from {view} order by all").rows() for view in VIEWS}
    rows["metrics"] = repr(store.metrics(sketcher="small").rows())  # NaN is not equal to itself
    rows["top"] = store.top("q100", checkpoint="epoch-1", sketcher="small", k=50).frame.rows()
    overview = store.show()
    rows["show"] = {name: frame.rows() for name, frame in overview.frames().items()}
    return rows


def version_tags(store):
    results = set()
    for name in store._db.vectors.table_names():
        results |= set(store._db.vectors.table(name).to_lance().tags.list())
    return results


def read_sketches(store: Store) -> pl.DataFrame:
    """All sketches with their vectors, in order of key."""
    return pl.from_arrow(sketch_table(store).to_arrow()).sort("row_key")


def sketch_table(store):
    (name,) = [n for n in store._db.vectors.table_names() if n.startswith(SKETCH_PREFIX)]
    return store._db.vectors.table(name)


def set_run_status(store, table, status, number):
    with store._db.engine.begin() as db:
        db.exec_driver_sql(f"UPDATE {table} SET status = '{status}' WHERE id = {number}")
