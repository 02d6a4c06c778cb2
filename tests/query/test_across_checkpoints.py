"""Scores with samples at one checkpoint and queries at another, in every answer; never mixed with the others."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from helpers.program import lark
from helpers.stores import copy_store
from polars.testing import assert_frame_equal

from lark_store import Store
from lark_store.errors import InputError, NameUnknownError, NothingToScoreError

QUERIES = ["q100", "q101", "q102", "q103"]
SMALL = {"sketcher": "small"}
ACROSS = {"query_checkpoint": "epoch-1", **SMALL}
GROUP = ["source", "variant"]


@pytest.fixture(scope="module")
def path(scored_path, tmp_path_factory):
    """A store scored by `dot` within and across its two checkpoints, in both directions."""
    place = copy_store(scored_path, tmp_path_factory.mktemp("across") / "copy")
    with Store.open(place) as opened:
        opened.attribute(["base", "epoch-1"], queries="test", method="dot", **SMALL)
        opened.attribute(["base"], queries="test", **ACROSS)
        opened.attribute(["epoch-1"], queries="test", query_checkpoint="base", **SMALL)
    return place


@pytest.fixture
def both(path):
    with Store.open(path) as opened:
        yield opened


def best(store, query, **options):
    """Return the highest score of each group, from the ranking of all samples."""
    frame = store.top(query, k=1000, **options).frame
    return {tuple(row[:2]): row[2] for row in frame.group_by(GROUP).agg(pl.col("score").max()).rows()}


def test_metrics_are_the_means_of_the_scores_across(both):
    frame = both.metrics(checkpoint="base", **ACROSS)
    assert set(frame.select("checkpoint", "query_checkpoint", "scored_by").rows()) == {
        ("base", "epoch-1", "small · dot")
    }
    phi = [best(both, query, checkpoint="base", **ACROSS) for query in QUERIES]
    within = [best(both, query, checkpoint="base", method="dot", **SMALL) for query in QUERIES]
    means = frame.filter(metric="mean_max_influence").select(*GROUP, "value").rows()
    assert len(means) == 5
    for *group, value in means:
        assert value == pytest.approx(np.mean([each[tuple(group)] for each in phi]), rel=1e-5)
        assert value != pytest.approx(np.mean([each[tuple(group)] for each in within]), rel=1e-3)
    wins = frame.filter(metric="ft_wins", against_source="medical", against_variant="raw")["value"].item()
    assert wins == np.mean([each["finetune", "chatml"] > each["medical", "raw"] for each in phi])


def test_sketch_error_across_is_of_the_norms_at_both_checkpoints(both):
    frame = both.metrics(checkpoint="base", view="influence", **ACROSS)
    row = frame.filter(source="finetune").row(0, named=True)
    norms = {
        (checkpoint, name): norm
        for checkpoint, name, norm in both.sql(
            "select checkpoint, sample_id, grad_norm from sketches where variant = 'chatml'"
        ).rows()
    }
    noises = []
    for query in QUERIES:
        top = both.top(query, k=1, sources=["finetune"], checkpoint="base", null="none", **ACROSS).frame.row(
            0, named=True
        )
        norm = norms["base", top["sample_id"]] * norms["epoch-1", query]
        cosine = top["score"] / norm
        noises.append(norm * (1 - cosine**2) / np.sqrt(1024))
    assert row["sketch_error"] == pytest.approx(np.mean(noises), rel=1e-4)


def test_metrics_never_mix_scores_within_and_across(both):
    within = both.metrics(method="dot", **SMALL)
    assert (within["query_checkpoint"] == within["checkpoint"]).all()
    assert set(within["checkpoint"]) == {"base", "epoch-1"}
    across = both.metrics(**ACROSS)
    assert set(across.select("checkpoint", "query_checkpoint").rows()) == {("base", "epoch-1")}
    assert_frame_equal(across, both.metrics(checkpoint="base", **ACROSS))
    assert_frame_equal(
        both.metrics(checkpoint="epoch-1", method="dot", **ACROSS),
        both.metrics(checkpoint="epoch-1", method="dot", **SMALL),
    )
    assert set(both.metrics(checkpoint="epoch-1", **ACROSS)["scored_by"]) == {"small · cosine"}  # at one checkpoint
    with pytest.raises(InputError, match="the scores at `epoch-1` are at one checkpoint and the others across two"):
        both.metrics(checkpoint=["base", "epoch-1"], **ACROSS)
    with pytest.raises(InputError, match="`dot-sum` needs queries and samples at the same checkpoints"):
        both.metrics(method="dot-sum", **ACROSS)
    with pytest.raises(NameUnknownError, match="no checkpoint `epoch-2`"):
        both.metrics(query_checkpoint="epoch-2", **SMALL)
    with pytest.raises(NothingToScoreError, match=r"no `cosine` scores .* with the queries at `epoch-1`, yet"):
        both.metrics(checkpoint="base", method="cosine", **ACROSS)


def test_ft_pt_across_is_that_of_the_ranking(both):
    frame = both.ft_pt("base", **ACROSS)
    assert set(frame.select("checkpoint", "query_checkpoint", "scored_by").unique().rows()) == {
        ("base", "epoch-1", "small · dot")
    }
    assert len(frame) == 16
    for query, rows in frame.group_by("query_id"):
        phi = best(both, *query, checkpoint="base", **ACROSS)
        for row in rows.iter_rows(named=True):
            assert row["ft"] == pytest.approx(phi[row["source"], row["variant"]], rel=1e-5)
            assert row["pt"] == pytest.approx(phi[row["against_source"], row["against_variant"]], rel=1e-5)
    assert set(both.ft_pt("base", **SMALL)["query_checkpoint"]) == {"base"}


def test_trajectory_across_follows_one_gradient_of_the_query(both):
    frame = both.trajectory("q101", "q2", source="finetune", **ACROSS)
    assert frame.select("checkpoint", "query_checkpoint").rows() == [("base", "epoch-1"), ("epoch-1", "epoch-1")]
    for row in frame.iter_rows(named=True):
        options = {"checkpoint": row["checkpoint"], "method": "dot", "where": "sample_id = 'q2'"}
        (hit,) = both.top("q101", sources=["finetune"], null="none", **options, **ACROSS)
        assert (row["score"], row["noise"]) == (pytest.approx(hit.score), pytest.approx(hit.noise))
    assert frame["query_loss"].n_unique() == 1
    assert set(frame["scored_by"]) == {"small · dot"}
    alone = both.trajectory("q101", "q2", source="finetune", **SMALL)
    assert (alone["query_checkpoint"] == alone["checkpoint"]).all()


def test_trajectory_names_the_checkpoint_without_the_query(store):
    store.ingest(["base"], ["finetune", "test"], ["chatml"], sketcher="small")
    with pytest.raises(
        NothingToScoreError, match="query `q101` has no comparable `small` sketch at `epoch-1`"
    ) as error:
        store.trajectory("q101", "q2", **ACROSS)
    assert 'ingest(checkpoints=["epoch-1"], sources=["test"]' in error.value.hint
    with pytest.raises(NameUnknownError, match="no checkpoint `epoch-2`"):
        store.trajectory("q101", "q2", query_checkpoint="epoch-2", **SMALL)


@pytest.mark.parametrize(
    ("call", "method"),
    [
        (
            "metrics(checkpoint := 'base', view := 'dominance'",
            lambda s: s.metrics(checkpoint="base", view="dominance", **ACROSS),
        ),
        ("ft_pt(checkpoint := 'base'", lambda s: s.ft_pt("base", **ACROSS)),
        ("trajectory(query := 'q101', sample_id := 'q2'", lambda s: s.trajectory("q101", "q2", **ACROSS)),
    ],
    ids=["metrics", "ft_pt", "trajectory"],
)
def test_functions_in_sql_are_the_methods(both, call, method):
    expected = method(both)
    rows = both.sql(f"from {call}, query_checkpoint := 'epoch-1', sketcher := 'small')")
    assert_frame_equal(rows.select(expected.columns), expected, check_dtypes=False)
    assert set(rows["query_checkpoint"]) == {"epoch-1"}


def test_matrix_across_names_the_queries_checkpoint(both):
    matrix = both.scores(checkpoint="base", **ACROSS)
    assert (matrix.query_checkpoint, matrix.checkpoints) == ("epoch-1", ["base"])
    assert matrix.about.facts == {"scored_by": "small · dot", "query_checkpoint": "epoch-1"}
    alone = both.scores(checkpoint="base", **SMALL)
    assert (alone.query_checkpoint, list(alone.about.facts)) == ("base", ["scored_by"])
    result = lark("scores -c base --query-checkpoint epoch-1 --sketcher small -f csv", store=both.path)
    assert "small · dot of 26 samples for 4 queries, queries at `epoch-1`\n" in result.err


def test_coverage_of_scores_is_of_one_kind(both):
    def rows(**options):
        frame = both.coverage(method="dot", **SMALL, **options)
        return set(frame["checkpoint"])

    assert rows() == {"base", "epoch-1"}
    assert rows(query_checkpoint="epoch-1") == {"base", "epoch-1"}
    assert both.coverage(method="tracin", **SMALL).is_empty()
    printed = lark("coverage -m cosine -c epoch-1 --query-checkpoint base --sketcher small -f json", store=both.path)
    assert (printed.code, printed.out) == (0, "[]\n")  # scored at one checkpoint only
    with pytest.raises(NameUnknownError, match="no checkpoint `epoch-2`"):
        both.coverage(method="dot", query_checkpoint="epoch-2")


@pytest.mark.parametrize(
    "command", ["metrics -c base --view influence", "ft-pt -c base", "trajectory q101 q2 --source finetune"]
)
def test_tables_name_the_queries_checkpoint_where_it_is_another(path, command):
    across = lark(f"{command} --query-checkpoint epoch-1 --sketcher small", store=path)
    assert (across.code, "query_checkpoint epoch-1" in across.out) == (0, True), across.out
    within = lark(f"{command} --sketcher small", store=path)
    assert (within.code, "query_checkpoint" in within.out) == (0, False), within.out
