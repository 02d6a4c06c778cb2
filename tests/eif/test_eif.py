"""`Store.eif`: stored influence equals plain torch scripts; kills and reruns give the same rows."""

from __future__ import annotations

import signal

import numpy as np
import polars as pl
import pytest
from helpers.forked import run_forked
from helpers.program import lark
from helpers.statements import N_ROLES, STATEMENTS, PlainModel
from helpers.stores import copy_store, store_label

from lark_store import Store
from lark_store.errors import InputError, NameUnknownError
from lark_store.stats.sweep import chosen, plateau

FIVE = {"variant": "text", "queries": "five"}


def matrix(store, **conditions):
    """The stored influence, (N, Q), with the ids of samples and queries."""
    rows = store.sql("select * from eif order by sample_id, query_id")
    for column, value in conditions.items():
        rows = rows.filter(pl.col(column) == value)
    wide = rows.pivot("query_id", index="sample_id", values="value").sort("sample_id")
    return wide.drop("sample_id").to_numpy(), wide["sample_id"].to_list(), wide.columns[1:]


def rows_of(store):
    return store.sql("select sample_id, query_id, mode, learning_rate, draw, loss_before, loss_after, value from eif "
                     "order by all").rows()  # fmt: skip


def test_five_statements_equal_a_plain_script(statements, checkpoints):
    report = statements.eif("base", "five", learning_rate=1e-2, **FIVE)
    influence, samples, queries = matrix(statements)
    assert samples == queries
    assert len(samples) == 5
    plain = PlainModel(checkpoints["base"])
    expected = plain.influence([STATEMENTS[name] for name in samples], 1e-2)
    assert np.abs(expected).min() > 1e-4
    np.testing.assert_allclose(influence, expected, rtol=0, atol=1e-5)
    (row,) = report.runs.rows(named=True)
    assert (row["mode"], row["optimizer"], row["learning_rate"], row["draw"]) == ("finetune", "sgd", 1e-2, None)
    counts = ("n_samples", "n_queries", "n_existing", "n_measured", "forward", "backward")
    assert [row[name] for name in counts] == [5, 5, 0, 25, 5 + 25 + 5, 5]
    before = statements.sql("select distinct query_id, loss_before from eif order by query_id")
    assert before["loss_before"].to_list() == pytest.approx([plain.loss(STATEMENTS[q]).item() for q in queries])
    assert statements.db_check().filter(severity="error").is_empty()


def test_statements_in_context_equal_a_plain_script(statements, checkpoints):
    report = statements.eif("base", "five", in_context=True, **FIVE)
    influence, samples, queries = matrix(statements, mode="context")
    plain = PlainModel(checkpoints["base"])
    expected = [[plain.in_context(STATEMENTS[z], STATEMENTS[x]) for x in queries] for z in samples]
    np.testing.assert_allclose(influence, expected, rtol=0, atol=1e-5)
    assert report.runs.select("optimizer", "learning_rate", "forward", "backward").row(0) == (None, None, 30, 0)


def test_measuring_again_adds_only_what_is_missing(statements):
    options = {"variant": "text", "queries": "squares", "max_queries": 4}
    planned = statements.eif("base", "squares", plan=True, max_samples=3, **options).runs
    assert planned.select("eif_run", "n_existing", "n_measured", "forward", "backward").row(0) == (None, 0, 12, 19, 3)
    assert statements.sql("from eif_runs").is_empty()
    first = statements.eif("base", "squares", max_samples=3, **options).runs
    stored = set(rows_of(statements))
    assert len(stored) == 12
    again = statements.eif("base", "squares", max_samples=3, **options).runs
    assert again.select("eif_run", "n_existing", "n_measured").row(0) == (first["eif_run"][0], 12, 0)
    more = statements.eif("base", "squares", **options).runs
    assert more.select("eif_run", "n_samples", "n_existing", "n_measured").row(0) == (first["eif_run"][0], 18, 12, 60)
    assert stored < set(rows_of(statements))
    fewer = statements.eif("base", "squares", max_samples=2, **options).runs
    assert fewer.select("n_samples", "n_measured").row(0) == (18, 0)
    other = statements.eif("base", "squares", max_samples=2, steps=2, **options).runs
    assert other["eif_run"][0] != first["eif_run"][0]


