"""`plot`: each kind draws the numbers of the store's answers, and says what it can't draw."""

from __future__ import annotations

import re

import numpy as np
import polars as pl
import pytest
from helpers.imports import IDS, import_numpy, random_vectors
from helpers.program import lark
from helpers.stores import read_sketches
from helpers.texts import write_jsonl
from helpers.topics import topic_store

from lark_store import Store, make_domain
from lark_store.charts.numbers import rate_text
from lark_store.domains import DOMAINS
from lark_store.errors import InputError, NameUnknownError, NothingToScoreError
from lark_store.query.plots import PLOTS

SMALL = {"sketcher": "small"}
AT = {"checkpoint": "base", "sketcher": "small"}
ASKS = {
    "trajectory": {"query": ["q100", "q101"], **SMALL},
    "dominance": AT,
    "influence": SMALL,
    "hits": {"query": "q100", **AT},
    "heatmap": {"by": "topic", **SMALL},
    "histogram": {"query": "q100", **AT},
    "eif": {"checkpoint": "base", "sources": ["squares"]},
    "eif-sweep": {"checkpoint": "base"},
}


@pytest.fixture(scope="module")
def path(scored_path, tmp_path_factory):
    path = topic_store(scored_path, tmp_path_factory.mktemp("plots"))
    with Store.open(path) as store:
        store.source_add("squares", make_domain("squares", draws=2), stage="pretrain")
        store.variant_add("text", template="raw", targets="text")
        for options in ({"sweep": "1e-3:1e-2"}, {"in_context": True}):
            store.eif("base", "squares", queries="squares", variant="text", by_draw=True, **options)
    return path


@pytest.fixture
def store(path):
    with Store.open(path) as opened:
        yield opened


def rows(chart, *columns):
    """Return the rows of a chart's data that have these columns."""
    parts = [value for value in find(chart.to_dict(), "values") if value]
    parts += list(chart.to_dict().get("datasets", {}).values())
    return [row for part in parts for row in part if isinstance(row, dict) and set(columns) <= row.keys()]


def find(part, name):
    if isinstance(part, dict):
        for key, value in part.items():
            if key == name and isinstance(value, list):
                yield value
            else:
                yield from find(value, name)
    elif isinstance(part, list):
        for item in part:
            yield from find(item, name)


def test_every_kind_has_an_example():
    assert set(ASKS) == set(PLOTS)


@pytest.mark.parametrize("kind", ASKS)
def test_each_kind_is_a_chart_and_a_file(store, kind, tmp_path):
    chart = store.plot(kind, **ASKS[kind])
    assert chart._repr_mimebundle_()  # a notebook shows it
    for suffix, start in ((".svg", b"<svg"), (".png", b"\x89PNG"), (".html", b"<!DOCTYPE html>")):
        target = tmp_path / "deep" / f"{kind}{suffix}"
        assert store.plot(kind, output=target, **ASKS[kind]) == target
        assert target.read_bytes().lstrip()[: len(start)] == start
    assert "http" not in (tmp_path / "deep" / f"{kind}.html").read_text(encoding="utf-8").split("<script")[0]


def test_hits_are_those_of_top_on_both_sides(store):
    drawn = rows(store.plot("hits", "q100", k=4, **AT), "sample", "score")
    expected = [
        (f"{hit.source}/{hit.sample_id}", hit.score, hit.noise)
        for opponents in (False, True)
        for hit in store.top("q100", k=4, opponents=opponents, **AT)
    ]
    expected.sort(key=lambda hit: -hit[1])
    assert [row["sample"].partition(" · ")[0] for row in drawn] == [name for name, _, _ in expected]
    assert [row["score"] for row in drawn] == pytest.approx([score for _, score, _ in expected], rel=1e-5)
    assert [row["high"] - row["low"] for row in drawn] == pytest.approx(
        [2 * noise for _, _, noise in expected], rel=1e-3
    )
    few = rows(store.plot("hits", "q100", k=100, where="source = 'songs'", **AT), "sample", "score")
    assert len({row["sample"] for row in few}) == len(few) == 10


def test_a_sample_can_be_the_query_of_hits(store):
    drawn = rows(store.plot("hits", "finetune/q1", k=3, **AT), "sample", "score")
    assert "finetune/q1" not in {row["sample"] for row in drawn}


