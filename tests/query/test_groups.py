"""`groups`: influence per topic, format or source equals plain numpy over the stored vectors."""

from __future__ import annotations

import json
import re

import numpy as np
import polars as pl
import pytest
from helpers.program import lark
from helpers.reference_scores import brute_force_scores
from helpers.texts import write_jsonl
from helpers.topics import topic_rows, topic_store

from lark_store import Store
from lark_store.errors import InputError, NameUnknownError, NothingToScoreError, QueryError
from lark_store.query.answers import groups as module

QUERIES = [f"q{i}" for i in range(100, 104)]
OPTIONS = {"checkpoint": "base", "sketcher": "small"}
HOW = {"mean": np.mean, "sum": np.sum, "max": np.max}
K = 1024


@pytest.fixture(scope="module")
def path(scored_path, tmp_path_factory):
    return topic_store(scored_path, tmp_path_factory.mktemp("topics"))


@pytest.fixture
def store(path):
    with Store.open(path) as opened:
        yield opened


def meta_of(key):
    """Return a function from a row's key to a key of its metadata, as text."""
    values = {row["id"]: row[key] for row in topic_rows(24)}

    def value(row):
        text = values.get(row[2]) if row[0] == "web" else None
        return text if text is None or isinstance(text, str) else json.dumps(text)

    return value


KEYS = {
    "topic": meta_of("topic"),
    "format": meta_of("format"),
    "page": meta_of("page"),
    "source": lambda row: row[0],
    "variant": lambda row: row[1],
    "stage": lambda row: {"finetune": "finetune"}.get(row[0], "pretrain"),
    "domain": lambda row: {"songs": "entertainment", "web": "web"}.get(row[0], "medical"),
}


def expected(store, queries, keys, how, **options):
    """Return group → (value per query (Q), scores per query of the members), from the stored vectors."""
    scores = [brute_force_scores(store, query, **options) for query in queries]
    names = {row: tuple(KEYS[key](row) for key in keys) for row in scores[0]}
    members = {group: [row for row in names if names[row] == group] for group in set(names.values())}
    parts = {group: np.array([[s[row] for row in rows] for s in scores]) for group, rows in members.items()}
    return {group: (HOW[how](part, axis=1), part) for group, part in parts.items()}


def by_group(frame, keys):
    columns = ["group_name", "subgroup_name"][: len(keys)]
    return {tuple(row[name] for name in columns): row for row in frame.iter_rows(named=True)}


@pytest.mark.parametrize("how", ["mean", "sum", "max"])
@pytest.mark.parametrize(
    "keys", [["source"], ["topic"], ["page"], ["topic", "format"], ["stage", "variant"], ["domain"]]
)
def test_values_over_queries_equal_numpy(store, keys, how):
    frame = store.groups(by=keys, how=how, **OPTIONS)
    reference = expected(store, QUERIES, keys, how)
    assert set(by_group(frame, keys)) == set(reference)
    values = np.array([value for value, _ in reference.values()])
    wins = dict(zip(reference, (values == values.max(axis=0)).mean(axis=1), strict=True))
    for group, row in by_group(frame, keys).items():
        value, part = reference[group]
        assert row["value"] == pytest.approx(value.mean(), abs=2e-5 * part.shape[1])
        assert row["n_samples"] == part.shape[1]
        assert (row["n_queries"], row["interval_over"], row["query_id"]) == (4, "queries", None)
        assert value.min() - 1e-4 <= row["low"] <= row["value"] <= row["high"] <= value.max() + 1e-4
        assert row["wins"] == pytest.approx(wins[group])
    assert frame["value"].is_sorted(descending=True)


def test_intervals_over_queries_are_percentiles_of_resampled_queries(store):
    row = by_group(store.groups(by="source", **OPTIONS), ["source"])[("web",)]
    value, _ = expected(store, QUERIES, ["source"], "mean")[("web",)]
    grid = np.array(np.meshgrid(*[range(4)] * 4)).reshape(4, -1)  # all resamples
    low, high = np.quantile(value[grid].mean(axis=0), [0.025, 0.975])
    assert (row["low"], row["high"]) == pytest.approx((low, high), abs=0.05 * np.ptp(value))


