"""The figures of a planned unit, from a few rendered samples and measured times: without a store or a model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from lark_store.ingest import plan
from lark_store.ingest.plan import _departures, _unit_row, _unusable
from lark_store.ingest.units import Unit
from lark_store.modeling.encoded import UnusableSampleError
from lark_store.modeling.tokens import Tokens

SKETCHER = SimpleNamespace(k=100, dtype="float16")


def tokens(n, n_cut=0, notes=()):
    return Tokens([7] * n, [True] * n, "text", n_cut, notes=notes)


@pytest.fixture
def unit():
    parts = (SimpleNamespace(name=name) for name in ("base", "songs", "raw"))
    return Unit(*parts, n_samples=40, pending={str(i) for i in range(30)})


def probe_of(batches, per_answer=0.0):
    answers = {"base · songs · raw": per_answer, "base · songs · chatml": 99.0}
    return SimpleNamespace(seconds_per_token=0.5, seconds_per_answer=answers, batches=lambda _: batches)


def test_figures_are_scaled_from_the_tried_samples_to_the_missing_ones(unit):
    usable = [tokens(4, 5), tokens(2), tokens(2, 1)]
    row = _unit_row(unit, usable, 5, SKETCHER, probe_of([usable[:2], usable[2:]], 0.25))
    padded = (2 * 4 + 2) / 3  # a batch has the width of its first sample
    assert row == {
        "checkpoint": "base",
        "source": "songs",
        "variant": "raw",
        "n_samples": 40,
        "n_existing": 10,
        "tokens_per_sample": pytest.approx(8 / 3),
        "n_truncated": 2 * 6,
        "n_cut": 6 * 6,
        "seconds": pytest.approx(30 * (padded * 0.5 + 0.25)),
        "bytes": 30 * 100 * 2,
    }


def test_unit_without_usable_or_missing_samples_costs_nothing(unit):
    row = _unit_row(unit, [], 5, SimpleNamespace(k=100, dtype="float32"), probe_of([]))
    figures = ("tokens_per_sample", "n_truncated", "n_cut", "seconds", "bytes")
    assert [row[name] for name in figures] == [0, 0, 0, 0, 30 * 100 * 4]
    unit.pending = set()
    row = _unit_row(unit, [], 0, SKETCHER, probe_of([], 9.0))
    assert (row["n_existing"], *(row[name] for name in figures)) == (40, 0, 0, 0, 0, 0)


@pytest.mark.parametrize(("slow", "n_timed"), [(1.0, 3), (21.0, 1)])
def test_all_batches_are_timed_unless_they_are_slow(monkeypatch, slow, n_timed):
    clock, timed = SimpleNamespace(now=5.0), []

    def sketch(batch):
        timed.append(batch)
        clock.now += slow * len(batch)

    monkeypatch.setattr(plan.time, "perf_counter", lambda: clock.now)
    probe = object.__new__(plan._Probe)
    probe.device, probe._path = SimpleNamespace(type="cpu"), SimpleNamespace(sketch=sketch)
    batches = [[tokens(8)], [tokens(5), tokens(3)], [tokens(2)]]
    padded = [8, 10, 2][:n_timed]
    seconds = [slow, 2 * slow, slow][:n_timed]
    assert probe._time(batches) == pytest.approx(sum(seconds) / sum(padded))
    assert timed == batches[:n_timed]


def test_notes_have_the_first_failure_and_the_first_departure(unit):
    good, failed = ("a", tokens(3)), UnusableSampleError("too long")
    assert _unusable(unit, [good]) == []
    attempts = [good, ("b", failed), ("c", UnusableSampleError("empty"))]
    assert _unusable(unit, attempts) == ["2 of 3 samples rendered from `base · songs · raw` will fail; `b`: too long"]
    assert _departures(unit, [tokens(3)]) == []
    departing = [tokens(3), tokens(3, notes=("first", "second")), tokens(3, notes=("third",))]
    assert _departures(unit, departing) == ["2 of 3 samples rendered from `base · songs · raw`: first"]
