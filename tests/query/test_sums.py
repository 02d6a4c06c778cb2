"""Sums over checkpoints of any method: `top`, `attribute`, `metrics`, `ft_pt` and SQL give the same."""

from __future__ import annotations

import json

import numpy as np
import polars as pl
import pytest
from helpers.program import lark
from helpers.reference_scores import (
    BOTH_CHECKPOINTS,
    bm25_scores,
    brute_force_scores,
    centred_scores,
    query_text,
    scores_by_key,
    standardized,
    whitened_scores,
)
from helpers.texts import qa_rows, write_jsonl

from lark_store.errors import InputError, NothingToScoreError

HOW = {"queries": "test", "sketcher": "small"}
GRADIENT = ["cosine", "dot", "whitened", "centred"]
CASES = [(method, over) for method in [*GRADIENT, "hybrid"] for over in ("sum", "lr-weighted")]
RATES = {"base": 1e-4, "epoch-1": 3e-4}
QUERIES = ["q100", "q101", "q102", "q103"]


@pytest.fixture(scope="module")
def rated(scored_path, tmp_path_factory):
    """The scored store with another learning rate at each checkpoint: open, and its path."""
    from helpers.stores import copy_store
    from sqlalchemy import update

    from lark_store import Store
    from lark_store.schema.catalog import Checkpoint

    path = copy_store(scored_path, tmp_path_factory.mktemp("rated") / "lark.store")
    with Store.open(path) as opened:
        with opened._db.session() as session:
            for name, rate in RATES.items():
                session.execute(update(Checkpoint).where(Checkpoint.name == name).values(learning_rate=rate))
        yield opened


def checkpoint_scores(store, method, query, checkpoint):
    if method == "whitened":
        return whitened_scores(store, query, checkpoint)
    if method == "centred":
        return centred_scores(store, query, checkpoint)[0]
    return brute_force_scores(store, query, checkpoint=checkpoint, query_at=checkpoint, dot=method == "dot")


def summed(store, method, over, query):
    """Σ over both checkpoints by numpy; of a hybrid z(Σ) + z(bm25)."""
    gradient = "cosine" if method == "hybrid" else method
    parts = {checkpoint: checkpoint_scores(store, gradient, query, checkpoint) for checkpoint in RATES}
    weights = RATES if over == "lr-weighted" else dict.fromkeys(RATES, 1)
    results = {key: sum(weights[checkpoint] * parts[checkpoint][key] for checkpoint in RATES) for key in parts["base"]}
    if method != "hybrid":
        return results
    texts = bm25_scores(store, query_text(query))
    words = standardized({key: texts[key[0], key[2]] for key in results})
    return {key: score + words[key] for key, score in standardized(results).items()}


def close(expected):
    return pytest.approx(expected, rel=1e-3, abs=1e-3 * max(map(abs, expected.values())))


def method_name(method, over):
    return "tracin" if (method, over) == ("dot", "lr-weighted") else f"{method}-{over}"


@pytest.mark.parametrize(("method", "over"), CASES)
def test_top_sums_scores_over_checkpoints(rated, method, over):
    hits = rated.top("q101", method=method, over_checkpoints=over, k=99, **BOTH_CHECKPOINTS)
    assert scores_by_key(hits.frame) == close(summed(rated, method, over, "q101"))
    assert hits.method == method_name(method, over)
    assert hits.frame.equals(rated.top("q101", method=method_name(method, over), k=99, **BOTH_CHECKPOINTS).frame)
    if method == "hybrid":
        cosine = summed(rated, "cosine", over, "q101")
        output = hits.frame.drop("score").rename({"cosine": "score"})
        assert scores_by_key(output) == close(cosine)
        assert hits.frame["noise"].null_count() == 26


