"""Without `--sketcher`: the default one if it has sketches, else the only one that has; of several, an error."""

from __future__ import annotations

import logging

import polars as pl
import pytest
from helpers.program import lark
from helpers.texts import text_rows, write_jsonl

from lark_store.errors import NothingToScoreError

NOTE = "the default sketcher `lark` has no sketches at `base`; this is by `small`, the only sketcher that has some"
ASKS = {
    "top": lambda store, **of: store.top("q100", checkpoint="base", **of).frame,
    "ft_pt": lambda store, **of: store.ft_pt("base", **of).drop("note"),
    "scores": lambda store, **of: store.scores(checkpoint="base", **of).frame,
    "self_influence": lambda store, **of: store.self_influence(checkpoints=["base"], **of),
    "trajectory": lambda store, **of: store.trajectory("q100", "q0", **of),
    "metrics": lambda store, **of: store.metrics(checkpoint="base", **of),
}


@pytest.mark.parametrize("ask", ASKS)
def test_the_only_sketcher_with_sketches_is_used(scored, ask):
    assert scored.default_sketcher == "lark"
    assert ASKS[ask](scored).equals(ASKS[ask](scored, sketcher="small"))


def test_python_is_told(scored, caplog, tmp_path):
    assert NOTE in scored.top("q100", checkpoint="base").notes
    assert NOTE in scored.scores(checkpoint="base").notes
    assert set(scored.ft_pt("base")["note"]) == {NOTE}
    assert not caplog.messages
    scored.self_influence(checkpoints=["base"])
    scored.trajectory("q100", "q0")
    scored.metrics()
    scored.export("sketches", tmp_path / "a.parquet", vectors=True, checkpoints=["base"])
    assert len(pl.read_parquet(tmp_path / "a.parquet")) == 30
    assert [(record.levelno, record.getMessage().split(";")[0]) for record in caplog.records] == [
        (logging.WARNING, "the default sketcher `lark` has no sketches at `base`"),
        (logging.WARNING, "the default sketcher `lark` has no sketches"),
        (logging.WARNING, "the default sketcher `lark` has no `cosine` scores"),
        (logging.WARNING, "the default sketcher `lark` has no sketches at `base`"),
    ]
    assert not scored.top("q100", checkpoint="base", sketcher="small").notes


@pytest.mark.parametrize(
    "line", ["top q100 -c base", "ft-pt -c base", "scores -c base", "self-influence -c base", "metrics -c base"]
)
def test_commands_say_so_once(scored, line):
    result = lark(f"{line} -f json", store=scored.path)
    assert result.rows
    assert result.err.count("note: the default sketcher `lark` has no ") == 1


def test_sql_uses_the_same(scored):
    rows = scored.sql("select scored_by, note from top_influence('base', 'q100')")
    assert rows.unique().rows() == [("small · cosine", NOTE)]
    assert set(scored.sql("from metrics()")["scored_by"]) == {"small · cosine"}


def test_of_several_sketchers_none_is_chosen(scored_copy):
    scored_copy.sketcher_add("other", k=256)
    scored_copy.ingest("base", ["songs", "test"], sketcher="other")
    for ask in (ASKS["top"], ASKS["self_influence"], ASKS["ft_pt"]):
        with pytest.raises(NothingToScoreError) as caught:
            ask(scored_copy)
        assert caught.value.command_line == (
            "the default sketcher `lark` has no sketches at `base`, but `other`, `small` have\n\n"
            "hint: choose one with `--sketcher NAME`"
        )
    assert scored_copy.top("q100", checkpoint="epoch-1").score == "small · cosine"  # has sketches of one only
    assert scored_copy.metrics()["scored_by"][0] == "small · cosine"  # scores of one only
    scored_copy.attribute("base", queries="test", query_variant="chatml", sketcher="other", method="dot")
    scored_copy.attribute(["base", "epoch-1"], queries="test", sketcher="small", method="dot")
    with pytest.raises(NothingToScoreError, match="no `dot` scores at `base`, but `other`, `small` have"):
        scored_copy.metrics(checkpoint="base", method="dot")
    assert scored_copy.metrics(checkpoint="epoch-1", method="dot")["scored_by"][0] == "small · dot"
    scored_copy.attribute("base", queries="test", query_checkpoint="epoch-1", sketcher="small")
    assert scored_copy.metrics(checkpoint="base", query_checkpoint="epoch-1")["scored_by"][0] == "small · dot"
    scored_copy.sketcher_default("other")
    assert scored_copy.top("q100", checkpoint="base").score == "other · cosine"
    assert scored_copy.top("q100", checkpoint="base").notes == ()
    assert scored_copy.top("q100", checkpoint="epoch-1").score == "small · cosine"


@pytest.mark.parametrize("method", ["cosine", "bm25"])
def test_notes_on_coverage_are_those_of_the_used_sketcher(scored_copy, tmp_path, method):
    more = write_jsonl(tmp_path / "more.jsonl", text_rows(9))
    scored_copy.source_add("songs", more, stage="pretrain")
    result = lark(f"ft-pt -c base -m {method} -f json", store=scored_copy.path)
    assert "note: searched 5 of 9 samples of `songs` as `raw` at `base`" in result.err