def test_histogram_counts_all_scores_and_marks_the_highest(store):
    chart = store.plot("histogram", "q100", k=3, **AT)
    scores = store.scores(["q100"], **AT).matrix[0]
    bins = rows(chart, "low", "high", "n")
    assert sum(row["n"] for row in bins) == len(scores)
    for row in bins:
        inside = (scores >= row["low"] - 1e-6) & (scores <= row["high"] + 1e-6)
        assert row["n"] == pytest.approx(inside.sum(), abs=1)
    marked = [row["score"] for row in rows(chart, "sample", "score")]
    assert marked == pytest.approx(np.sort(scores)[::-1][:3], rel=1e-5)


def test_dominance_has_a_point_per_query_and_the_share_of_wins(store):
    chart = store.plot("dominance", **AT)
    expected = store.ft_pt("base", **SMALL)
    drawn = rows(chart, "query_id", "ft")
    assert len(drawn) == len(expected)
    for name in ("ft", "pt"):
        assert sorted(row[name] for row in drawn) == pytest.approx(expected[name].sort().to_list(), rel=1e-4)
    titles = [panel["title"]["text"][1] for panel in chart.to_dict()["concat"]]
    shares = expected.group_by("against_source", "against_variant", maintain_order=True).agg(
        (pl.col("winner") == "finetune").sum()
    )
    assert titles == [f"FT wins {n / 4:.1%} ({n} of 4)" for n in shares["winner"]]
    one = rows(store.plot("dominance", "q101", **AT), "query_id", "ft")
    assert {row["query_id"] for row in one} == {"q101"}


def test_influence_is_that_of_metrics_with_its_intervals(store):
    drawn = rows(store.plot("influence", **SMALL), "mean_max_influence")
    expected = store.metrics(view="influence", **SMALL).unique(["checkpoint", "source", "variant"])
    values = {
        (r["checkpoint"], r["source"], r["variant"]): (r["mean_max_influence"], r["low"], r["high"]) for r in drawn
    }
    assert len(values) == len(expected) == 12
    for r in expected.iter_rows(named=True):
        key = r["checkpoint"], r["source"], r["variant"]
        assert values[key] == pytest.approx((r["mean_max_influence"], r["low"], r["high"]), rel=1e-4)


def test_trajectory_follows_the_highest_score_of_each_source(store):
    drawn = rows(store.plot("trajectory", ["q100", "q102"], **SMALL), "series", "value")
    values = {(r["query_id"], r["checkpoint"], r["series"]): r["value"] for r in drawn}
    for checkpoint in ("base", "epoch-1"):
        matrix = store.scores(["q100", "q102"], checkpoint=checkpoint, **SMALL)
        for source in ("finetune", "medical", "songs", "web"):
            columns = (matrix.samples["source"] == source).to_numpy()
            for query, scores in zip(matrix.query_ids, matrix.matrix, strict=True):
                assert values[query, checkpoint, source] == pytest.approx(scores[columns].max(), rel=1e-4)
    assert len(values) == 16
    losses = {
        (r["query_id"], r["checkpoint"]): r["loss"]
        for r in rows(store.plot("trajectory", "q100", measure="loss", **SMALL), "loss")
    }
    stored = read_sketches(store).filter(source="test", sample_id="q100")
    assert losses == {
        ("q100", c): pytest.approx(loss, rel=1e-5) for c, loss in stored.select("checkpoint", "loss").rows()
    }


def test_heatmap_has_the_groups_of_a_key(store):
    drawn = rows(store.plot("heatmap", by=["topic", "format"], how="mean", **SMALL), "group", "value")
    frame = store.groups(by=["topic", "format"], checkpoint=["base", "epoch-1"], **SMALL)
    assert [row["value"] for row in drawn] == pytest.approx(frame["value"].to_list(), rel=1e-4)
    assert {"sea · book", "(no topic) · (no format)"} <= {row["group"] for row in drawn}
    highest = rows(store.plot("heatmap", **AT), "group", "value")
    expected = store.groups(how="max", **AT)
    assert [row["value"] for row in highest] == pytest.approx(expected["value"].to_list(), rel=1e-4)


def subtitles(chart):
    """Return the subtitle of a chart as one text."""
    return " ".join(chart.to_dict()["title"]["subtitle"])