KILLED = """
import os, signal, sys
from lark_store import Store
def stop(progress):
    if progress.done >= int(sys.argv[2]) * 4:
        os.kill(os.getpid(), signal.SIGKILL)
with Store.open(sys.argv[1]) as store:
    store.eif("base", "squares", variant="text", queries="squares", max_samples=4, max_queries=4, on_progress=stop)
"""


@pytest.mark.folder
def test_a_killed_measurement_resumes_to_the_same_rows(statements, tmp_path):
    statements.close()
    with Store.open(copy_store(statements.path, tmp_path / "whole")) as whole:
        whole.eif("base", "squares", variant="text", queries="squares", max_samples=4, max_queries=4)
        expected = rows_of(whole)
    assert run_forked(KILLED, store_label(statements.path), "2") == -signal.SIGKILL
    with Store.open(statements.path) as store:
        assert rows_of(store) == []  # the run is not done
        assert store._db.vectors.table("eif").count_rows() == 8
        assert store.sql("select status from eif_runs").rows() == [("running",)]
        report = store.eif("base", "squares", variant="text", queries="squares", max_samples=4, max_queries=4)
        assert report.runs.select("n_existing", "n_measured").row(0) == (8, 8)
        assert rows_of(store) == expected
        assert store.db_check().filter(severity="error").is_empty()


def test_each_draw_is_a_matrix_of_its_own(statements):
    report = statements.eif("base", "squares", variant="text", queries="squares", by_draw=True, max_samples=6)
    assert report.runs["draw"].to_list() == [0, 1]
    assert sum(report.runs["n_samples"]) == 6
    mixed = statements.sql(
        "select count(*) from eif where split_part(sample_id, '-', 2) <> split_part(query_id, '-', 2)"
    )
    assert mixed.item() == 0
    pairs = statements.sql("select draw, count(*) from eif group by all order by all").rows()
    assert pairs == [(row["draw"], row["n_samples"] * N_ROLES) for row in report.runs.iter_rows(named=True)]


def test_a_sweep_names_the_plateau(statements):
    report = statements.eif("base", "five", sweep="1e-4:1e-2", **FIVE)
    assert report.runs["learning_rate"].to_list() == pytest.approx([1e-4, 10**-3.5, 1e-3, 10**-2.5, 1e-2], rel=1e-5)
    sweep = report.sweep
    assert (sweep["signal_over_noise"].diff().drop_nulls() > 0).all()
    assert sweep["rank_agreement"][-1] is None
    one, other = (matrix(statements, learning_rate=rate)[0].ravel() for rate in sweep["learning_rate"][1:3])
    from scipy.stats import spearmanr

    assert sweep["rank_agreement"][1] == pytest.approx(spearmanr(one, other).statistic)
    assert sweep["signal"][1] == pytest.approx(np.sqrt(np.mean(one**2)))
    assert sweep.filter("is_chosen")["is_plateau"].to_list() == [True]
    again = statements.eif("base", "five", sweep="1e-4:1e-2", **FIVE)
    assert again.runs["n_measured"].sum() == 0
    assert again.sweep.equals(sweep)


def test_a_sweep_leaves_out_rates_that_diverge(statements):
    few = FIVE | {"max_samples": 2, "max_queries": 2}
    report = statements.eif("base", "five", sweep="1e20:1e22", **few)
    left_out = report.sweep.filter(pl.col("signal").is_null())["learning_rate"].to_list()
    assert left_out
    for note, rate in zip(report.notes, left_out, strict=True):
        assert note.startswith(f"learning rate {rate:g} is left out: a query's loss is not finite after training on")
    statuses = statements.sql("select status, count(*) from eif_runs group by all").rows()
    assert dict(statuses)["failed"] == len(left_out)
    with pytest.raises(InputError, match="is not finite"):
        statements.eif("base", "five", learning_rate=left_out[0], **few)


