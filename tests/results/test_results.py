"""Results of the API: sequences of rows, frames, and tables in a terminal and a notebook."""

from __future__ import annotations

import sys

import pandas as pd
import polars as pl
import pytest

import lark_store
from lark_store.errors import InputError, NothingToScoreError
from lark_store.results import Hit, Hits, IngestReport, ScoreMatrix

FRAME = pl.DataFrame(
    {
        "rank": [1, 2, 3],
        "score": [0.9, 0.4, -0.1],
        "noise": [0.01, 0.02, None],
        "p_value": [0.0001, 0.2, None],
        "q_value": [0.001, 0.4, None],
        "source": ["train", "train", "web"],
        "stage": ["finetune", "finetune", "pretrain"],
        "variant": ["raw"] * 3,
        "sample_id": ["a", "b", "c"],
        "text": ["Is <b>aspirin</b> safe?\nyes", "word " * 60 + "end", "song"],
    }
)


def hits_of(frame=FRAME):
    facts = {"query_id": "q7", "checkpoint": "base", "query_checkpoint": "base", "query_variant": "raw"}
    return Hits(
        frame=frame, method="cosine", n_searched=3, ingest_runs=[1], score="lark · cosine", scale="+1 same", **facts
    )


def test_hits_are_a_sequence_of_records():
    hits = hits_of()
    assert len(hits) == 3
    assert hits[0] == Hit(1, 0.9, 0.01, 0.0001, 0.001, "train", "finetune", "raw", "a", "Is <b>aspirin</b> safe?\nyes")
    assert [hit.sample_id for hit in hits] == ["a", "b", "c"]
    assert (hits[-1].sample_id, hits[-1].p_value) == ("c", None)
    assert [hit.rank for hit in hits[1:]] == [2, 3]
    with pytest.raises(IndexError, match="row 3 of 3"):
        _ = hits[3]


def test_further_columns_of_a_hit_are_kept():
    assert hits_of(FRAME.with_columns(bm25=pl.lit(2.5)))[0].more == {"bm25": 2.5}


def test_hits_convert_to_frames():
    hits = hits_of()
    assert hits.to_polars() is hits.frame
    assert isinstance(hits.to_pandas(), pd.DataFrame)
    assert pl.DataFrame(hits).equals(FRAME)
    assert pd.DataFrame.from_arrow(hits)["sample_id"].to_list() == ["a", "b", "c"]


def test_missing_pandas_is_an_error_with_a_hint(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(InputError, match="hint: install it with `pip install pandas`"):
        hits_of().to_pandas()


def test_repr_is_a_table_for_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")
    first, facts, header, *_ = lines = repr(hits_of()).splitlines()
    assert (first, facts) == (
        "Hits: 3 rows",
        "query q7 · checkpoint base · sketcher lark · method cosine · variant raw",
    )
    assert header.split() == FRAME.drop("variant").columns
    assert "<0.001" in lines[4]
    assert max(map(len, lines[:-1])) <= 110
    assert "… shortened · `.to_polars()` has everything" in lines
    assert lines[-1].startswith("exact lark · cosine over 3 sketches")


def test_html_shows_escaped_texts_in_full():
    html = hits_of()._repr_html_()
    assert "Is &lt;b&gt;aspirin&lt;/b&gt; safe? yes" in html
    assert "<b>" not in html
    assert "<details><summary>word" in html
    assert ("word " * 60 + "end") in html
    assert "<p>query q7 · checkpoint base · sketcher lark · method cosine · variant raw</p>" in html
    assert "score: +1 same" in html


def test_long_results_show_their_first_rows():
    rows = pl.DataFrame({"run": range(50), "n_failed": [0] * 49 + [1]})
    report = IngestReport(units=rows, failures=rows.clear(), notes=[])
    text = repr(report)
    assert text.startswith("IngestReport: 50 rows\nrun  n_failed\n")
    assert text.endswith("\n30 more rows")
    assert "30 more rows" in report._repr_html_()
    assert [row["run"] for row in report[:2]] == [0, 1]
    assert report[49] == {"run": 49, "n_failed": 1}


def test_scores_show_without_their_long_form(scored, monkeypatch):
    scores = scored.scores(checkpoint="epoch-1", sketcher="small")
    assert isinstance(scores, ScoreMatrix)
    assert scores.to_pandas().shape == (scores.matrix.size, 5)
    shapes = []
    frame = ScoreMatrix.frame.fget
    monkeypatch.setattr(ScoreMatrix, "frame", property(lambda self: shapes.append(self.matrix.shape) or frame(self)))
    assert f"\n{scores.matrix.size - 20} more rows" in repr(scores).replace(" · ", "\n")
    assert shapes == [(1, len(scores.samples))]


def test_new_text_is_public(scored):
    new = lark_store.NewText(text="A song about the sea.")
    with pytest.raises(NothingToScoreError, match="no sketch satisfies"):
        scored.top(checkpoint="base", new=new, sketcher="small", method="bm25", where="n_tokens < 0")