def test_one_query_has_intervals_over_samples(store):
    frame = store.groups("q101", by="topic", **OPTIONS)
    reference = expected(store, ["q101"], ["topic"], "mean")
    rng = np.random.default_rng(1)
    for group, row in by_group(frame, ["topic"]).items():
        scores = reference[group][1][0]
        means = scores[rng.integers(0, len(scores), (20_000, len(scores)))].mean(axis=1)
        low, high = np.quantile(means, [0.025, 0.975])
        assert (row["value"], row["low"], row["high"]) == pytest.approx(
            (scores.mean(), low, high), abs=0.05 * scores.std() + 2e-5
        )
        assert (row["interval_over"], row["query_id"], row["n_queries"]) == ("samples", "q101", 1)
        summed = by_group(store.groups("q101", by="topic", how="sum", **OPTIONS), ["topic"])[group]
        assert summed["low"] == pytest.approx(row["low"] * len(scores))


def test_a_maximum_for_one_query_has_no_interval(store):
    frame = store.groups("q101", by="topic", how="max", **OPTIONS)
    assert frame.select("low", "high", "interval_over").null_count().row(0) == (len(frame),) * 3
    assert sorted(frame["wins"].to_list(), reverse=True) == [1.0] + [0.0] * (len(frame) - 1)


def test_many_samples_get_the_normal_interval(store, monkeypatch):
    resampled = by_group(store.groups("q101", **OPTIONS), ["source"])
    monkeypatch.setattr(module, "_RESAMPLED", 3)
    for group, row in by_group(store.groups("q101", **OPTIONS), ["source"]).items():
        scores = expected(store, ["q101"], ["source"], "mean")[group][1][0]
        reach = 1.959964 * scores.std(ddof=1) / np.sqrt(len(scores))
        assert (row["low"], row["high"]) == pytest.approx((scores.mean() - reach, scores.mean() + reach), abs=2e-5)
        assert row["low"] == pytest.approx(resampled[group]["low"], abs=0.5 * reach)


@pytest.mark.parametrize("how", ["mean", "sum", "max"])
def test_sketch_error_is_the_bound_from_the_samples_noise(store, how):
    frame = store.groups(by="source", how=how, **OPTIONS)
    for group, row in by_group(frame, ["source"]).items():
        _, part = expected(store, QUERIES, ["source"], how)[group]
        noise = (1 - part**2) / np.sqrt(K)
        best = np.take_along_axis(noise, part.argmax(axis=1)[:, None], 1)
        bound = best.mean() if how == "max" else HOW[how](noise, axis=1).mean()
        assert row["sketch_error"] == pytest.approx(bound, rel=1e-3)


def test_samples_without_the_key_are_a_group_and_counted(store):
    frame = store.groups(by="topic", **OPTIONS)
    (lacking,) = frame.filter(pl.col("group_name").is_null())["n_samples"]
    n = frame["n_samples"].sum()
    assert lacking == n - 24 + 3
    assert f"{lacking} of {n} searched samples have no `topic`: their group is null" in frame["note"][0]
    assert store.groups(by="topic", sources=["web"], where="topic is not null", **OPTIONS)["note"].null_count() == 3


def test_methods_conditions_and_checkpoints(store):
    dot = by_group(store.groups(by="source", how="max", method="dot", **OPTIONS), ["source"])
    for group, (value, _) in expected(store, QUERIES, ["source"], "max", dot=True).items():
        assert dot[group]["value"] == pytest.approx(value.mean(), rel=1e-3)
        assert dot[group]["sketch_error"] > 0
    for method in ("whitened", "bm25", "hybrid", "centred"):
        matrix = store.scores(method=method, **OPTIONS)
        frame = store.groups(by="source", method=method, **OPTIONS)
        for group, row in by_group(frame, ["source"]).items():
            columns = matrix.samples["source"].to_numpy() == group[0]
            assert row["value"] == pytest.approx(matrix.matrix[:, columns].mean(), rel=1e-4)
            assert (row["sketch_error"] is None) == (method != "centred")
    both = store.groups(by="source", checkpoint=["base", "epoch-1"], sketcher="small")
    assert both["checkpoint"].to_list() == ["base"] * 4 + ["epoch-1"] * 4
    summed = store.groups(by="source", checkpoint=["base", "epoch-1"], over_checkpoints="sum", sketcher="small")
    totals = dict(both.group_by("group_name").agg(pl.col("value").sum()).iter_rows())
    for name, value in summed.select("group_name", "value").iter_rows():
        assert value == pytest.approx(totals[name], abs=1e-6)
    few = store.groups(by="format", where="n_tokens < 40 and format = 'book'", **OPTIONS)
    assert few["group_name"].to_list() == ["book"]
    across = store.groups(by="source", query_checkpoint="epoch-1", **OPTIONS)
    assert set(across["query_checkpoint"]) == {"epoch-1"}