def test_values_that_read_the_same_stay_apart(scored_copy, tmp_path):
    topics = ["(no topic)", None, "a · b", "a", "", '""', "plain"]
    formats = ["x", "x", "c", "b · c", "x", "x", "x"]
    texts = [
        {"id": f"t{i}", "text": f"Text {i} of the sea, {i * i}.", "topic": topic, "format": form}
        for i, (topic, form) in enumerate(zip(topics, formats, strict=True))
    ]
    scored_copy.source_add("odd", write_jsonl(tmp_path / "odd.jsonl", texts), stage="pretrain")
    scored_copy.ingest(["base", "epoch-1"], ["odd"], ["raw"], sketcher="small")
    for keys in (["topic"], ["topic", "format"]):
        for kind, label in (("trajectory", "series"), ("heatmap", "group")):
            drawn = rows(scored_copy.plot(kind, "q100", by=keys, sources=["odd"], **SMALL), label, "value")
            assert len({(row[label], row["checkpoint"]) for row in drawn}) == len(drawn) == 2 * len(texts)
            for checkpoint in ("base", "epoch-1"):
                matrix = scored_copy.scores(["q100"], checkpoint=checkpoint, sources=["odd"], **SMALL)
                values = dict(zip(matrix.samples["sample_id"], matrix.matrix[0], strict=True))
                of = {row[label]: row["value"] for row in drawn if row["checkpoint"] == checkpoint}
                plain, without = ("plain", "(no topic)") if len(keys) == 1 else ("plain · x", '(no topic) · "x"')
                assert (of[plain], of[without]) == pytest.approx((values["t6"], values["t1"]), rel=1e-4)
                assert sorted(of.values()) == pytest.approx(sorted(values.values()), rel=1e-4)


def test_the_format_of_the_queries_is_named(scored_copy, tmp_path, caplog):
    asked = [{"id": "a1", "text": "How deep is the sea?"}, {"id": "a2", "text": "Is water wet?"}]
    scored_copy.source_add("asked", write_jsonl(tmp_path / "asked.jsonl", asked), stage="query")
    scored_copy.ingest(["base"], ["asked"], ["chatml"], sketcher="small")
    scored_copy.ingest(["epoch-1"], ["asked"], ["raw"], sketcher="small")
    note = "queries of `asked` are as `chatml` at `base` and as `raw` at `epoch-1`: these values differ in format, too"
    both = {"checkpoint": ["base", "epoch-1"], "queries": "asked", **SMALL}
    frame = scored_copy.groups(**both)
    assert frame.unique("checkpoint", maintain_order=True).select("checkpoint", "query_variant").rows() == [
        ("base", "chatml"),
        ("epoch-1", "raw"),
    ]
    assert all(note in text for text in frame["note"])
    summed = scored_copy.groups(over_checkpoints="sum", **both)
    assert set(summed["query_variant"]) == {"raw"}
    assert note in summed["note"][0]
    for kind, query, options in (
        ("heatmap", None, {}),
        ("trajectory", "a1", {}),
        ("trajectory", "a1", {"measure": "loss"}),
    ):
        caplog.clear()
        chart = scored_copy.plot(kind, query, queries="asked", **options, **SMALL)
        assert "as chatml and raw" in subtitles(chart)
        assert caplog.messages.count(note) == 1
    caplog.clear()
    assert "as chatml" in subtitles(scored_copy.plot("heatmap", queries="test", **SMALL))
    assert caplog.messages == []
    assert "differ in format" in scored_copy.report(tmp_path / "r.html", queries="asked", **SMALL).read_text("utf-8")


def test_a_checkpoint_without_samples_is_left_out_unless_given(scored_copy, tmp_path, caplog):
    scored_copy.sketcher_add("few", k=512)
    scored_copy.ingest(["base", "epoch-1"], ["test"], ["chatml"], sketcher="few")
    scored_copy.ingest(["base"], ["songs"], ["raw"], sketcher="few")
    for kind, options in (("heatmap", {}), ("trajectory", {}), ("trajectory", {"measure": "loss"})):
        caplog.clear()
        chart = scored_copy.plot(kind, "q100", sketcher="few", **options)
        assert {row["checkpoint"] for row in rows(chart, "checkpoint")} == {"base"}
        assert [text.partition(":")[0] for text in caplog.messages] == ["`epoch-1` is left out"]
        with pytest.raises(NothingToScoreError, match="`few` sketches of any source at checkpoint `epoch-1`"):
            scored_copy.plot(kind, "q100", checkpoint=["base", "epoch-1"], sketcher="few", **options)
    page = scored_copy.report(tmp_path / "r.html", sketcher="few").read_text("utf-8")
    assert "<code>epoch-1</code> is left out" in page
    with pytest.raises(NothingToScoreError):
        scored_copy.report(tmp_path / "x.html", checkpoints=["base", "epoch-1"], sketcher="few")


