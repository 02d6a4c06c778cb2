"""A catalog in PostgreSQL, vectors in S3 or another folder: created, opened, upgraded, moved; and errors.

`pytest --place cluster` runs the store's own tests there.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import psycopg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from helpers.cluster import BUCKET
from helpers.migrations import FAILING_MIGRATION, MIGRATION, NEWEST, NEXT
from helpers.program import PROGRAM, lark, run_process
from helpers.stores import copy_store
from helpers.texts import qa_rows, text_rows, write_jsonl

from lark_store import Store
from lark_store.errors import NotAStoreError, OlderSchemaError, StoreBusyError, StoreError, StoreExistsError
from lark_store.schema.backends.base import VERSION_TABLE
from lark_store.schema.backends.open import location_at
from lark_store.schema.catalog import METADATA
from lark_store.schema.faults import fault_of
from lark_store.schema.locks import maintenance, working

QUESTIONS = {
    "scores": "select * exclude (score_run) from source_influence order by all",
    "samples": "select * from samples order by all",
    "sketches": "select checkpoint, source, variant, sample_id, loss, grad_norm from sketches order by all",
    "runs": "select status, count(*) from ingest_runs group by all order by all",
}


def answers(store):
    return {name: store.sql(question).rows() for name, question in QUESTIONS.items()}


@pytest.fixture
def place(server, tmp_path):
    """The URL of a new catalog, and the location of its vectors."""
    return server.place(tmp_path), server.vectors(tmp_path)


@pytest.fixture
def cluster_store(place):
    """A fresh store in PostgreSQL and S3."""
    with Store.create(place[0], vectors=place[1]) as store:
        yield store


@pytest.fixture
def backup(scored_path, tmp_path):
    """A backup of the scored store with a snapshot in it that has other answers; and both answers."""
    with Store.open(copy_store(scored_path, tmp_path / "source")) as store:
        store.snapshot_create("before")
        then = answers(store)
        store.sample_remove("songs", ["sea-1"])
        store.attribute(["base", "epoch-1"], queries="test", sketcher="small")
        return store.db_backup(tmp_path / "backup").path, answers(store), then


# --- made and moved ------------------------------------------------------------------------------------------------


def test_migrations_build_the_schema_of_the_models(cluster_store):
    options = {"compare_type": True, "compare_server_default": True, "version_table": VERSION_TABLE}
    with cluster_store._db.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts=options)
        assert compare_metadata(context, METADATA) == []


@pytest.mark.parametrize("kind", ["postgres and s3", "postgres and a folder", "sqlite and s3", "sqlite and a folder"])
def test_store_moves_with_its_snapshots(backup, place, tmp_path, kind):
    source, now, then = backup
    to = place[0] if "postgres" in kind else str(tmp_path / "there")
    vectors = place[1] if "s3" in kind else str(tmp_path / "vectors")
    Store.db_restore(source, to=to, vectors=vectors)
    with Store.open(to) as store:
        assert answers(store) == now
        store.source_add("more", write_jsonl(tmp_path / "m.jsonl", text_rows(3, "more")), stage="pretrain")
        assert store.ingest(["base"], ["more"], ["raw"], sketcher="small").units["n_sketched"].item() == 3
        store.sample_remove("more", ["more-1"])
        assert store.db_optimize(keep_versions_days=0)["table"][0] == "eif"
        assert store.db_check().is_empty()
        again = store.db_backup(tmp_path / "again").path
        expected = answers(store)
        with Store.open(to, snapshot="before") as old:
            assert answers(old) == then
    Store.db_restore(again, to=tmp_path / "back")
    with Store.open(tmp_path / "back") as store:
        assert answers(store) == expected
        assert store.db_check().is_empty()
    with Store.open(tmp_path / "back", snapshot="before") as old:
        assert answers(old) == then


def test_program_works_without_printing_passwords(server, tmp_path):
    url, vectors = server.place(tmp_path).replace("postgres:@", "postgres:hunter2@"), server.vectors(tmp_path)
    texts = write_jsonl(tmp_path / "texts.jsonl", qa_rows(3))
    results = [
        run_process(PROGRAM, "init", "--vectors", vectors, LARK_STORE=url),
        run_process(PROGRAM, "source", "add", "train", str(texts), "--stage", "finetune", LARK_STORE=url),
        run_process(PROGRAM, "show", "-f", "json", LARK_STORE=url),
        run_process(PROGRAM, "doctor", LARK_STORE=url),
        run_process(PROGRAM, "snapshot", "create", "one", LARK_STORE=url),
        run_process(PROGRAM, "db", "check", LARK_STORE=url),
    ]
    assert [process.returncode for process in results] == [0] * len(results)
    assert (
        "created store `postgresql://***@/postgres" in results[0].stderr
        or "postgresql://postgres@" in results[0].stderr
    )
    assert all("hunter2" not in process.stdout + process.stderr for process in results)
    with Store.open(url) as store:
        assert "hunter2" not in repr(store) + store.place
        with pytest.raises(StoreError, match="has no folder"):
            _ = store.path
        with store._db.location.catalog.open() as connection:
            for table in METADATA.tables:
                assert "hunter2" not in str(connection.exec_driver_sql(f"SELECT * FROM {table}").all())


def test_existing_data_is_never_overwritten(cluster_store, place, server, tmp_path):
    with pytest.raises(StoreExistsError, match="there is a store at"):
        Store.create(place[0], vectors=place[1] + "-2")
    other = server.place(tmp_path / "other")
    with pytest.raises(StoreExistsError, match=f"`s3://{BUCKET}.*` is not empty"):
        Store.create(other, vectors=place[1])
    with psycopg.connect(other, autocommit=True) as connection:
        connection.execute("CREATE TABLE source (theirs text)")
    with pytest.raises(StoreExistsError, match="a table `source` of another program"):
        Store.create(other, vectors=place[1] + "-2")
    assert cluster_store.show().sources.is_empty()


def test_failed_create_leaves_nothing(place, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("lark_store.migrations.build", full)
        with pytest.raises(StoreError, match="no space left"):
            Store.create(place[0], vectors=place[1])
    Store.create(place[0], vectors=place[1]).close()


# --- upgrades ------------------------------------------------------------------------------------------------------


def test_upgrade_keeps_the_tables_and_upgrades_the_snapshots(cluster_store, place, next_schema):
    cluster_store.sketcher_add("small", k=256)
    cluster_store.snapshot_create("a")
    cluster_store.close()
    next_schema(MIGRATION)
    with pytest.raises(OlderSchemaError, match=f"has schema {NEWEST}; this lark-store needs {NEXT}"):
        Store.open(place[0])
    kept = Store.db_upgrade(place[0])
    assert Store.db_upgrade(place[0]) is None
    with psycopg.connect(place[0]) as connection:
        tables = {name: f'"{kept.removeprefix("schema ")}".{name}' for name in ("sketcher", VERSION_TABLE)}
        assert connection.execute(f"SELECT name FROM {tables['sketcher']} ORDER BY id").fetchall()[-1] == ("small",)
        assert connection.execute(f"SELECT version_num FROM {tables[VERSION_TABLE]}").fetchall() == [(NEWEST,)]
        assert connection.execute("SELECT note FROM source").fetchall() == []
    with location_at(place[0]).snapshots.catalog("a") as catalog:
        assert catalog.schema() == NEXT


@pytest.mark.usefixtures("cluster_store")
def test_upgrade_failing_half_way_changes_nothing(place, next_schema):
    def tables():
        query = "SELECT table_name, column_name FROM information_schema.columns WHERE table_schema = current_schema()"
        with psycopg.connect(place[0]) as connection:
            return connection.execute(query).fetchall()

    before = tables()
    next_schema(FAILING_MIGRATION)
    with pytest.raises(Exception, match="no_such_table"):
        Store.db_upgrade(place[0])
    assert tables() == before
    assert location_at(place[0]).catalog.schema() == NEWEST


def test_missing_store_is_a_clear_error(server, tmp_path):
    with pytest.raises(NotAStoreError, match="there is no lark-store at `postgresql://") as caught:
        Store.open(server.place(tmp_path))
    assert 'vectors="s3://BUCKET/PATH"' in caught.value.hint


# --- locks ---------------------------------------------------------------------------------------------------------

HOLDER = """
import sys, time
from lark_store.schema.backends.open import location_at
from lark_store.schema.locks import working
with working(location_at(sys.argv[1]), "unit", "ingesting songs", {"source": ["songs"]}):
    print("held", flush=True)
    time.sleep(600)