@pytest.mark.parametrize(
    ("agreement", "signal", "expected"),
    [
        ([0.99, 0.99, 0.2, 0.99], [99] * 5, range(3)),
        ([0.2, 0.99, 0.99], [99] * 4, range(1, 4)),
        ([0.99, 0.99], [1, 99, 99], range(1, 3)),
        ([0.99, 0.2, 0.99], [99] * 4, range(2)),
        ([0.2, 0.2], [99] * 3, range(0)),
        ([float("nan"), 0.99, 0.99], [float("nan"), 99, 99, float("nan")], range(1, 3)),
    ],
)
def test_the_plateau_is_the_longest_stable_range(agreement, signal, expected):
    assert list(plateau(agreement, signal)) == list(expected)
    assert chosen(plateau(agreement, signal)) == (expected[(len(expected) - 1) // 2] if expected else None)


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        ({"variant": "raw"}, "are the model's own predictions, and training changes them"),
        ({"queries": None}, "the store has 0 sources of stage `query`: none"),
        ({"sweep": "1e-6"}, '`sweep="1e-6"` is not LOW:HIGH'),
        ({"sweep": "1e-2:1e-6"}, '`sweep="1e-2:1e-6"` is no range of learning rates'),
        ({"sweep": "1e-6:1e-2", "in_context": True}, "in context there is no learning rate"),
        ({"optimizer": "lion"}, "unknown optimizer `lion`"),
        ({"learning_rate": 0.0}, "the learning rate 0.0 is not a positive number"),
        ({"steps": 0}, "`steps` must be at least 1, not 0"),
        ({"max_samples": 0}, "`max_samples` must be at least 1, not 0"),
    ],
)
def test_impossible_measurements_are_refused(statements, options, fact):
    with pytest.raises(InputError) as caught:
        statements.eif("base", "five", **FIVE | options)
    assert fact in caught.value.fact
    assert statements.sql("from eif_runs").is_empty()


def test_names_are_checked(statements):
    for names in (("none", "five"), ("base", "none")):
        with pytest.raises(NameUnknownError):
            statements.eif(*names, **FIVE)


def test_statements_without_a_draw_are_refused(store):
    with pytest.raises(InputError, match="has no `draw` in its metadata"):
        store.eif("base", "finetune", queries="test", by_draw=True)


def test_a_pair_longer_than_the_context_is_refused(statements):
    long = " ".join(["harbour"] * 130)
    statements.source_add("long", [{"id": f"long-{i}", "text": f"{long} {i}"} for i in range(2)], stage="query")
    statements.variant_add("short", template="raw", targets="text", max_length=200)
    with pytest.raises(InputError, match="tokens together, but the model's context holds 256"):
        statements.eif("base", "long", queries="long", variant="short", in_context=True)


def test_samples_that_cannot_be_rendered_are_left_out(statements):
    rows = [{"id": "a", "text": "A song."}, {"id": "b", "text": "a"}]
    statements.source_add("odd", rows, stage="query")
    report = statements.eif("base", "five", **FIVE | {"queries": "odd", "max_samples": 1})
    assert report.failures.select("source", "sample_id").rows() == [("odd", "b")]
    assert report.runs.select("n_samples", "n_queries").row(0) == (1, 1)


def test_questions_and_answers_are_measured_in_their_usual_variant(store):
    report = store.eif("base", "finetune", max_samples=2)
    assert report.runs.select("queries", "n_samples", "n_queries").row(0) == ("test", 2, 4)


@pytest.mark.folder
def test_the_command_says_the_cost_and_the_chosen_rate(statements):
    statements.close()
    line = "eif -c base -s squares -q squares -v text --max-samples 3 --max-queries 3 --sweep 1e-3:1e-2"
    planned = lark(f"{line} --plan -f json", store=statements.path)
    assert planned.code == 0
    assert "27 pairs to measure: 45 forward and 9 backward passes of one sample each" in planned.err
    measured = lark(f"{line} -f json", store=statements.path)
    assert measured.code == 0, measured.err
    assert len(measured.rows["sweep"]) == 3
    assert "the plateau is 0.001 to" in measured.err
    assert "chosen: `--learning-rate 0.00" in measured.err
