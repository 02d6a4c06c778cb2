"""Sums over checkpoints of any method: `top`, `attribute`, `metrics`, `ft_pt` and SQL give the same."""

from __future__ import annotations

import json

import numpy as np
import polars as pl
import pytest
from conftest import qa_rows, write_jsonl
from test_cli import lark
from test_geometry import centred, whitened
from test_methods import lexical, query_text, z
from test_query import as_dict, brute_force

from lark_store.errors import InputError, NothingToScoreError

BOTH = {"checkpoint": ["base", "epoch-1"], "sketcher": "small"}
HOW = {"queries": "test", "sketcher": "small"}
GRADIENT = ["cosine", "dot", "whitened", "centred"]
CASES = [(method, over) for method in [*GRADIENT, "hybrid"] for over in ("sum", "lr-weighted")]
RATES = {"base": 1e-4, "epoch-1": 3e-4}
QUERIES = ["q100", "q101", "q102", "q103"]


@pytest.fixture(scope="module")
def rated(scored_path, tmp_path_factory):
    """The scored store with another learning rate at each checkpoint: open, and its path."""
    from conftest import copy_store
    from sqlalchemy import update

    from lark_store import Store
    from lark_store.schema.catalog import Checkpoint

    path = copy_store(scored_path, tmp_path_factory.mktemp("rated") / "lark.store")
    with Store.open(path) as opened:
        with opened._db.session() as session:
            for name, rate in RATES.items():
                session.execute(update(Checkpoint).where(Checkpoint.name == name).values(learning_rate=rate))
        yield opened


def at_one(store, method, query, at):
    if method == "whitened":
        return whitened(store, query, at)
    if method == "centred":
        return centred(store, query, at)[0]
    return brute_force(store, query, at=at, query_at=at, dot=method == "dot")


def summed(store, method, over, query):
    """Σ over both checkpoints by numpy; of a hybrid z(Σ) + z(bm25)."""
    gradient = "cosine" if method == "hybrid" else method
    parts = {at: at_one(store, gradient, query, at) for at in RATES}
    weights = RATES if over == "lr-weighted" else dict.fromkeys(RATES, 1)
    found = {key: sum(weights[at] * parts[at][key] for at in RATES) for key in parts["base"]}
    if method != "hybrid":
        return found
    texts = lexical(store, query_text(query))
    words = z({key: texts[key[0], key[2]] for key in found})
    return {key: score + words[key] for key, score in z(found).items()}


def close(expected):
    return pytest.approx(expected, rel=1e-3, abs=1e-3 * max(map(abs, expected.values())))


def name_of(method, over):
    return "tracin" if (method, over) == ("dot", "lr-weighted") else f"{method}-{over}"


@pytest.mark.parametrize(("method", "over"), CASES)
def test_top_sums_what_each_checkpoint_says(rated, method, over):
    hits = rated.top("q101", method=method, over_checkpoints=over, k=99, **BOTH)
    assert as_dict(hits.frame) == close(summed(rated, method, over, "q101"))
    assert hits.method == name_of(method, over)
    assert hits.frame.equals(rated.top("q101", method=name_of(method, over), k=99, **BOTH).frame)
    if method == "hybrid":
        cosine = summed(rated, "cosine", over, "q101")
        shown = hits.frame.drop("score").rename({"cosine": "score"})
        assert as_dict(shown) == close(cosine)
        assert hits.frame["noise"].null_count() == 26


@pytest.mark.parametrize(("method", "over"), CASES)
def test_attribute_metrics_ft_pt_and_sql_say_what_top_says(rated, method, over):
    name = name_of(method, over)
    report = rated.attribute(BOTH["checkpoint"], method=method, over_checkpoints=over, **HOW)
    assert set(report["checkpoint"]) == {"epoch-1"}
    assert set(report["method"]) == {name}
    made = rated.sql("from influence where method = ?", [name])
    assert set(made["over_checkpoints"]) == {"base + epoch-1"}
    assert set(made["checkpoint"]) == {"epoch-1"}
    phi = {}
    for query in QUERIES:
        expected = summed(rated, method, over, query)
        assert as_dict(made.filter(query_id=query)) == close(expected)
        for (source, variant, _), score in expected.items():
            phi.setdefault((source, variant), {}).setdefault(query, []).append(score)
    best = {key: float(np.mean([max(scores) for scores in per.values()])) for key, per in phi.items()}
    label = rated.top("q100", method=name, **BOTH).score
    for at in (None, "epoch-1", ["base", "epoch-1"]):
        metrics = rated.metrics(checkpoint=at, method=method, over_checkpoints=over, sketcher="small")
        mean = metrics.filter(metric="mean_max_influence")
        assert {(r["source"], r["variant"]): r["value"] for r in mean.iter_rows(named=True)} == close(best)
        assert set(metrics["scored_by"]) == set(report["scored_by"]) == {label}
    compared = rated.ft_pt(BOTH["checkpoint"], method=method, over_checkpoints=over, sketcher="small")
    for row in compared.iter_rows(named=True):
        assert row["ft"] == pytest.approx(max(phi[row["source"], row["variant"]][row["query_id"]]), rel=1e-3)
        against = phi[row["against_source"], row["against_variant"]][row["query_id"]]
        assert row["pt"] == pytest.approx(max(against), rel=1e-2, abs=1e-9)
    assert set(compared["scored_by"]) == {label}
    call = f"'base + epoch-1', method := '{method}', over_checkpoints := '{over}', sketcher := 'small'"
    assert rated.sql(f"from ft_pt({call})").equals(compared)
    sql = rated.sql(f"from top_influence({call}, query := 'q101', k := 99)")
    assert as_dict(sql) == close(summed(rated, method, over, "q101"))
    assert (set(sql["scored_by"]), set(sql["checkpoint"])) == ({label}, {"epoch-1"})