def test_many_queries_go_in_blocks(store):
    whole = store.groups(by="page", how="max", **OPTIONS)
    blocks = store.groups(by="page", how="max", memory=4 * K, **OPTIONS)
    assert blocks.drop("value", "low", "high", "sketch_error").equals(
        whole.drop("value", "low", "high", "sketch_error")
    )
    assert blocks["value"].to_list() == pytest.approx(whole["value"].to_list())
    with pytest.raises(InputError, match=r"groups for 4 queries need 1 MiB") as caught:
        store.groups(by="page", memory=500, **OPTIONS)
    assert "memory" in caught.value.hint


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"by": ["topic", "format", "page"]}, InputError, "by one key or by two"),
        ({"by": ["topic", "topic"]}, InputError, "by one key or by two"),
        ({"by": "subject"}, InputError, "no searched sample has the key `subject`"),
        ({"how": "median"}, InputError, "groups have no `median`"),
        ({"where": "n_tokens < 0"}, NothingToScoreError, "no sketch satisfies"),
        ({"where": "nothing = 3"}, QueryError, "nothing"),
        ({"query": "q999"}, NameUnknownError, "no query `q999`"),
        ({"sources": ["nowhere"]}, NameUnknownError, "nowhere"),
        ({"query": []}, InputError, "no query is given"),
    ],
)
def test_faults(store, options, error, message):
    with pytest.raises(error, match=message) as caught:
        store.groups(**options, **OPTIONS)
    assert caught.value.hint


def test_the_command_and_the_table_function_answer_the_same(store, path):
    frame = store.groups("q101", by=["topic", "format"], **OPTIONS)
    printed = lark(f"groups q101 --by topic --by format --checkpoint base --sketcher small -f json --store {path}")
    assert printed.code == 0
    assert [row["value"] for row in json.loads(printed.out)] == pytest.approx(frame["value"].to_list())
    assert "searched samples have no `topic`" in printed.err
    keys = "key := 'topic', key2 := 'format'"
    rows = store.sql(f"from influence_by(checkpoint := 'base', {keys}, query := 'q101', sketcher := 'small')")
    assert rows.columns == frame.columns
    assert rows["value"].to_list() == pytest.approx(frame["value"].to_list())
    table = lark(f"groups --checkpoint base --sketcher small --store {path}")
    assert (table.code, "subgroup_name" in table.out, "web" in table.out) == (0, False, True)
    wrong = lark(f"groups --by subject --checkpoint base --sketcher small --store {path}")
    assert (wrong.code, "Traceback" in wrong.err) == (1, False)


def test_blank_names_are_told_apart_in_a_table(scored_copy, tmp_path):
    topics = {"null": ["", None, "null", '""'], "plain": ["", None, "sea"]}
    for source, values in topics.items():
        texts = [{"id": f"{i}", "text": f"Text {i} of it.", "topic": topic} for i, topic in enumerate(values)]
        scored_copy.source_add(source, write_jsonl(tmp_path / f"{source}.jsonl", texts), stage="pretrain")
    scored_copy.ingest(["base"], list(topics), ["raw"], sketcher="small")
    line = "groups --by topic --checkpoint base --sketcher small"
    lines = lark(f"{line} --source plain", store=scored_copy.path).out.splitlines()
    assert {text.split()[0] for text in lines if re.match(r"\S+ +-?\d", text)} == {'""', "null", "sea"}
    assert any('null: samples without the key · "": an empty text' in text for text in lines)
    lines = lark(f"{line} --source null --wide", store=scored_copy.path).out
    rows = lark(f"{line} --source null -f json", store=scored_copy.path).rows
    assert {row["group_name"] for row in rows} == set(topics["null"])
    assert all(sign in lines for sign in ("∅", "␣", "null", '""'))
