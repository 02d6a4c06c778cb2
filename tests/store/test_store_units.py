"""Unit tests of writing and checking a store, without a model or a store."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest

from lark_store.core.names import check_name
from lark_store.core.retry import retry
from lark_store.core.text import coded, joined
from lark_store.errors import InputError, NameInvalidError, StoreBusyError, StoreError
from lark_store.ingest import writer
from lark_store.ingest.sources import _chunks
from lark_store.maintenance.delete_rows import delete_rows
from lark_store.modeling.sample import Sample
from lark_store.readers.json_text import parse
from lark_store.schema.table_schemas import TABLES, embedding_schema, kind_of, projection, sketch_schema, sketch_table
from lark_store.schema.vectors import VectorStore, quoted, where

# --- writing ----------------------------------------------------------------------------------------------------------


def test_samples_are_written_in_batches_by_number_and_size(monkeypatch):
    monkeypatch.setattr("lark_store.ingest.sources.ROWS_PER_TEXT_BATCH", 3)
    monkeypatch.setattr("lark_store.ingest.sources._CHUNK_CHARACTERS", 10)

    def sizes(*samples):
        return [len(chunk) for chunk in _chunks(iter(samples))]

    short, pair = Sample("a", text="x"), Sample("b", prompt="12345", response="12345")
    assert sizes() == []
    assert sizes(*[short] * 7) == [3, 3, 1]
    assert sizes(short, pair, short, short, pair, pair) == [2, 3, 1]
    assert sizes(*[Sample("c", prompt="1234", response="1")] * 4) == [2, 2]


@pytest.mark.parametrize(
    ("k", "dtype", "rows"),
    [(65_536, "float16", 64), (1 << 20, "float32", 64), (1 << 21, "float32", 32), (1 << 27, "float32", 1)],
)
def test_commit_has_64_rows_or_fewer_long_ones(k, dtype, rows):
    table = SimpleNamespace(name="t", count_rows=lambda _: 0)
    db = SimpleNamespace(vectors=SimpleNamespace(sketches=lambda *_, **__: table, table=lambda _: table))
    ranks = SimpleNamespace(once=lambda work: work(), is_first=True, size=1)
    sketch_writer = writer.SketchWriter(db, SimpleNamespace(id=1), "f", SimpleNamespace(k=k, dtype=dtype), {}, ranks)
    assert sketch_writer.batch_rows == rows


def test_columns_that_may_be_null():
    schemas = TABLES | {"sketches": sketch_schema(8, "float16"), "embeddings": embedding_schema(8)}
    samples = ["prompt", "response", "text", "label", "checksum", "completion", "messages", "tools"]
    assert {name: [field.name for field in schema if field.nullable] for name, schema in schemas.items()} == {
        "samples": samples,
        "failures": ["checksum"],
        "influence": [],
        "source_influence": ["checksum"],
        "probes": ["is_correct", "n_correct", "answer_logprob", "n_tokens", "output", "reason"],
        "eif": [],
        "sketches": ["n_cut", "answer", "answer_tokens", "checksum"],
        "embeddings": ["checksum"],
    }


def test_columns_that_an_older_table_lacks_are_read_as_null():
    schema = sketch_schema(8, "float16")
    names = ["sample_id", "n_cut", "answer"]
    assert projection(schema, iter(names)) == names
    older = schema.remove(schema.get_field_index("n_cut"))
    expected = {"sample_id": "`sample_id`", "n_cut": "CAST(NULL AS INT)", "answer": "`answer`"}
    assert projection(older, iter(names)) == expected
    assert projection(older, ["sample_id", "nonsense"]) == ["sample_id", "nonsense"]  # Lance refuses it
    assert [kind_of(name) for name in (sketch_table("0123456789"), "embeddings_e5", "samples", "influence")] == [
        "sketches",
        "embeddings",
        "samples",
        "influence",
    ]
    assert sketch_table("0123456789") == "sketches_01234567"


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_vectors_and_codes_of_a_sketch_have_their_types(dtype):
    fields = {name: sketch_schema(20, dtype).field(name).type for name in ("vector", "code")}
    assert {name: (str(kind.value_type), kind.list_size) for name, kind in fields.items()} == {
        "vector": ("halffloat" if dtype == "float16" else "float", 20),
        "code": ("uint8", 3),
    }


class Unreadable(VectorStore):
    """Tables that can't be opened, for one reason."""

    def __init__(self, error, versions=None):
        super().__init__("nowhere", versions)
        self.error = error

    def _open(self, name, version):  # noqa: ARG002
        raise self.error