def test_a_sum_has_a_name_of_its_own_so_that_no_query_mixes_it_with_others(rated):
    before = rated.sql("from influence where method = 'cosine' order by all")
    rated.attribute(BOTH["checkpoint"], method="cosine", over_checkpoints="sum", **HOW)
    assert rated.sql("from influence where method = 'cosine' order by all").equals(before)
    assert before["over_checkpoints"].null_count() == len(before)
    runs = rated.sql(
        "select distinct method, over_checkpoints from score_runs where method like 'cosine%' order by all"
    )
    assert ("cosine", None) in runs.rows()
    assert ("cosine-sum", "base + epoch-1") in runs.rows()


def test_without_the_option_attribute_does_each_checkpoint_by_itself(scored_copy):
    report = scored_copy.attribute(BOTH["checkpoint"], method="centred", **HOW)
    assert sorted(set(report["checkpoint"])) == ["base", "epoch-1"]
    for at in BOTH["checkpoint"]:
        made = scored_copy.sql("from influence where method = 'centred' and checkpoint = ? and query_id = 'q100'", [at])
        assert as_dict(made) == close(at_one(scored_copy, "centred", "q100", at))


def test_a_sum_of_one_checkpoint_is_its_score(scored):
    one = scored.top("q100", checkpoint="base", sketcher="small", over_checkpoints="sum", k=99)
    assert one.score == "small · cosine, sum over base"
    assert as_dict(one.frame) == pytest.approx(
        as_dict(scored.top("q100", checkpoint="base", sketcher="small", k=99).frame)
    )


@pytest.mark.parametrize(
    ("how", "fact"),
    [
        ({"over_checkpoints": "mean"}, "checkpoints can't be joined by `mean`"),
        ({"method": "bm25", "over_checkpoints": "sum"}, "`bm25` looks at no checkpoint"),
        ({"method": "tracin", "over_checkpoints": "sum"}, "`tracin` joins checkpoints by `lr-weighted`, not by `sum`"),
        ({"method": "bm25-sum"}, "`bm25` looks at no checkpoint"),
        ({"method": "cosine-mean"}, "`cosine-mean` is no method"),
        (
            {"query_checkpoint": "base", "over_checkpoints": "sum"},
            "`cosine-sum` takes queries and samples from the same",
        ),
        ({"checkpoint": ["base", "base"], "over_checkpoints": "sum"}, "a checkpoint is named twice"),
        ({"over_checkpoints": "sum", "approximate": True}, "`cosine-sum` has no approximate search"),
        ({"over_checkpoints": "sum", "null": "signs"}, "`cosine-sum` has no signs to shuffle"),
    ],
    ids=str,
)
def test_what_is_no_sum_says_so(scored, how, fact):
    with pytest.raises(InputError) as raised:
        scored.top("q100", **(BOTH | how))
    assert raised.value.fact.startswith(fact)
    assert raised.value.hint


def test_sketches_that_were_added_are_in_the_next_sum(scored_copy, tmp_path):
    how = {"method": "cosine", "over_checkpoints": "sum", "hits": 99, **HOW}
    scored_copy.attribute(BOTH["checkpoint"], **how)
    scored_copy.source_add("songs", write_jsonl(tmp_path / "n.jsonl", qa_rows(3, start=50)), stage="pretrain")
    scored_copy.ingest(["base"], ["songs"], ["raw"], sketcher="small")
    for samples in (26, 29):  # first the new ones are at one checkpoint alone
        report = scored_copy.attribute(BOTH["checkpoint"], **how)
        assert set(report["status"]) == {"scored"}
        assert report["n_samples"].sum() == samples
        assert set(scored_copy.attribute(BOTH["checkpoint"], **how)["status"]) == {"current"}
        scored_copy.ingest(["epoch-1"], ["songs"], ["raw"], sketcher="small")
    made = scored_copy.sql("from influence where method = 'cosine-sum' and query_id = 'q102'")
    parts = [brute_force(scored_copy, "q102", at=at, query_at=at) for at in RATES]
    assert as_dict(made) == close({key: parts[0][key] + parts[1][key] for key in parts[0]})
    assert scored_copy.db_check().is_empty()


