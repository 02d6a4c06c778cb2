"""Evaluations of scores with samples at one checkpoint and queries at another."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.checkpoints import save_checkpoint
from helpers.facts import HALF_SETS

from lark_store import evaluate
from lark_store.errors import InputError, NameUnknownError, NothingToScoreError
from lark_store.evaluate.baselines import BaselineContext
from lark_store.evaluate.dataset import gather, load
from lark_store.evaluate.scorers import check, matrices

ACROSS = "small:dot@base>epoch-1"
REPSIM = "repsim@base>epoch-1"
KINDS = {
    "lds": (evaluate.lds, HALF_SETS),
    "facts": (evaluate.facts, {"key": "fact", "rerank": True}),
    "causal": (evaluate.causal, {"checkpoint": "epoch-1"}),
    "tail_patch": (evaluate.tail_patch, {"checkpoint": "epoch-1", "k": 2}),
    "format": (evaluate.format, {"against_rest": ["songs"], "sources": ["finetune", "songs"]}),
    "spearman": (evaluate.spearman, {"reference": "small:dot@base"}),
}


@pytest.fixture
def material(facts_store):
    return gather(facts_store, sources=["finetune"], variants=["chatml"], queries=None, query_variant="chatml")


def context(**options):
    return BaselineContext(device="cpu", **options)


def test_matrix_is_that_of_the_store(facts_store, material):
    found = matrices(material, [ACROSS, "small@base>epoch-1", "small:dot@base", "small:dot@epoch-1>epoch-1"], context())
    options = {"sketcher": "small", "sources": ["finetune"], "method": "dot"}
    expected = facts_store.scores(material.query_ids, checkpoint="base", query_checkpoint="epoch-1", **options)
    np.testing.assert_allclose(found[ACROSS], expected.matrix, rtol=1e-5)
    np.testing.assert_allclose(found["small@base>epoch-1"], expected.matrix, rtol=1e-5)  # the default is `dot`
    assert not np.allclose(found[ACROSS], found["small:dot@base"], rtol=1e-2)
    within = facts_store.scores(material.query_ids, checkpoint="epoch-1", **options)
    np.testing.assert_allclose(found["small:dot@epoch-1>epoch-1"], within.matrix, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_takes_scores_across(facts_store, tmp_path, kind):
    run, options = KINDS[kind]
    if kind == "format":
        rows = tmp_path / "songs.jsonl"
        rows.write_text('{"id": "a", "text": "a song"}\n{"id": "b", "text": "the sea"}\n', encoding="utf-8")
        facts_store.source_add("songs", rows, stage="pretrain")
        facts_store.ingest(["base"], ["songs"], ["chatml"], sketcher="small")  # not at `epoch-1`
    outcome = run(facts_store, [ACROSS, REPSIM], out=tmp_path, max_queries=2, **options)
    assert {ACROSS, REPSIM} <= set(outcome.table["method"])
    stored = facts_store.sql("select distinct method from evaluations where evaluation = ?", [outcome.name])
    assert {ACROSS, REPSIM} <= set(stored["method"])


def test_repsim_across_is_the_cosine_of_the_penultimate_layers(material):
    def states(checkpoint, texts, layer):
        loaded, rows = load(material.store, checkpoint, "cpu"), []
        for tokens in loaded.tokens(texts):
            with torch.no_grad():
                hidden = loaded.model(torch.tensor([tokens.input_ids]), output_hidden_states=True).hidden_states
            kept = hidden[layer][0][[t for t, is_content in enumerate(tokens.is_content) if is_content]]
            rows.append(kept.mean(dim=0))
        return torch.nn.functional.normalize(torch.stack(rows), dim=1)

    specs = {REPSIM: 1, "repsim:-1@base>epoch-1": 2, "repsim:0@base>epoch-1": 0}
    found = matrices(material, list(specs), context())
    for spec, layer in specs.items():
        expected = states("epoch-1", material.queries, layer) @ states("base", material.samples, layer).T
        np.testing.assert_allclose(found[spec], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("score", "error", "message"),
    [
        ("small:dot@base>", InputError, "`small:dot@base>` is not a score\n\nhint: use `SKETCHER:METHOD@CHECKPOINT`"),
        ("small:dot>epoch-1", InputError, "with `@CHECKPOINT>QUERIES_CHECKPOINT` for queries at another one"),
        ("small:dot@base>epoch-1+base", InputError, "is not a score"),
        ("small:dot@base>epoch-1>base", InputError, "is not a score"),
        ("small:dot@base>nowhere", NameUnknownError, "no checkpoint `nowhere`"),
        ("small:dot@nowhere>base", NameUnknownError, "no checkpoint `nowhere`"),
        ("small:dot@base+epoch-1>epoch-1", InputError, "`dot-sum` needs queries and samples at the same checkpoints"),
        ("small:centred@base>epoch-1", InputError, "`centred` needs queries and samples at the same checkpoints"),
        ("small:dot@base>late", NothingToScoreError, "5 of 5 queries have no score .* no `small` sketch at `late`"),
        ("small:dot@late>base", NothingToScoreError, "12 of 12 samples have no score .* no `small` sketch at `late`"),
        ("cg:0.1@base>epoch-1", InputError, "`cg` has no score with samples and queries at two checkpoints"),
        ("bm25@base>epoch-1", InputError, "give no `>epoch-1`, or use a sketcher or `repsim`"),
        ("repsim@base+epoch-1>epoch-1", InputError, "`repsim` takes one checkpoint, not 2"),
        ("repsim:3@base>epoch-1", InputError, "the model has no layer 3"),
        ("repsim@base>nowhere", NameUnknownError, "no checkpoint `nowhere`"),
        ("repsim@base>narrow", InputError, "the models' states have 64 and 32 dimensions"),
    ],
)
def test_invalid_score_is_a_clear_error(facts_store, material, tmp_path, score, error, message):
    if "late" in score or "narrow" in score:
        width = {"hidden_size": 32} if "narrow" in score else {}
        name = "narrow" if width else "late"
        facts_store.checkpoint_add(name, save_checkpoint(tmp_path / name, seed=5, **width))
    with pytest.raises(error, match=message.replace("+", r"\+")):
        check(material, [score], context())