def test_losses_that_are_not_stored_are_left_out(scored_copy, tmp_path, caplog):
    stored = {"base": [0.25, 0.5, None, 1.0], "epoch-1": [None, 0.75, None, None]}
    for checkpoint, losses in stored.items():
        at = {"checkpoint": checkpoint, "variant": "raw"}
        table = pl.DataFrame({"vector": random_vectors("test", 8), "sample_id": IDS["test"], "loss": losses})
        table.write_parquet(tmp_path / "test.parquet")
        scored_copy.sketcher_import("trak", tmp_path / "test.parquet", source="test", **at)
        import_numpy(scored_copy, tmp_path, "songs", random_vectors("songs", 8), **at)
    chart = scored_copy.plot("trajectory", IDS["test"], measure="loss", sketcher="trak")
    known = {(r["query_id"], r["checkpoint"]): r["loss"] for r in rows(chart, "query_id", "loss")}
    assert known == {("q100", "base"): 0.25, ("q101", "base"): 0.5, ("q103", "base"): 1.0, ("q101", "epoch-1"): 0.75}
    assert "q102" not in str(list(find(chart.to_dict(), "domain")))
    assert [text.partition(" is ")[0] for text in caplog.messages] == [
        "the loss of `q102` at `base` and `epoch-1`",
        "the loss of `q100` at `epoch-1`",
        "the loss of `q103` at `epoch-1`",
    ]
    with pytest.raises(NothingToScoreError, match="no loss of these queries is stored"):
        scored_copy.plot("trajectory", "q102", measure="loss", sketcher="trak")
    page = scored_copy.report(tmp_path / "r.html", sketcher="trak").read_text("utf-8")
    lines = [re.findall(r">\s*([^<\s][^<]*?)\s*<", row) for row in re.findall(r"<tr>.*?</tr>", page, re.DOTALL)]
    table = {line[0]: line[-1] for line in lines if line}
    assert (float(table["base"]), float(table["epoch-1"])) == pytest.approx((1.75 / 3, 0.75), abs=1e-3)


FAULTS = [
    (("pie",), {}, InputError, "there is no plot `pie`"),
    (("hits", "q100"), {**AT, "output": "a.pdf"}, InputError, r"`a.pdf` is no .svg, .png or .html file"),
    (("hits", "q100"), {**AT, "output": "noending"}, InputError, "`noending` is no"),
    (("hits",), AT, InputError, "no query is given"),
    (("hits", ["q100", "q101"]), AT, InputError, "2 queries are given"),
    (("hits", "q100"), SMALL, InputError, "no checkpoint is given"),
    (("hits", "q999"), AT, NameUnknownError, "no query `q999`"),
    (("hits", "q100"), {**AT, "by": "topic"}, InputError, "`hits` does not use `by`"),
    (("hits", "q100"), {**AT, "measure": "loss"}, InputError, "`hits` does not use `measure`"),
    (("dominance",), {**AT, "sources": ["songs"]}, InputError, "`dominance` does not use `source"),
    (("dominance", "q999"), AT, NameUnknownError, "no query `q999`"),
    (("dominance",), SMALL, InputError, "no checkpoint is given"),
    (("influence",), {"sketcher": "lark"}, NothingToScoreError, "there are no `cosine` scores"),
    (("influence", "q100"), SMALL, InputError, "over all queries"),
    (("trajectory",), SMALL, InputError, "no query is given"),
    (("trajectory", [f"q{i}" for i in range(13)]), SMALL, InputError, "13 queries are too many"),
    (("trajectory", "q100"), {**SMALL, "measure": "size"}, InputError, "shows no `size`"),
    (("trajectory", "q100"), {"sketcher": "lark"}, NothingToScoreError, "no `lark` sketches"),
    (("heatmap",), {**SMALL, "by": "subject"}, InputError, "the key `subject`"),
    (("eif",), {}, InputError, "no checkpoint is given"),
    (("eif",), {"checkpoint": "epoch-1"}, NothingToScoreError, "no influence of `squares` is measured at `epoch-1`"),
    (("eif",), {"checkpoint": "base", "sources": ["songs"]}, NothingToScoreError, "no influence of `songs`"),
    (("eif-sweep",), {"checkpoint": ["base", "epoch-1"]}, InputError, "one source and one checkpoint"),
    (("eif",), {"checkpoint": "base", "k": 3}, InputError, "`eif` does not use `k`"),
    (("heatmap",), {**SMALL, "how": "median"}, InputError, "groups have no `median`"),
]