def test_a_sum_over_other_checkpoints_takes_the_place_of_one_that_ends_alike(scored_copy):
    how = {"method": "cosine", "over_checkpoints": "sum", **HOW}
    scored_copy.attribute(["epoch-1"], **how)
    scored_copy.attribute(BOTH["checkpoint"], sources=["songs"], **how)
    with pytest.raises(InputError, match=r"scores at `epoch-1` sum over `base \+ epoch-1` and `epoch-1`"):
        scored_copy.metrics(method="cosine-sum", sketcher="small")
    assert set(
        scored_copy.metrics(checkpoint=["base", "epoch-1"], method="cosine-sum", sketcher="small")["source"]
    ) == {"songs"}
    scored_copy.attribute(BOTH["checkpoint"], **how)
    assert set(scored_copy.metrics(method="cosine-sum", sketcher="small")["scored_by"]) == {
        "small · cosine, sum over base + epoch-1"
    }
    with pytest.raises(
        NothingToScoreError, match=r"by `dot-sum` of `small` sketches over `base \+ epoch-1` yet"
    ) as raised:
        scored_copy.metrics(checkpoint=["base", "epoch-1"], method="dot-sum", sketcher="small")
    how = "--checkpoint base --checkpoint epoch-1 --queries NAME --method dot --over-checkpoints sum"
    assert how in raised.value.hint


def test_a_sum_over_a_checkpoint_that_is_removed_goes_with_it(scored_copy):
    scored_copy.attribute(BOTH["checkpoint"], method="tracin", **HOW)
    scored_copy.checkpoint_remove("base")
    assert scored_copy.sql("select count(*) from influence where method = 'tracin'").item() == 0
    assert scored_copy.sql("select count(*) from influence where method = 'cosine'").item() == 4 * 26
    assert scored_copy.db_check().is_empty()


# --- a checkpoint that is overfitted -------------------------------------------------------------------------------


@pytest.fixture
def orders(scored):
    """The checkpoints with the queries' mean loss falling, and rising; and the losses."""
    rows = scored.sql("select checkpoint, avg(loss) from sketches where source = 'test' group by all order by 2 desc")
    losses = dict(rows.iter_rows())
    return [*losses], [*losses][::-1], losses


def test_a_sum_with_a_checkpoint_at_which_the_queries_loss_rises_warns(scored, scored_path, orders):
    falling, rising, losses = orders
    note = (
        f"the queries' mean loss rises from {losses[rising[0]]:.3g} at `{rising[0]}` to {losses[rising[1]]:.3g} at "
        f"`{rising[1]}`: that checkpoint is overfitted, and a sum is better without it\n\n"
        f"hint: leave it out: `--checkpoint {rising[0]}`"
    )
    how = {"sketcher": "small", "over_checkpoints": "sum"}
    for method in ("cosine", "centred", "hybrid"):
        assert note in scored.top("q100", checkpoint=rising, method=method, **how).notes
        assert note not in scored.top("q100", checkpoint=falling, method=method, **how).notes
    assert scored.scores(checkpoint=rising, **how).notes == (note,)
    assert f"\nnote: {note}" in scored.top("q100", checkpoint=rising, **how).how
    at = " ".join(f"-c {each}" for each in rising)
    printed = lark(f"top q100 {at} --over-checkpoints sum --sketcher small -f json", store=scored_path)
    assert printed.err.endswith(f"\nnote: {note}\n")
    assert json.loads(printed.out)


def test_attribute_warns_in_its_report_and_on_stderr(scored_copy, orders):
    falling, rising, _ = orders
    for order, expected in ((falling, False), (rising, True)):
        report = scored_copy.attribute(order, over_checkpoints="sum", **HOW)
        assert (report["note"].null_count() == 0) == expected
        assert ("that checkpoint is overfitted" in str(report["note"][0])) == expected
    at = " ".join(f"-c {each}" for each in rising)
    printed = lark(
        f"attribute {at} --over-checkpoints sum --queries test --sketcher small -f json", store=scored_copy.path
    )
    assert printed.err.count("note: the queries' mean loss rises from") == 1
    assert "note" not in printed.rows[0]
    assert pl.DataFrame(printed.rows)["status"].to_list() == ["current"] * 5


def test_each_of_several_notes_is_called_one(scored_copy, orders):
    at = " ".join(f"-c {each}" for each in orders[1])
    how = f"{at} --over-checkpoints sum --method centred --sketcher small -f json"
    for command in ("attribute --queries test", "ft-pt"):
        printed = lark(f"{command} {how}", store=scored_copy.path)
        assert printed.code == 0, printed.err
        assert printed.err.count("note: taken out at ") == 2
        assert printed.err.count("note: the queries' mean loss rises from") == 1


def test_checkpoints_that_are_not_summed_are_not_compared(scored_copy, orders):
    _, rising, _ = orders
    assert scored_copy.attribute(rising, **HOW)["note"].null_count() == 10