@pytest.mark.parametrize(("method", "over"), CASES)
def test_attribute_metrics_ft_pt_and_sql_agree_with_top(rated, method, over):
    name = method_name(method, over)
    report = rated.attribute(BOTH_CHECKPOINTS["checkpoint"], method=method, over_checkpoints=over, **HOW)
    assert set(report["checkpoint"]) == {"epoch-1"}
    assert set(report["method"]) == {name}
    rows = rated.sql("from influence where method = ?", [name])
    assert set(rows["over_checkpoints"]) == {"base + epoch-1"}
    assert set(rows["checkpoint"]) == {"epoch-1"}
    phi = {}
    for query in QUERIES:
        expected = summed(rated, method, over, query)
        assert scores_by_key(rows.filter(query_id=query)) == close(expected)
        for (source, variant, _), score in expected.items():
            phi.setdefault((source, variant), {}).setdefault(query, []).append(score)
    best = {key: float(np.mean([max(scores) for scores in per.values()])) for key, per in phi.items()}
    label = rated.top("q100", method=name, **BOTH_CHECKPOINTS).score
    for checkpoint in (None, "epoch-1", ["base", "epoch-1"]):
        metrics = rated.metrics(checkpoint=checkpoint, method=method, over_checkpoints=over, sketcher="small")
        mean = metrics.filter(metric="mean_max_influence")
        assert {(r["source"], r["variant"]): r["value"] for r in mean.iter_rows(named=True)} == close(best)
        assert set(metrics["scored_by"]) == set(report["scored_by"]) == {label}
    compared = rated.ft_pt(BOTH_CHECKPOINTS["checkpoint"], method=method, over_checkpoints=over, sketcher="small")
    for row in compared.iter_rows(named=True):
        assert row["ft"] == pytest.approx(max(phi[row["source"], row["variant"]][row["query_id"]]), rel=1e-3)
        against = phi[row["against_source"], row["against_variant"]][row["query_id"]]
        assert row["pt"] == pytest.approx(max(against), rel=1e-2, abs=1e-9)
    assert set(compared["scored_by"]) == {label}
    call = f"'base + epoch-1', method := '{method}', over_checkpoints := '{over}', sketcher := 'small'"
    assert rated.sql(f"from ft_pt({call})").equals(compared)
    sql = rated.sql(f"from top_influence({call}, query := 'q101', k := 99)")
    assert scores_by_key(sql) == close(summed(rated, method, over, "q101"))
    assert (set(sql["scored_by"]), set(sql["checkpoint"])) == ({label}, {"epoch-1"})


def test_sum_has_its_own_method_name(rated):
    before = rated.sql("from influence where method = 'cosine' order by all")
    rated.attribute(BOTH_CHECKPOINTS["checkpoint"], method="cosine", over_checkpoints="sum", **HOW)
    assert rated.sql("from influence where method = 'cosine' order by all").equals(before)
    assert before["over_checkpoints"].null_count() == len(before)
    runs = rated.sql(
        "select distinct method, over_checkpoints from score_runs where method like 'cosine%' order by all"
    )
    assert ("cosine", None) in runs.rows()
    assert ("cosine-sum", "base + epoch-1") in runs.rows()


def test_without_the_option_attribute_scores_each_checkpoint(scored_copy):
    report = scored_copy.attribute(BOTH_CHECKPOINTS["checkpoint"], method="centred", **HOW)
    assert sorted(set(report["checkpoint"])) == ["base", "epoch-1"]
    for checkpoint in BOTH_CHECKPOINTS["checkpoint"]:
        rows = scored_copy.sql(
            "from influence where method = 'centred' and checkpoint = ? and query_id = 'q100'", [checkpoint]
        )
        assert scores_by_key(rows) == close(checkpoint_scores(scored_copy, "centred", "q100", checkpoint))


