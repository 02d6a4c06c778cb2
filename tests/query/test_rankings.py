"""`top` for several queries, several checkpoints, samples of any source, and queries from stdin."""

from __future__ import annotations

import io
import json
import sys
from types import SimpleNamespace

import polars as pl
import pytest
from helpers.program import lark
from helpers.texts import qa_rows, write_jsonl

from lark_store.errors import InputError, NameUnknownError, NothingToScoreError
from lark_store.results import NewText

AT = {"checkpoint": "base", "sketcher": "small"}


def command(line, store, stdin=None):
    with pytest.MonkeyPatch.context() as patch:
        if stdin is not None:
            patch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(stdin.encode()), isatty=lambda: False))
        return lark(f"{line} --sketcher small", store=store.path)


# --- a sample as the query -----------------------------------------------------------------------------------------


def test_a_sample_ranks_the_others_by_its_stored_sketch(scored):
    hits = scored.top("finetune/q0", k=100, **AT)
    matrix = scored.scores(["q100"], checkpoint="base", sketcher="small")
    assert (hits.query_id, hits.query_variant, hits.n_searched) == ("finetune/q0", "chatml", 25)
    assert len(matrix.samples) == 26
    assert hits.frame.filter(source="finetune", sample_id="q0").is_empty()
    assert "note: the query itself is left out of the hits" in hits.how
    vectors = scored.sql("select grad_norm from sketches where sample_id = 'q0' and checkpoint = 'base'")
    dots = scored.top("finetune/q0", k=100, method="dot", **AT).frame
    ratio = (
        dots.sort("sample_id", "source", "variant")["score"]
        / hits.frame.sort("sample_id", "source", "variant")["score"]
    )
    norms = scored.sql(
        "select grad_norm from sketches where checkpoint = 'base' and source != 'test' and sample_id != 'q0' "
        "order by sample_id, source, variant"
    )["grad_norm"]
    assert (ratio / norms).to_list() == pytest.approx([vectors.item()] * 25, rel=1e-3)


def test_a_sample_that_is_not_searched_is_not_left_out(scored):
    hits = scored.top("finetune/q0", sources=["songs"], **AT)
    assert "left out" not in hits.how
    assert hits.n_searched == 10


def test_a_search_of_the_query_alone_is_refused(scored):
    with pytest.raises(NothingToScoreError, match="the only searched sample is the query itself"):
        scored.top("finetune/q0", where="sample_id = 'q0'", **AT)


def test_a_sample_in_two_variants_takes_the_given_one(scored):
    by_variant = {
        variant: scored.top(_first(scored, "songs"), query_variant=variant, k=50, **AT)
        for variant in (None, "raw", "chatml")
    }
    assert by_variant[None].query_variant == "chatml"
    assert by_variant["raw"].query_variant == "raw"
    assert by_variant["raw"].n_searched == 24  # neither of its variants is a hit


def _first(store, source):
    return f"{source}/" + store.sql("select min(sample_id) from samples where source = ?", [source]).item()


def test_a_query_can_be_written_with_its_source(scored):
    assert scored.top("test/q100", **AT).frame.equals(scored.top("q100", **AT).frame)


def test_an_id_with_a_slash_stays_an_id(store, tmp_path):
    rows = [{**qa_rows(1)[0], "id": "finetune/q0"}]
    store.source_add("odd", write_jsonl(tmp_path / "odd.jsonl", rows), stage="query")
    store.ingest("base", ["odd", "finetune"], "chatml", sketcher="small")
    hits = store.top("finetune/q0", k=50, **AT)
    assert (hits.n_searched, hits.notes) == (6, ())


@pytest.mark.parametrize(
    ("query", "error", "fact", "hint"),
    [
        ("finetune/q00", NameUnknownError, "source `finetune` has no sample `q00`", "did you mean `q0`"),
        ("finetun/q0", NameUnknownError, "no query `finetun/q0`", ""),
        (
            "q0",
            NameUnknownError,
            "no query `q0`",
            "it is a sample of `finetune`; rank for it with `lark-store top finetune/q0`",
        ),
        ("q1000", NameUnknownError, "no query `q1000`", "did you mean `q100`, `q103` or `q102`?"),
    ],
)
def test_wrong_ids_have_hints(scored, query, error, fact, hint):
    with pytest.raises(error) as caught:
        scored.top(query, **AT)
    found, _, advice = caught.value.command_line.partition("\n\nhint: ")
    assert found == fact
    assert advice.startswith(hint)


def test_an_id_in_several_sources_lists_them(scored_copy, tmp_path):
    scored_copy.source_add("more", write_jsonl(tmp_path / "more.jsonl", qa_rows(1)), stage="pretrain")
    with pytest.raises(NameUnknownError) as caught:
        scored_copy.top("q0", **AT)
    commands = "`lark-store top finetune/q0` or `lark-store top more/q0`"
    assert caught.value.command_line.endswith(f"it is a sample of `finetune`, `more`; rank for it with {commands}")
    with pytest.raises(NothingToScoreError, match="no committed `small` sketches of `more`"):
        scored_copy.top("more/q0", **AT)
    scored_copy.ingest("base", "finetune", "raw", sketcher="small", limit=2)
    with pytest.raises(NothingToScoreError, match=r"^sample `finetune/q5` has no sketch as `raw` at `base`"):
        scored_copy.top("finetune/q5", query_variant="raw", **AT)
    with pytest.raises(InputError, match="`finetune/q5` is a sample of `finetune`, not of `test`"):
        scored_copy.top("finetune/q5", queries="test", **AT)


