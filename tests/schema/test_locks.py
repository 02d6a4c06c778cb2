"""Locks of a store: exclusion, and locks left by dead processes."""

from __future__ import annotations

import pytest

from lark_store import Store
from lark_store.errors import StoreBusyError
from lark_store.schema.locks import Pause, maintenance, n_scoring, paused, removing, scoring, working


@pytest.fixture(scope="module")
def created(tmp_path_factory):
    with Store.create(tmp_path_factory.mktemp("locks") / "lark.store") as store:
        yield store._db.location


@pytest.fixture
def location(created, monkeypatch):
    monkeypatch.setattr("lark_store.schema.locks._GATE_TIMEOUT_S", 0.05)
    return created


def test_lock_notes_name_everything_in_use(location):
    both = {"source": ["a", "b"], "checkpoint": ["c"]}
    other = {"source": ["d"]}
    with (
        working(location, "one", "reading b", both),
        working(location, "two", "adding d", other),
        paused(location) as pause,
    ):
        assert pause.doing == ["adding d", "reading b"]
        assert pause.touches(source="b", checkpoint="c")
        assert pause.touches(source="d")
        assert not pause.touches(source="d", checkpoint="c")  # each of them is touched, by two works
        assert not pause.touches(source="c")
        assert pause.leftovers == []
    with paused(location) as pause:
        assert (pause.works, pause.doing) == ([], [])
        assert not pause.touches(source="b")
    assert Pause([{"doing": "x", "touches": None}], []).touches(source="any")


def test_only_names_in_use_block_removal(location):
    with working(location, "one", "reading b", {"source": ["b"]}):
        with removing(location, "source", "a"), removing_twice(), removing(location, "checkpoint", "b"):
            pass
        with (
            pytest.raises(StoreBusyError, match="source `b` is in use: another process is reading b"),
            removing(location, "source", "b"),
        ):
            pass
    with removing(location, "source", "b"):
        pass
    with (
        working(location, "two", "scoring"),
        pytest.raises(StoreBusyError, match="another process is scoring"),
        removing(location, "source", "a"),
    ):
        pass


def removing_twice():
    """Expect the refusal of a second removal."""
    return pytest.raises(StoreBusyError, match="another process is removing data, optimizing or making a snapshot")


def test_equal_work_is_exclusive_and_leaves_no_lock(location):
    with working(location, "one", "reading b"):
        with (
            pytest.raises(StoreBusyError, match="another process is reading b again"),
            working(location, "one", "reading b again"),
        ):
            pass
        assert location.locks.notes() == ["one"]
    assert location.locks.notes() == []
    with working(location, "one", "reading b"):
        pass


def test_running_scorings_are_counted_and_killed_ones_forgotten(location):
    assert n_scoring(location) == 0
    with working(location, "one", "reading b"), scoring(location), scoring(location):
        location.locks.write("score-killed", {"doing": "scoring", "touches": None})
        assert n_scoring(location) == 2
        assert len(location.locks.notes()) == 3
    assert n_scoring(location) == 0


def test_unwritable_note_releases_its_lock(location, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(type(location.locks), "write", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"), working(location, "one", "reading b"):
            pass
    with working(location, "one", "reading b"):
        pass


def test_no_work_begins_during_a_removal(location):
    with removing(location, "source", "a"):
        with (
            pytest.raises(StoreBusyError, match="another process is removing data from this store") as refused,
            working(location, "one", "reading b"),
        ):
            pass
        assert refused.value.hint == "wait for it, then run the command again"
        with pytest.raises(StoreBusyError, match="optimizing or making a snapshot"), maintenance(location):
            pass
    with working(location, "one", "reading b"), maintenance(location):
        pass