def test_sum_of_one_checkpoint_equals_its_score(scored):
    one = scored.top("q100", checkpoint="base", sketcher="small", over_checkpoints="sum", k=99)
    assert one.score == "small · cosine, sum over base"
    assert scores_by_key(one.frame) == pytest.approx(
        scores_by_key(scored.top("q100", checkpoint="base", sketcher="small", k=99).frame)
    )


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        ({"over_checkpoints": "mean"}, "checkpoints can't be combined by `mean`"),
        ({"method": "bm25", "over_checkpoints": "sum"}, "`bm25` uses no checkpoint"),
        ({"method": "tracin", "over_checkpoints": "sum"}, "`tracin` combines checkpoints by `lr-weighted`, not by"),
        ({"method": "bm25-sum"}, "`bm25` uses no checkpoint"),
        ({"method": "cosine-mean"}, "there is no method `cosine-mean`"),
        (
            {"query_checkpoint": "base", "over_checkpoints": "sum"},
            "`cosine-sum` needs queries and samples at the same",
        ),
        ({"checkpoint": ["base", "base"], "over_checkpoints": "sum"}, "a checkpoint is given twice"),
        ({"over_checkpoints": "sum", "approximate": True}, "`cosine-sum` has no approximate search"),
        ({"over_checkpoints": "sum", "null": "signs"}, "`cosine-sum` has no signs to shuffle"),
    ],
    ids=str,
)
def test_invalid_sum_is_a_clear_error(scored, options, fact):
    with pytest.raises(InputError) as raised:
        scored.top("q100", **(BOTH_CHECKPOINTS | options))
    assert raised.value.fact.startswith(fact)
    assert raised.value.hint


def test_added_sketches_enter_the_next_sum(scored_copy, tmp_path):
    options = {"method": "cosine", "over_checkpoints": "sum", "hits": 99, **HOW}
    scored_copy.attribute(BOTH_CHECKPOINTS["checkpoint"], **options)
    scored_copy.source_add("songs", write_jsonl(tmp_path / "n.jsonl", qa_rows(3, start=50)), stage="pretrain")
    scored_copy.ingest(["base"], ["songs"], ["raw"], sketcher="small")
    for samples in (26, 29):  # first the new ones are at one checkpoint alone
        report = scored_copy.attribute(BOTH_CHECKPOINTS["checkpoint"], **options)
        assert set(report["status"]) == {"scored"}
        assert report["n_samples"].sum() == samples
        assert set(scored_copy.attribute(BOTH_CHECKPOINTS["checkpoint"], **options)["status"]) == {"current"}
        scored_copy.ingest(["epoch-1"], ["songs"], ["raw"], sketcher="small")
    rows = scored_copy.sql("from influence where method = 'cosine-sum' and query_id = 'q102'")
    parts = [
        brute_force_scores(scored_copy, "q102", checkpoint=checkpoint, query_at=checkpoint) for checkpoint in RATES
    ]
    assert scores_by_key(rows) == close({key: parts[0][key] + parts[1][key] for key in parts[0]})
    assert scored_copy.db_check().is_empty()


def test_sum_replaces_one_with_the_same_last_checkpoint(scored_copy):
    options = {"method": "cosine", "over_checkpoints": "sum", **HOW}
    scored_copy.attribute(["epoch-1"], **options)
    scored_copy.attribute(BOTH_CHECKPOINTS["checkpoint"], sources=["songs"], **options)
    with pytest.raises(InputError, match=r"scores at `epoch-1` sum over `base \+ epoch-1` and `epoch-1`"):
        scored_copy.metrics(method="cosine-sum", sketcher="small")
    assert set(
        scored_copy.metrics(checkpoint=["base", "epoch-1"], method="cosine-sum", sketcher="small")["source"]
    ) == {"songs"}
    scored_copy.attribute(BOTH_CHECKPOINTS["checkpoint"], **options)
    assert set(scored_copy.metrics(method="cosine-sum", sketcher="small")["scored_by"]) == {
        "small · cosine, sum over base + epoch-1"
    }
    with pytest.raises(
        NothingToScoreError, match=r"`dot-sum` scores of `small` sketches over `base \+ epoch-1` yet"
    ) as raised:
        scored_copy.metrics(checkpoint=["base", "epoch-1"], method="dot-sum", sketcher="small")
    options = 'checkpoints=["base", "epoch-1"], queries="test", method="dot", over_checkpoints="sum", sketcher="small"'
    assert options in raised.value.hint


