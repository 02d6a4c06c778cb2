"""What an open store keeps between answers: the rows of several checkpoints, and the keys of samples."""

from __future__ import annotations

import pyarrow as pa
import pytest
from helpers.texts import write_jsonl

from lark_store.query.select import keys, rows
from lark_store.schema.vectors import ROWS_PER_BATCH

OPTIONS = {"sketcher": "small", "queries": "test"}


@pytest.fixture
def read(monkeypatch):
    """The names of the reads since: `rows` of a checkpoint, `keys` of samples."""
    done = []

    def counted(module, name, kind):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given: done.append(kind) or real(*given))

    counted(rows, "_frame", "rows")
    counted(keys, "_read", "keys")
    return done


@pytest.fixture
def store(scored_copy, tmp_path):
    """The scored store, with samples that have a topic."""
    add(scored_copy, tmp_path, "web", "old")
    return scored_copy


def add(store, folder, name, topic):
    file = write_jsonl(folder / f"{name}.jsonl", [{"id": "m", "text": f"A text of {name}.", "topic": topic}])
    store.source_add(name, file, stage="pretrain")
    store.ingest(["base", "epoch-1"], [name], ["raw"], sketcher="small")


def test_answers_at_two_checkpoints_read_the_small_columns_once(store, read):
    first = [store.top("q100", checkpoint=name, **OPTIONS).frame for name in ("base", "epoch-1", "base")]
    groups = [store.groups(checkpoint=["base", "epoch-1"], by=["topic"], **OPTIONS) for _ in range(2)]
    assert read == ["rows", "rows", "keys"]
    assert first[0].equals(first[2])
    assert not first[0].equals(first[1])
    assert groups[0].equals(groups[1])


def test_changed_samples_are_read_again(store, read, tmp_path):
    before = store.groups(checkpoint="base", by=["topic"], **OPTIONS)
    add(store, tmp_path, "more", "new")
    after = store.groups(checkpoint="base", by=["topic"], **OPTIONS)
    assert read == ["rows", "keys"] * 2
    assert set(after["group_name"]) - set(before["group_name"]) == {"new"}
    assert after["n_samples"].sum() == before["n_samples"].sum() + 1


def test_cached_rows_have_a_limit(store, read, monkeypatch):
    monkeypatch.setattr(rows, "_CACHED_BYTES", 1)
    monkeypatch.setattr(keys, "_CACHED_BYTES", 1)
    for name in ("base", "base", "epoch-1", "base"):
        store.groups(checkpoint=name, by=["topic"], **OPTIONS)
    assert read == ["rows", "keys", "keys", "rows", "keys", "rows", "keys"]  # the last rows are kept


@pytest.mark.parametrize(("k", "expected"), [(64, 512), (1024, 512), (2048, 256), (8192, 64), (65_536, 64)])
def test_narrow_vectors_are_read_in_larger_batches(k, expected):
    assert rows._rows_per_batch(pa.list_(pa.float16(), k)) == expected >= ROWS_PER_BATCH
