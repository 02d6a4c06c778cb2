"""Drafts of running fits: when one is written, which is read, and which are deleted."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
import torch

from lark_store.ingest import fit_resume
from lark_store.ingest.fit_resume import Draft
from lark_store.schema.factor_files import draft_name, drafts


class Files:
    """Files in a folder, as a vector store keeps them."""

    def __init__(self, root):
        self.root = root
        (root / "corrections").mkdir()

    def list(self, folder):
        return [f"{folder}/{path.name}" for path in (self.root / folder).iterdir()]

    def delete_file(self, name):
        (self.root / name).unlink()

    def upload_file(self, source, name):
        shutil.copy(source, self.root / name)

    def download_file(self, name, target):
        shutil.copy(self.root / name, target)


@pytest.fixture
def vectors(tmp_path):
    return SimpleNamespace(files=Files(tmp_path))


@pytest.fixture
def clock(monkeypatch):
    """A clock that a write moves on by `write` seconds."""
    ticks = SimpleNamespace(now=10.0, write=0.0)
    upload = Files.upload_file

    def slow(files, source, name):
        ticks.now += ticks.write
        upload(files, source, name)

    monkeypatch.setattr(Files, "upload_file", slow)
    monkeypatch.setattr(fit_resume.time, "monotonic", lambda: ticks.now)
    return ticks


def draft_of(vectors, kind="adam", checkpoint=1, identity=("seed", 0)):
    return Draft(SimpleNamespace(vectors=vectors), SimpleNamespace(id=checkpoint), kind, list(identity))


def save(draft, done, number=0, n=None):
    draft.save(number, done, done if n is None else n, SimpleNamespace(sums={"a/rows": torch.full((2,), float(done))}))


def names(vectors, kind="adam"):
    return drafts(vectors, 1, kind)


def test_draft_is_written_after_a_minute_and_after_20_times_its_duration(vectors, clock):
    draft, clock.write = draft_of(vectors), 4.0
    clock.now += 59.9
    save(draft, 1)
    assert names(vectors) == []
    clock.now += 0.1
    save(draft, 2)
    assert names(vectors) == [draft_name(1, "adam", 1)]
    clock.now += 79.9  # a write took 4 seconds
    save(draft, 3)
    assert names(vectors) == [draft_name(1, "adam", 1)]
    clock.now += 0.1
    clock.write = 0.0
    save(draft, 4)
    assert names(vectors) == [draft_name(1, "adam", 2)]
    clock.now += 60
    save(draft, 5)
    assert names(vectors) == [draft_name(1, "adam", 3)]


def test_newest_draft_of_the_same_fit_is_read(vectors, clock):
    for done in range(1, 4):
        draft = draft_of(vectors)
        draft.read()
        clock.now += 60
        save(draft, done, number=done % 2, n=10 + done)
        assert names(vectors) == [draft_name(1, "adam", done)]
    state = draft_of(vectors).read()
    assert (state.number, state.n_done, state.n) == (1, 3, 13)
    assert state.sums["a/rows"].tolist() == [3.0, 3.0]


def test_drafts_of_other_fits_are_deleted_and_of_other_kinds_kept(vectors, clock):
    for identity in (("seed", 0), ("seed", 1)):
        draft = draft_of(vectors, identity=identity)
        clock.now += 60
        save(draft, 5)
    other = draft_of(vectors, kind="adam2")
    clock.now += 60
    save(other, 6)
    assert draft_of(vectors).read() is None  # the newest draft is of seed 1
    assert names(vectors) == []
    assert names(vectors, "adam2") == [draft_name(1, "adam2", 1)]
    other.discard()
    assert drafts(vectors, 1) == []


def test_older_draft_is_read_if_the_newest_is_truncated(vectors, clock):
    draft = draft_of(vectors)
    clock.now += 60
    save(draft, 7)
    (vectors.files.root / draft_name(1, "adam", 2)).write_bytes(b"broken")
    again = draft_of(vectors)
    assert again.read().n_done == 7
    assert names(vectors) == [draft_name(1, "adam", 1)]
    clock.now += 60
    save(again, 8)
    assert names(vectors) == [draft_name(1, "adam", 2)]


def test_order_of_settings_does_not_matter(vectors, clock):
    draft = draft_of(vectors, identity=({"seed": 0, "limit": 5},))
    clock.now += 75
    save(draft, 7)
    assert draft_of(vectors, identity=({"limit": 5, "seed": 0},)).read().n_done == 7