def test_removed_checkpoint_removes_its_sums(scored_copy):
    scored_copy.attribute(BOTH_CHECKPOINTS["checkpoint"], method="tracin", **HOW)
    scored_copy.checkpoint_remove("base")
    assert scored_copy.sql("select count(*) from influence where method = 'tracin'").item() == 0
    assert scored_copy.sql("select count(*) from influence where method = 'cosine'").item() == 4 * 26
    assert scored_copy.db_check().is_empty()


# --- an overfitted checkpoint --------------------------------------------------------------------------------------


@pytest.fixture
def orders(scored):
    """The checkpoints with the queries' mean loss falling, and rising; and the losses."""
    rows = scored.sql("select checkpoint, avg(loss) from sketches where source = 'test' group by all order by 2 desc")
    losses = dict(rows.iter_rows())
    return [*losses], [*losses][::-1], losses


def test_sum_warns_of_rising_query_loss(scored, scored_path, orders):
    falling, rising, losses = orders
    note = (
        f"the queries' mean loss rises from {losses[rising[0]]:.3g} at `{rising[0]}` to {losses[rising[1]]:.3g} at "
        f"`{rising[1]}`: that checkpoint is overfitted and makes the sum worse\n\n"
        f"hint: leave it out: `--checkpoint {rising[0]}`"
    )
    options = {"sketcher": "small", "over_checkpoints": "sum"}
    for method in ("cosine", "centred", "hybrid"):
        assert note in scored.top("q100", checkpoint=rising, method=method, **options).notes
        assert note not in scored.top("q100", checkpoint=falling, method=method, **options).notes
    assert scored.scores(checkpoint=rising, **options).notes == (note,)
    assert f"\nnote: {note}" in scored.top("q100", checkpoint=rising, **options).how
    checkpoint = " ".join(f"-c {name}" for name in rising)
    printed = lark(f"top q100 {checkpoint} --over-checkpoints sum --sketcher small -f json", store=scored_path)
    assert printed.err.endswith(f"\nnote: {note}\n")
    assert json.loads(printed.out)


def test_attribute_warns_in_report_and_on_stderr(scored_copy, orders):
    falling, rising, _ = orders
    for order, expected in ((falling, False), (rising, True)):
        report = scored_copy.attribute(order, over_checkpoints="sum", **HOW)
        assert (report["note"].null_count() == 0) == expected
        assert ("that checkpoint is overfitted" in str(report["note"][0])) == expected
    flags = " ".join(f"-c {name}" for name in rising)
    printed = lark(
        f"attribute {flags} --over-checkpoints sum --queries test --sketcher small -f json", store=scored_copy.path
    )
    assert printed.err.count("note: the queries' mean loss rises from") == 1
    assert "note" not in printed.rows[0]
    assert pl.DataFrame(printed.rows)["status"].to_list() == ["current"] * 5


def test_notes_are_numbered(scored_copy, orders):
    flags = " ".join(f"-c {name}" for name in orders[1])
    arguments = f"{flags} --over-checkpoints sum --method centred --sketcher small -f json"
    for command in ("attribute --queries test", "ft-pt"):
        printed = lark(f"{command} {arguments}", store=scored_copy.path)
        assert printed.code == 0, printed.err
        assert printed.err.count("note: means subtracted at ") == 2
        assert printed.err.count("note: the queries' mean loss rises from") == 1


def test_unsummed_checkpoints_are_not_compared(scored_copy, orders):
    _, rising, _ = orders
    assert scored_copy.attribute(rising, **HOW)["note"].null_count() == 10