@pytest.mark.parametrize(("arguments", "options", "error", "message"), FAULTS)
def test_faults(store, arguments, options, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message) as caught:
        store.plot(*arguments, **options)
    assert caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_matrices_of_measured_influence_are_means_over_draws(store):
    chart = store.plot("eif", checkpoint="base")
    drawn = rows(chart, "panel", "sample", "query")
    roles = list(DOMAINS["squares"].statements)
    assert len(drawn) == 2 * len(roles) ** 2
    compared = store.eif("base", "squares", queries="squares", variant="text", by_draw=True, sweep="1e-3:1e-2").sweep
    (rate,) = compared.filter("is_chosen")["learning_rate"]
    assert {row["panel"] for row in drawn} == {f"sgd, learning rate {rate_text(rate)}", "in context"}
    value = """select avg(value) from eif where mode = ? and coalesce(learning_rate, ?) = ?
               and sample_id like ? and query_id like ?"""
    for mode, panel in (("finetune", drawn[0]["panel"]), ("context", "in context")):
        names = ["squares-_-both_in_two", "squares-_-square_is_b"]
        (cell,) = [
            row["value"] for row in drawn
            if (row["panel"], row["sample"], row["query"]) == (panel, "both_in_two", "square_is_b")
        ]  # fmt: skip
        assert cell == pytest.approx(store.sql(value, [mode, rate, rate, *names]).item(), rel=1e-4)
    swept = rows(store.plot("eif-sweep", checkpoint="base"), "learning_rate", "signal_over_noise")
    ratios = {row["learning_rate"]: row["signal_over_noise"] for row in swept}
    assert list(ratios.values()) == pytest.approx(compared["signal_over_noise"].to_list(), rel=1e-4)


def test_nothing_is_scored_in_a_new_store(tmp_path):
    with Store.create(tmp_path / "new.store") as store:
        for kind, query in (("influence", None), ("heatmap", None), ("trajectory", "q1")):
            with pytest.raises(NothingToScoreError) as caught:
                store.plot(kind, query)
            assert caught.value.hint


def test_ids_and_texts_with_control_characters(scored_copy, tmp_path):
    bad = {"id": "bell\x07<b>", "text": "ring\x00\x1b[31m </script>", "topic": "loud\x07"}
    scored_copy.source_add("odd", write_jsonl(tmp_path / "odd.jsonl", [bad]), stage="pretrain")
    scored_copy.ingest(["base"], ["odd"], ["raw"], sketcher="small")
    for kind, query, more in (
        ("hits", "q100", {}),
        ("histogram", "q100", {"k": 100}),
        ("heatmap", None, {"by": "topic"}),
    ):
        for suffix in ("svg", "png", "html"):
            assert scored_copy.plot(kind, query, output=tmp_path / f"x.{suffix}", **AT, **more).stat().st_size > 1000
    drawn = rows(scored_copy.plot("hits", "q100", sources=["odd"], **AT), "sample")
    assert drawn[0]["sample"] == "odd/bell<U+0007><b>"


def test_the_command(path, tmp_path):
    target = tmp_path / "hits.svg"
    done = lark(f"plot hits q100 -c base --sketcher small -k 3 -o {target} --store {path}")
    assert (done.code, done.out, done.err) == (0, "", f"wrote `{target}`\n")
    assert target.is_file()
    noted = lark(f"plot heatmap --by topic --sketcher small -o {tmp_path / 'h.png'} --store {path}")
    assert "note: 29 of 50 searched samples have no `topic`" in noted.err
    for line in ("heatmap", "trajectory q100"):
        other = lark(f"plot {line} --by topic -o {tmp_path / 'o.svg'} --store {path}")
        assert (other.code, other.err.count("the only sketcher that has some")) == (0, 1)
    wrong = lark(f"plot hits q100 -c base --by topic --sketcher small -o {target} --store {path}")
    assert (wrong.code, wrong.out) == (1, "")
    assert wrong.err == "error: `hits` does not use `--by`\n\nhint: leave it out\n"
    (tmp_path / "file").write_text("")
    blocked = lark(f"plot hits q100 -c base --sketcher small -o {tmp_path / 'file' / 'x.svg'} --store {path}")
    assert (blocked.code, "Traceback" in blocked.err) == (1, False)
    assert "can't be written" in blocked.err


def test_help_names_every_kind():
    shown = " ".join(lark("plot --help").out.split())
    for name in PLOTS:
        assert name in shown