@pytest.mark.parametrize("kind", [ValueError, RuntimeError, OSError])
def test_snapshot_with_an_unreadable_table_is_a_clear_error(kind):
    store = Unreadable(kind("no such version"), {"samples": 3})
    with pytest.raises(StoreError, match="version 3 of the table `samples`, which the snapshot needs, can't be read"):
        store.table("samples")
    with pytest.raises(ValueError, match="the snapshot has no table failures"):
        store.table("failures")
    assert (store.has("samples"), store.has("failures")) == (True, False)


def test_only_a_missing_table_is_missing():
    missing = Unreadable(ValueError("Table 'samples' was not found"))
    assert not missing.has("samples")
    with pytest.raises(StoreError, match="the table `samples` of the store is missing"):
        missing.table("samples")
    assert not Unreadable(FileNotFoundError("Not found: samples.lance")).has("samples")
    for error in (ValueError("timeout"), FileNotFoundError("no network")):
        store = Unreadable(error)
        for read in (store.has, store.table):
            with pytest.raises(type(error), match=str(error)):
                read("samples")


def test_tables_of_vectors_are_created_once(tmp_path, monkeypatch):
    store = VectorStore(str(tmp_path))
    assert store.use_indices
    assert store.embedding_tables() == []
    for _ in range(2):
        assert store.embeddings("embeddings_e5", 4).name == "embeddings_e5"
        assert store.sketches("01234567", k=8, dtype="float16").name == "sketches_01234567"
    monkeypatch.setattr(store, "has", lambda _: False)  # another process has just created it
    assert store.sketches("01234567", k=8, dtype="float16").count_rows() == 0
    assert store.table_names() == ["embeddings_e5", "sketches_01234567"]
    monkeypatch.undo()
    assert (store.embedding_tables(), store.sketch_tables()) == (["embeddings_e5"], ["sketches_01234567"])
    assert VectorStore(str(tmp_path / "none")).table_names() == []


def test_filters_follow_lance_syntax():
    assert quoted("it's") == "'it''s'"
    assert where(a="x", b=3, c=["y'", "z"], d=[1]) == "a = 'x' AND b = 3 AND c IN ('y''', 'z') AND d IN (1)"
    assert where(a=[]) == "false"


@pytest.mark.parametrize("name", ["a", "0", "a" * 100, "epoch-2", "a.b_c-d"])
def test_valid_slugs_are_accepted(name):
    assert check_name(name) == name


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("A b", "try `a-b`"),
        ("_a_", "try `a`"),
        ("a" * 101, f"try `{'a' * 100}`"),
        ("é!x", "try `x`"),
        ("!", "for example `epoch-2`"),
        ("a\n", "try `a`"),
    ],
)
def test_invalid_slug_is_refused_with_the_nearest(name, hint):
    with pytest.raises(NameInvalidError, match="is not a valid name") as refused:
        check_name(name)
    assert refused.value.hint == hint


# --- commits ----------------------------------------------------------------------------------------------------------


def test_conflicting_commit_is_retried_a_few_times(monkeypatch):
    waits, tries = [], []
    monkeypatch.setattr("time.sleep", waits.append)

    def work(fail, error):
        tries.append(1)
        if len(tries) <= fail:
            raise error
        return "done"

    assert retry(lambda: work(2, RuntimeError("Commit Conflict")), "rows can't go") == "done"
    assert (len(tries), waits) == (3, [0.1, 0.2])
    tries.clear()
    with pytest.raises(OSError, match="disk full"):
        retry(lambda: work(2, OSError("disk full")), "rows can't go")
    assert len(tries) == 1
    tries.clear()
    with pytest.raises(StoreBusyError, match=r"rows can't go: 6 attempts conflicted with other processes"):
        retry(lambda: work(99, ValueError("commit conflict")), "rows can't go")
    assert len(tries) == 6