# --- several checkpoints -------------------------------------------------------------------------------------------


def test_checkpoints_side_by_side(scored):
    single = {name: scored.top("q100", checkpoint=name, k=3, sketcher="small") for name in ("base", "epoch-1")}
    both = scored.top("q100", checkpoints=["base", "epoch-1"], k=3, sketcher="small")
    assert [hits.frame.equals(single[hits.checkpoint].frame) for hits in both] == [True, True]
    assert both.frame.columns[:3] == ["query_id", "checkpoint", "rank"]
    assert both.frame.filter(checkpoint="epoch-1").drop("query_id", "checkpoint").equals(single["epoch-1"].frame)
    (frame,) = both.side_by_side.values()
    assert frame.columns[:4] == ["rank base", "score base", "rank epoch-1", "score epoch-1"]
    assert frame["rank base"].drop_nulls().sort().to_list() == [1, 2, 3]
    assert frame["rank epoch-1"].drop_nulls().sort().to_list() == [1, 2, 3]
    assert pl.DataFrame(both).equals(both.frame)


def test_the_command_shows_checkpoints_side_by_side(scored):
    rows = command("top q100 -c base -c epoch-1 -k 3 -f json", scored).rows
    assert [(row["checkpoint"], row["rank"]) for row in rows] == [
        (name, rank) for name in ("base", "epoch-1") for rank in (1, 2, 3)
    ]
    table = command("top q100 -c base -c epoch-1 -k 3", scored)
    assert table.out.startswith("query q100\n")
    assert "score epoch-1" in table.out
    assert "q100 at epoch-1: against the other sources' samples: " in table.err
    summed = command("top q100 -c base -c epoch-1 -k 3 -f json --over-checkpoints sum", scored)
    assert [row["rank"] for row in summed.rows] == [1, 2, 3]
    assert len(command("top q100 -c base -c epoch-1 -k 3 -f json -m tracin", scored).rows) == 3


# --- several queries -----------------------------------------------------------------------------------------------


def test_several_ids_give_a_ranking_each(scored):
    several = scored.top(["q101", "q100", "finetune/q0", "q101"], k=2, **AT)
    assert [hits.query_id for hits in several] == ["q101", "q100", "finetune/q0"]
    assert several[1].frame.equals(scored.top("q100", k=2, **AT).frame)
    rows = command("top q101 q100 -c base -k 2 -f json", scored).rows
    assert [(row["query_id"], row["rank"]) for row in rows] == [("q101", 1), ("q101", 2), ("q100", 1), ("q100", 2)]
    assert command("top q101 q100 -c base -k 2", scored).out.count("query q10") == 2


NEW = qa_rows(2, start=102)


def test_queries_from_stdin_and_files(scored, tmp_path):
    ids = [row["id"] for row in NEW]
    stored = {name: scored.top(name, k=3, **AT).frame for name in ids}
    path = write_jsonl(tmp_path / "new.jsonl", NEW)
    by_file = command(f"top -c base -k 3 -f json --file {path}", scored)
    by_stdin = command("top -c base -k 3 -f json --file -", scored, stdin=path.read_text())
    assert by_stdin == by_file
    for name, frame in stored.items():
        rows = [row for row in by_file.rows if row["query_id"] == name]
        assert [row["sample_id"] for row in rows] == frame["sample_id"].to_list()
    lines = command("top -c base -k 3 -f json --file - --query-variant raw", scored, stdin="the sea\n\nthe kidney\r\n")
    assert [row["query_id"] for row in lines.rows] == ["new-1"] * 3 + ["new-2"] * 3
    one = command("top -c base -k 3 -f json --file - --query-variant raw", scored, stdin="the kidney\n")
    assert [row["score"] for row in one.rows] == [row["score"] for row in lines.rows[3:]]
    assert "query_id" not in one.rows[0]


@pytest.mark.parametrize(
    ("stdin", "message"),
    [
        ("", "stdin has no query"),
        ("\n \n", "stdin has no query"),
        ('{"text": "a"}\nb\n', "stdin, line 2, is not JSON"),
        ('{"txt": "a"}\n', "a row needs `messages`"),
        ('{"id": "a", "text": "x"}\n{"id": "a", "text": "y"}', "two of the new queries have the id `a`"),
    ],
)
def test_wrong_stdin_is_refused(scored, stdin, message):
    result = command("top -c base --file -", scored, stdin=stdin)
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith(f"error: {message}")


def test_new_texts_in_a_list(scored):
    texts = [NewText(row=row) for row in NEW]
    several = scored.top(new=texts, checkpoints=["base", "epoch-1"], k=2, sketcher="small")
    assert [(hits.query_id, hits.checkpoint) for hits in several] == [
        (row["id"], name) for row in NEW for name in ("base", "epoch-1")
    ]
    assert json.loads(several.frame.write_json())[0]["query_id"] == "q102"
    with pytest.raises(InputError, match="no query is given"):
        scored.top(new=[], **AT)
    with pytest.raises(InputError, match="the new queries name several precisions"):
        scored.top(new=[*texts, NewText(text="a", precision="bfloat16")], **AT)
    with pytest.raises(InputError, match="no query is given"):
        scored.top([], **AT)
    with pytest.raises(InputError, match="`checkpoint` and `checkpoints` can't be combined"):
        scored.top("q100", checkpoint="base", checkpoints=["base"])
    with pytest.raises(InputError, match="no checkpoint is given"):
        scored.top("q100")
