"""Measured influence as a reference of other scores, by `evaluate spearman --reference eif`, and beside them in SQL."""

from __future__ import annotations

import pytest
from scipy.stats import spearmanr

from lark_store import evaluate
from lark_store.errors import InputError, NothingToScoreError

OPTIONS = {"sources": ["finetune"], "queries": "test"}


@pytest.mark.usefixtures("without_charts")
def test_scores_are_compared_with_measured_influence(scored_copy, tmp_path):
    scored_copy.eif("base", "finetune", queries="test", learning_rate=1e-3)
    outcome = evaluate.spearman(
        scored_copy, ["small:cosine@base", "eif"], reference="eif@base", out=tmp_path, **OPTIONS
    )
    values = outcome.values.filter(measure="spearman")
    assert set(values.filter(method="eif")["value"]) == {1.0}
    measured = dict(scored_copy.sql(
        "select query_id, list(value order by sample_id) from eif group by all"
    ).iter_rows())  # fmt: skip
    scores = scored_copy.scores(sorted(measured), checkpoint="base", sources=["finetune"], sketcher="small")
    assert scores.samples["sample_id"].is_sorted()
    for row, query in zip(scores.matrix, sorted(measured), strict=True):
        (rho,) = values.filter(method="small:cosine@base", query_id=query)["value"]
        assert rho == pytest.approx(spearmanr(row, measured[query]).statistic)


@pytest.mark.usefixtures("without_charts")
def test_one_of_several_measurements_is_named(scored_copy, tmp_path):
    scored_copy.eif("base", "finetune", queries="test", in_context=True)
    scored_copy.eif("base", "finetune", queries="test", max_samples=4, learning_rate=1e-3)
    few = {"max_samples": 4, "out": tmp_path} | OPTIONS
    with pytest.raises(InputError, match="influence was measured in 2 ways") as caught:
        evaluate.spearman(scored_copy, ["bm25"], reference="eif", **few)
    assert "`eif:finetune,optimizer=sgd,learning_rate=0.001@base`" in caught.value.hint
    names = ["eif:context@base", "eif:finetune,optimizer=sgd,learning_rate=0.001@base"]
    outcome = evaluate.spearman(scored_copy, ["bm25", names[0]], reference=names[1], **few)
    assert outcome.values.filter(measure="spearman")["method"].n_unique() == 2
    with pytest.raises(NothingToScoreError, match=r"is not measured for 24 of 24 pairs"):
        evaluate.spearman(scored_copy, ["bm25"], reference="eif:finetune,learning_rate=0.5", **OPTIONS, out=tmp_path)
    with pytest.raises(NothingToScoreError, match=r"is not measured for 8 of 24 pairs"):
        evaluate.spearman(scored_copy, ["bm25"], reference="eif:finetune", **OPTIONS, out=tmp_path)
    with pytest.raises(InputError, match="influence is measured at one checkpoint"):
        evaluate.spearman(scored_copy, ["bm25"], reference="eif@base+epoch-1", **OPTIONS, out=tmp_path)


def test_influence_joins_scores_in_sql(scored_copy):
    scored_copy.eif("base", "finetune", queries="test")
    joined = scored_copy.sql(
        "select e.query_id, corr(e.value, i.score) as r, count(*) as n from eif e join influence i "
        "using (checkpoint, source, variant, sample_id, queries, query_id) group by all"
    )
    assert joined["n"].to_list() == [6] * 4
    assert joined["r"].is_between(-1, 1).all()