class Indexed:
    """A table that notes how its indices are built."""

    name = "samples"

    def __init__(self, errors=(), rows=1):
        self.errors, self.rows, self.calls = list(errors), rows, []

    def count_rows(self):
        return self.rows

    def list_indices(self):
        if self.errors:
            raise self.errors.pop(0)
        return [SimpleNamespace(columns=["source"])]

    def create_index(self, column, config):
        self.calls.append((column, type(config).__name__))

    def to_lance(self):
        return SimpleNamespace(optimize=SimpleNamespace(optimize_indices=lambda: self.calls.append("optimize")))

    def checkout_latest(self):
        self.calls.append("latest")


def test_missing_indices_are_built_and_all_updated(monkeypatch):
    waits = []
    monkeypatch.setattr("time.sleep", waits.append)
    vectors = VectorStore("memory://")
    built = [("sample_id", "BTree"), "optimize", "latest"]
    for n in (0, 1, 4):
        table = Indexed([RuntimeError("a commit Conflict")] * n)
        waits.clear()
        vectors.refresh_indices(table)
        assert table.calls == ["latest"] * n + built
        assert waits == [0.1 * 2**i for i in range(n)]
    table = Indexed([RuntimeError("conflict")] * 9)
    vectors.refresh_indices(table)  # then it is left to the others
    assert (len(table.errors), table.calls) == (4, ["latest"] * 5)
    with pytest.raises(RuntimeError, match="disk"):
        vectors.refresh_indices(Indexed([RuntimeError("disk")]))
    table = Indexed(rows=0)
    vectors.refresh_indices(table)
    assert table.calls == []
    table = Indexed()
    monkeypatch.setattr(table, "list_indices", list)
    vectors.refresh_indices(table)
    assert table.calls == [("source", "Bitmap"), *built]


@pytest.mark.parametrize("n", [0, 1, 2, 5])
def test_all_rows_are_deleted_in_batches(monkeypatch, n):
    gone = []
    db = SimpleNamespace(vectors=SimpleNamespace(table=lambda _: SimpleNamespace(delete=gone.append)))
    monkeypatch.setattr("lark_store.maintenance.delete_rows._ROWS_PER_DELETE", 2)
    delete_rows(db, "t", np.arange(10, 10 + n, dtype=np.uint64))
    ids = [condition.removeprefix("_rowid IN (").removesuffix(")").split(", ") for condition in gone]
    assert [int(i) for subset in ids for i in subset] == list(range(10, 10 + n))
    assert all(len(subset) <= 2 for subset in ids)


class Written:
    """A fake database of a writer: keeps the appended rows."""

    def __init__(self):
        self.rows, self.failed = [], []
        self.vectors = self
        self.location = SimpleNamespace(locks=SimpleNamespace(ensure=lambda: None))

    def sketches(self, *_, **__):
        return SimpleNamespace(name="sketches", count_rows=lambda _: len(self.rows), schema=sketch_schema(8, "float32"))

    def table(self, _):
        return SimpleNamespace(name="failures", count_rows=lambda _: 0)

    def append(self, table, data):
        (self.failed if table.name == "failures" else self.rows).extend(data.to_pylist())
        return 1

    def refresh_indices(self, _):
        pass

    def session(self):
        return nullcontext(SimpleNamespace(merge=lambda _: None))


FACTS = {"n_tokens": 3, "n_loss_tokens": 2, "loss": 1.0, "grad_norm": 2.0}


