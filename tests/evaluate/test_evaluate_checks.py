"""Evaluations validate all arguments before computing anything, and cache the results of slow baselines."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from helpers.facts import HALF_SETS

from lark_store import Store, evaluate
from lark_store.errors import InputError, LarkStoreError, NameTakenError, NameUnknownError, NothingToScoreError
from lark_store.evaluate import evaluation, scorers
from lark_store.evaluate.baselines import BASELINES
from lark_store.evaluate.kinds import causal, lds
from lark_store.evaluate.scorers import Scorer

KINDS = {
    "lds": lambda *of, **options: evaluate.lds(*of, **HALF_SETS | options),
    "facts": lambda *of, **options: evaluate.facts(*of, **{"key": "fact"} | options),
    "causal": lambda *of, **options: evaluate.causal(*of, **{"checkpoint": "base"} | options),
    "tail_patch": lambda *of, **options: evaluate.tail_patch(*of, **{"checkpoint": "base", "k": 2} | options),
    "format": lambda *of, **options: evaluate.format(*of, **{"variants": ["raw", "chatml"]} | options),
    "spearman": lambda *of, **options: evaluate.spearman(*of, **{"reference": "length"} | options),
}
BAD = [
    ("trak:64@base", InputError, "k = 64 is not a power of two from 256"),
    ("trak@nowhere", NameUnknownError, "no checkpoint `nowhere`"),
    ("trak:256,sketcher=smal@base", NameUnknownError, "no sketcher `smal`"),
    ("cg:-1@base", InputError, "`damping`"),
    ("cg:0.1", InputError, "needs a model"),
    ("lissa:0.1,step=3@base", InputError, "`step` is not a setting of `lissa`"),
    ("bm25:x", InputError, "`bm25:x`: `bm25` has no settings\n\nhint: write `bm25`"),
    ("bm25plus@base", InputError, "`bm25plus@base`: `bm25plus` uses no model"),
    ("random:7", InputError, "`random:7`: `random` has no settings"),
    ("length:words@base", InputError, "`length:words@base`: `length` has no settings"),
    ("arnoldi:20,steps=3@base", InputError, "3 steps can't find 20 eigenvectors"),
    ("repsim:7@base", InputError, "the model has no layer 7"),
    ("repsim@base+epoch-1", InputError, "takes one checkpoint"),
    ("cka:smal@base", NameUnknownError, "no sketcher `smal`"),
    ("encoder:nowhere", LarkStoreError, "the encoder can't be used"),
    ("length@nowhere", NameUnknownError, "no checkpoint `nowhere`"),
    ("same:colour", InputError, "no sample has the same value of `colour`"),
    ("bm26", NameUnknownError, "no score `bm26`"),
    ("small:cosine@nowhere", NameUnknownError, "no checkpoint `nowhere`"),
    ("small:cosin@base", InputError, "there is no method `cosin`"),
    ("small:cosine@base+base", InputError, "names a checkpoint twice"),
    ("lark:cosine@base", NothingToScoreError, "there is no `lark` sketch at `base`"),
]


def forbidden(*_, **__):
    pytest.fail("something was computed")


@pytest.fixture
def computes_nothing(monkeypatch):
    """Any scoring, training or step fails the test."""
    for name, baseline in BASELINES.items():
        monkeypatch.setitem(BASELINES, name, replace(baseline, scores=forbidden))
    monkeypatch.setattr(scorers, "from_sketches", forbidden)
    monkeypatch.setattr(lds, "train", forbidden)
    monkeypatch.setattr(causal, "losses", forbidden)
    monkeypatch.setattr("lark_store.modeling.loading.load_model", forbidden)


@pytest.mark.usefixtures("computes_nothing")
@pytest.mark.parametrize(("score", "error", "message"), BAD, ids=[each[0] for each in BAD])
def test_invalid_score_fails_before_slow_ones_run(facts_store, tmp_path, score, error, message):
    queries = ["cg:0.1@base", Scorer("own", forbidden), score]
    with pytest.raises(error, match=message):
        evaluate.facts(facts_store, queries, key="fact", out=tmp_path)


@pytest.mark.usefixtures("computes_nothing")
@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_validated_first(facts_store, tmp_path, kind):
    queries = ["cg:0.1@base", Scorer("own", forbidden), "trak:64@base"]
    options = {"variants": ["chatml"], "against_rest": ["finetune"]} if kind == "format" else {}
    if kind == "format":  # a second source, from which to tell the first
        rows = tmp_path / "songs.jsonl"
        rows.write_text('{"id": "a", "text": "a song"}\n', encoding="utf-8")
        facts_store.source_add("songs", rows, stage="pretrain")
        options["sources"] = ["finetune", "songs"]
    with pytest.raises(InputError, match="k = 64 is not a power of two"):
        KINDS[kind](facts_store, queries, out=tmp_path, **options)


SAID = [
    ("lds", {"checkpoint": "nowhere"}, "no checkpoint `nowhere`"),
    ("lds", {"seeds": 0}, "half sets of 0 seeds"),
    ("lds", {"variants": ["raw", "chatml"]}, "in one variant"),
    ("facts", {"at": [0]}, "must be at least 1"),
    ("facts", {"key": "colour"}, "the same value of `colour`"),
    ("causal", {"checkpoint": "nowhere"}, "no checkpoint `nowhere`"),
    ("causal", {"learning_rate": float("nan")}, "is not a positive number"),
    ("causal", {"optimizer": "lion"}, "unknown optimizer `lion`"),
    ("tail_patch", {"checkpoint": "nowhere"}, "no checkpoint `nowhere`"),
    ("tail_patch", {"k": 99}, "k = 99 is not between 1"),
    ("tail_patch", {"learning_rate": 0.0}, "is not a positive number"),
    ("tail_patch", {"moment_samples": 0}, "at least 1 sample, not 0"),
    ("format", {"domains": ["music"]}, "`domain music` has 0 of"),
    ("spearman", {"reference": "trak:64@base"}, "k = 64 is not a power of two"),
    ("spearman", {"reference": "small:cosine@nowhere"}, "no checkpoint `nowhere`"),
]


@pytest.mark.usefixtures("computes_nothing")
@pytest.mark.parametrize(("kind", "options", "message"), SAID)
def test_arguments_are_validated_first(facts_store, tmp_path, kind, options, message):
    with pytest.raises(LarkStoreError, match=message):
        KINDS[kind](facts_store, ["cg:0.1@base", Scorer("own", forbidden)], out=tmp_path, **options)


@pytest.mark.usefixtures("computes_nothing")
@pytest.mark.parametrize("kind", KINDS)
def test_output_is_checked_first(facts_store, tmp_path, monkeypatch, kind):
    queries = [Scorer("own", forbidden)]
    if kind == "format":
        with pytest.raises(NothingToScoreError):
            KINDS[kind](facts_store, [*queries, "small:cosine@base"], out=tmp_path)
    facts_store.evaluation_keep(
        "mine",
        kind="facts",
        recipe={"another": 1},
        environment={},
        scores=pl.DataFrame(schema=evaluation._VALUES),
    )
    with pytest.raises(NameTakenError, match="evaluation `mine` already exists with"):
        KINDS[kind](facts_store, queries, out=tmp_path, name="mine")
    facts_store.snapshot_create("a")
    with Store.open(facts_store.path, snapshot="a") as then, pytest.raises(LarkStoreError, match="read-only"):
        KINDS[kind](then, queries, out=tmp_path)

    def full(**_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(evaluation, "TemporaryFile", full)
    with pytest.raises(InputError, match="can't be written to: No space left on device"):
        KINDS[kind](facts_store, queries, out=tmp_path)


@pytest.mark.usefixtures("without_charts")
def test_slow_baselines_results_survive_a_later_failure(facts_store, tmp_path, monkeypatch):
    calls = []

    def slow(material, given):
        calls.append(given.spec)
        given.note("a note of it")
        return np.arange(len(material.queries) * len(material.samples), dtype=np.float32).reshape(
            len(material.queries), -1
        )

    def fails(_):
        raise KeyboardInterrupt

    monkeypatch.setitem(BASELINES, "cg", replace(BASELINES["cg"], scores=slow))
    with pytest.raises(KeyboardInterrupt):
        evaluate.facts(facts_store, ["cg:0.1@base", Scorer("own", fails)], key="fact", out=tmp_path)
    first = evaluate.facts(facts_store, ["cg:0.1@base"], key="fact", out=tmp_path)
    assert calls == ["cg:0.1@base"]
    assert first.notes.count("a note of it") == 1
    others = (
        ("cg:0.2@base", {}),
        ("cg:0.1@epoch-1", {}),
        ("cg:0.1@base", {"seed": 1}),
        ("cg:0.1@base", {"max_queries": 2}),
    )
    for query, options in others:
        evaluate.facts(facts_store, [query], key="fact", out=tmp_path, **options)
    assert len(calls) == 5
    assert len(list(tmp_path.glob("scores-*.npz"))) == 5
