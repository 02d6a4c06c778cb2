"""The windows of an ingest: each rank sketches its share, and all commit equally often. Without a store or a model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from lark_store.ingest import worker
from lark_store.ingest.worker import UnitRun
from lark_store.modeling.encoded import UnusableSampleError
from lark_store.modeling.sample import Sample
from lark_store.modeling.tokens import Tokens


class Writer:
    n_failed = 0

    def __init__(self):
        self.sketched, self.failed, self.commits = [], [], []

    def add(self, sample_id, tokens, sketch):
        assert sketch == len(tokens.input_ids)
        self.sketched.append(sample_id)

    def fail(self, sample_id, reason):
        self.failed.append((sample_id, reason))
        self.n_failed += 1

    def commit(self):
        self.commits.append(len(self.sketched) + len(self.failed))


def run_of(n, rank, n_ranks, *, predicts=False):
    """Sketch a rank's share of n samples, of which each fifth can't be rendered; return its writer and progress."""
    run, seen = object.__new__(UnitRun), []
    run.unit = SimpleNamespace(pending={str(i) for i in range(n)}, label="unit")
    run.db, run.ranks, run.predicts = None, SimpleNamespace(size=n_ranks, rank=rank), predicts
    run.context = SimpleNamespace(
        on_progress=lambda p: seen.append((p.done, p.total, p.failed)),
        spec=SimpleNamespace(compute=SimpleNamespace(batch_tokens=6)),
        device=SimpleNamespace(type="cpu"),
    )
    run.answers = {"1": [5]}
    path = SimpleNamespace(largest=None, sketch=lambda batch: [len(tokens.input_ids) for tokens in batch])
    run.pipeline = SimpleNamespace(predict="by the model", path=path)

    def attempt(sample, predict):
        assert (predict == "by the model") == (sample.sample_id != "1")
        i = int(sample.sample_id)
        return UnusableSampleError("odd") if i % 5 == 4 else Tokens([0] * (1 + i % 3), [True], "text")

    run.renderer = SimpleNamespace(attempt=attempt)
    writer = Writer()
    run._sketch_all(writer)
    return writer, seen


@pytest.fixture(autouse=True)
def samples(monkeypatch):
    monkeypatch.setattr(worker, "WINDOW", 3)
    monkeypatch.setattr(worker, "_PREDICTED_WINDOW", 2)
    by_number = lambda _, unit: (Sample(str(i), text="a") for i in range(len(unit.pending)))  # noqa: E731
    monkeypatch.setattr(worker, "read_samples", by_number)


@pytest.mark.parametrize("predicts", [False, True])
@pytest.mark.parametrize("n_ranks", [1, 2, 3])
@pytest.mark.parametrize("n", [1, 3, 7, 12, 13, 20])
def test_every_sample_is_sketched_by_one_rank(n, n_ranks, predicts):
    writers = [run_of(n, rank, n_ranks, predicts=predicts)[0] for rank in range(n_ranks)]
    for rank, writer in enumerate(writers):
        share = range(rank, n, n_ranks)
        assert sorted(map(int, writer.sketched)) == [i for i in share if i % 5 != 4]
        assert writer.failed == [(str(i), "odd") for i in share if i % 5 == 4]
        size = 2 if predicts else 3
        n_windows = -(-n // (size * n_ranks))
        shares = [min(size * (i + 1), len(share)) for i in range(n_windows)]
        assert writer.commits == ([] if n_ranks == 1 else shares)  # as many in each rank


def test_progress_counts_all_ranks_samples():
    writer, seen = run_of(8, 0, 1)
    assert seen == [(2, 8, 0), (3, 8, 0), (6, 8, 1), (8, 8, 1)]
    assert writer.n_failed == 1
    _, seen = run_of(8, 1, 2)
    assert [(done, total) for done, total, _ in seen][-1] == (8, 8)
    assert all(done % 2 == 0 for done, _, _ in seen)