@pytest.fixture
def written(monkeypatch):
    """A writer of rows of 8 bins, its database, and a fake clock."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr("lark_store.ingest.writer.time.monotonic", lambda: clock.now)
    db, run = Written(), SimpleNamespace(id=1, seconds=None)
    names = {"checkpoint": "c", "source": "s", "variant": "v"}
    ranks = SimpleNamespace(once=lambda work: work(), is_first=True, size=1)
    sketch_writer = writer.SketchWriter(db, run, "f", SimpleNamespace(k=8, dtype="float32"), names, ranks)
    return sketch_writer, db, clock


def put(sketch_writer, number):
    sketch_writer.put(f"id-{number}", np.ones(8, np.float32), FACTS)


def test_rows_are_committed_at_64_or_after_30_seconds(written):
    sketch_writer, db, clock = written
    for number in range(63):
        put(sketch_writer, number)
    assert not db.rows
    put(sketch_writer, 63)
    assert [row["row_key"] for row in db.rows] == [f"c/s/v/id-{number}" for number in range(64)]
    assert {(row["n_tokens"], row["n_loss_tokens"], row["loss"], row["grad_norm"]) for row in db.rows} == {
        (3, 2, 1.0, 2.0)
    }
    clock.now += 30
    put(sketch_writer, 64)
    assert len(db.rows) == 64
    clock.now += 0.1
    put(sketch_writer, 65)
    assert len(db.rows) == 66
    put(sketch_writer, 66)  # counted from the last commit
    assert len(db.rows) == 66
    sketch_writer.finish("done", 1.5)
    assert len(db.rows) == 67
    assert (sketch_writer.run.status, sketch_writer.run.n_sketched, sketch_writer.run.seconds) == ("done", 67, 1.5)


def test_earlier_rows_of_a_run_count(written):
    sketch_writer, _, _ = written
    sketch_writer.n_before = 3
    for number in range(3):
        put(sketch_writer, number)
    sketch_writer.commit()
    assert (sketch_writer.run.n_sketched, sketch_writer.n_sketched) == (6, 3)


def test_failures_are_committed_by_64(written):
    sketch_writer, db, _ = written
    for number in range(64):
        assert not db.failed
        sketch_writer.fail(f"id-{number}", "too long")
    assert [row["sample_id"] for row in db.failed] == [f"id-{number}" for number in range(64)]
    assert {(row["ingest_run"], row["source"], row["reason"]) for row in db.failed} == {(1, "s", "too long")}
    assert (sketch_writer.run.n_sketched, sketch_writer.run.n_failed) == (0, 64)


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (None, "done", None),
        (KeyboardInterrupt(), "interrupted", None),
        (ValueError("odd"), "failed", "ValueError: odd"),
    ],
)
def test_run_is_closed_with_its_status_and_counts(written, monkeypatch, error, status, reason):
    sketch_writer, db, _ = written
    times = iter([10.0, 12.5])
    monkeypatch.setattr("lark_store.ingest.writer.time.perf_counter", lambda: next(times))
    sketch_writer.run.seconds = 4.0
    with pytest.raises(type(error)) if error else nullcontext(), sketch_writer.running():
        put(sketch_writer, 0)
        if error:
            raise error
    assert (sketch_writer.run.status, sketch_writer.run.error, sketch_writer.run.seconds) == (status, reason, 6.5)
    assert (sketch_writer.run.n_sketched, len(db.rows)) == (1, 1)
    assert sketch_writer.seconds == (0.0 if error else 2.5)


@pytest.mark.parametrize(("status", "gathers"), [("done", 1), ("failed", 0), ("interrupted", 0)])
def test_rank_of_a_stopped_run_does_not_wait_for_others(written, status, gathers):
    sketch_writer, _, _ = written
    calls = []
    gather = lambda item: calls.append(item) or [item, ([], item[1], [])]  # noqa: E731
    sketch_writer.ranks = SimpleNamespace(is_first=True, size=2, gather=gather)
    for number in range(70):
        sketch_writer.fail(f"id-{number}", "too long")  # never committed by one rank alone
    sketch_writer.finish(status, 1.0)
    assert len(calls) == gathers
    assert sketch_writer.run.n_failed == 70 * gathers


# --- words and JSON ---------------------------------------------------------------------------------------------------


def test_words_of_a_list_are_joined():
    assert [joined("abcd"[:n], "or") for n in range(1, 5)] == ["a", "a or b", "a, b or c", "a, b, c or d"]
    assert coded(iter(["a", "b c"])) == ["`a`", "`b c`"]


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ('{"a" 1}', "row 1 is not JSON: Expecting ':' delimiter at column 6"),
        ('{"b": {"a": 1, "c": 2, "a": 3, "c": 4}}', "row 1 repeats the key `a`"),
        (r'["\ud83d\ude42", "x\ude42"]', r"row 1 holds `\ude42`, an unpaired surrogate"),
        ("[" * 100_000, "row 1 is nested too deeply"),
        ("9" * 5000, "row 1 holds an integer of more than 4300 digits"),
    ],
)
def test_json_that_python_would_change_is_refused(text, fact):
    with pytest.raises(InputError) as caught:
        parse(text, "row 1", "save it as JSON")
    assert caught.value.fact == fact
    assert parse(r'{"a": "\ud83d\ude42"}', "row 1", "") == {"a": "🙂"}