"""


def test_lock_ends_with_its_process_and_its_note_is_repaired(cluster_store, place):
    with subprocess.Popen([sys.executable, "-c", HOLDER, place[0]], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        location = cluster_store._db.location
        try:
            with pytest.raises(StoreBusyError, match="is ingesting it"), working(location, "unit", "ingesting it"):
                pass
            with pytest.raises(StoreBusyError, match="the store is in use: another process is ingesting songs"):
                cluster_store.db_repair()
        finally:
            holder.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 30
    while cluster_store.db_check().is_empty() and time.monotonic() < deadline:  # the server finds out
        time.sleep(0.1)
    assert cluster_store.db_check().select("severity", "what").rows() == [("note", "lock")]
    cluster_store.db_repair()
    assert cluster_store.db_check().is_empty()


def test_maintenance_is_exclusive(cluster_store, place):
    with maintenance(location_at(place[0])), pytest.raises(StoreBusyError, match="another process is removing"):
        cluster_store.db_optimize()


@pytest.mark.usefixtures("cluster_store")
def test_released_lock_is_free_at_once(place):
    location, held = location_at(place[0]), "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"
    with psycopg.connect(place[0], autocommit=True) as connection:
        for _ in range(300):  # the server finds out that a connection is closed a moment later
            with maintenance(location):
                assert connection.execute(held).fetchone() == (1,)
            assert connection.execute(held).fetchone() == (0,)


def test_work_with_a_lost_lock_stops_writing(cluster_store, place, checkpoints, tmp_path, monkeypatch):
    cluster_store.checkpoint_add("base", checkpoints["base"])
    cluster_store.source_add("songs", write_jsonl(tmp_path / "songs.jsonl", text_rows(5)), stage="pretrain")
    cluster_store.sketcher_add("small", k=256)
    ensure = type(cluster_store._db.location.locks).ensure

    def lose(locks):
        with psycopg.connect(place[0], autocommit=True) as connection:
            connection.execute("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory'")
        ensure(locks)

    with monkeypatch.context() as patch:
        patch.setattr(type(cluster_store._db.location.locks), "ensure", lose)
        with pytest.raises(StoreError, match=r"lock is lost|can't be reached"):
            cluster_store.ingest(["base"], ["songs"], ["raw"], sketcher="small")
    cluster_store.close()
    with Store.open(place[0]) as store:
        assert store.sql("select count(*) from sketches").item() == 0
        assert store.ingest(["base"], ["songs"], ["raw"], sketcher="small").units["n_sketched"].item() == 5
        assert store.db_check().is_empty()


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("store", "vectors", "fact"),
    [
        ("{url}", None, "a separate location for its vectors"),
        ("{url}", "s3://nobody-has-this/x", "there is no such bucket"),
        ("{url}", "s3://key:secret@lab/x", "contains more than a bucket and a path"),
        ("{url}", "ftp://lab/x", "vectors can't be at `ftp://lab/x`"),
        ("postgresql://127.0.0.1:9/x", "s3://lab/x", "can't be reached"),
        ("{database}&options=-csearch_path%3Dnowhere", "s3://lab/x", "has no such schema"),
        ("postgresql:///x?password=secret", "s3://lab/x", "a password can't be a parameter"),
        ("mysql://lab/x", "s3://lab/x", "a store's catalog can't be at `mysql://lab/x`"),
        ("s3://lab/x", None, "a store's catalog can't be at `s3://lab/x`"),
        ("postgresql://host:port/x", "s3://lab/x", "is not a database URL"),
        ("postgresql://me:se@cret@host/x", "s3://lab/x", "has more than one `@`"),
    ],
)
def test_wrong_location_is_an_error_and_creates_nothing(server, tmp_path, store, vectors, fact):
    url = server.place(tmp_path)
    location = store.format(url=url, database=server.database)
    result = lark("init" + (f" --vectors {vectors}" if vectors else ""), store=location)
    assert result.code == 1
    assert fact in result.err
    assert "\n\nhint: " in result.err
    assert "secret" not in result.err
    with psycopg.connect(url) as connection:
        assert connection.execute("SELECT * FROM pg_tables WHERE schemaname = current_schema()").fetchall() == []


def test_number_in_a_name_is_not_an_http_status():
    url = "http://127.0.0.1:9/lab/t6b/data/1014014034.lance"
    fault = fault_of(OSError(f"Generic S3 error: error sending request for url ({url})"))
    assert fault.fact == "the bucket of the vectors can't be used: the server does not respond"
    assert "keys" in fault_of(OSError(f"Generic S3 error: {url}: status 403")).fact


def test_time_in_a_message_is_not_an_http_status():
    error = OSError("Generic S3 error: Error performing GET http://127.0.0.1:9/lab in 403.7ms: error sending request")
    assert "does not respond" in fault_of(error).fact


def test_unreachable_bucket_is_a_clear_error(cluster_store, place):
    cluster_store.close()
    for words in (["show"], ["sql", "select * from samples"], ["db", "check"]):
        completed = run_process(PROGRAM, *words, LARK_STORE=place[0], AWS_ENDPOINT_URL="http://127.0.0.1:9")
        assert completed.returncode == 1
        assert (
            "error: the bucket of the vectors can't be used: the server does not respond\n\nhint: " in completed.stderr
        )
        assert "Traceback" not in completed.stderr
