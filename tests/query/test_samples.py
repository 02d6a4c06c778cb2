"""`sample show`, `sample list` and the lists of named objects."""

from __future__ import annotations

import json

import polars as pl
import pytest
from helpers.program import lark
from helpers.texts import qa_rows, write_jsonl
from polars.testing import assert_frame_equal

from lark_store import Store
from lark_store.errors import CheckpointError, InputError, NameUnknownError, QueryError
from lark_store.schema.chats import CONTENT

KINDS = ("checkpoint", "source", "variant", "sketcher")


@pytest.mark.parametrize("kind", KINDS)
def test_a_list_is_the_table_of_show(scored, kind):
    frame = getattr(scored, f"{kind}_list")()
    assert_frame_equal(frame, getattr(scored.show(), f"{kind}s"))
    result = lark(f"{kind} list -f json", store=scored.path)
    assert (result.rows, result.err) == (json.loads(frame.write_json()), "")
    assert lark(f"{kind} list -f csv", store=scored.path).out.startswith("name,")


def test_a_sample_is_shown_whole(scored):
    sample = scored.sample_show("finetune/q0")
    (row,) = scored.sql("from samples where source = 'finetune' and sample_id = 'q0'").to_dicts()
    assert (sample.source, sample.stage, sample.sample_id) == ("finetune", "finetune", "q0")
    assert sample.parts == {"prompt": row["prompt"], "response": row["response"]}
    assert sample.meta == json.loads(row["meta"])
    assert sample.sketches.select("sketcher", "checkpoint", "variant").rows() == [
        ("small", "base", "chatml"),
        ("small", "epoch-1", "chatml"),
    ]
    assert sample.failures.is_empty()
    assert scored.sample_show("q0").parts == sample.parts


def test_it_is_rendered_as_the_model_sees_it(scored):
    for name in ("finetune/q0", "songs/" + scored.sample_list("songs", limit=1)["sample_id"].item()):
        for variant, text, error in scored.sample_show(name).rendered.iter_rows():
            source, _, sample_id = name.partition("/")
            pieces = scored.variant_show(variant, sample=sample_id, source=source).pieces
            assert error is None
            assert "".join(pieces).endswith(text)  # a tokenizer may begin with a special token


def test_only_the_models_template_needs_its_files(scored, monkeypatch, tmp_path, texts):
    def gone(_):
        raise CheckpointError("the folder is gone", "restore it")

    monkeypatch.setattr("lark_store.modeling.chat_templates.chat_template_of", gone)
    assert [row[::2] for row in scored.sample_show("q0").rendered.rows()] == [
        ("raw", None),
        ("chatml", "the folder is gone"),
    ]
    with Store.create(tmp_path / "new.store") as store:
        store.source_add("songs", texts["songs"], stage="pretrain")
        sample = store.sample_show(store.sample_list("songs", limit=1)["sample_id"].item())
        assert sample.template_of is None
        assert sample.rendered["error"].null_count() == 2


def test_a_sample_that_fails_says_why(store, tmp_path):
    (tmp_path / "t.jinja").write_text("{{ text }}", encoding="utf-8")
    store.variant_add("texts", template=tmp_path / "t.jinja")
    assert store.ingest("base", "finetune", "texts", sketcher="small").n_failed == 6
    sample = store.sample_show("q0")
    assert sample.sketches.is_empty()
    assert sample.failures["reason"].item() == sample.rendered.filter(variant="texts")["error"].item()
    result = lark("sample show finetune/q0", store=store.path)
    assert "as `texts` it fails: the template fails: it prints `text`, which this sample lacks" in result.out
    assert result.err == "it has no sketch\n"


@pytest.mark.parametrize(
    ("name", "fact", "hint"),
    [
        ("finetune/q00", "source `finetune` has no sample `q00`", "did you mean `q0`"),
        ("q00", "no sample `q00`", "did you mean `q100`, `q0` or "),
        ("test/q1000", "source `test` has no sample `q1000`", "did you mean `q100`, `q103` or `q102`?"),
        ("finetune", "no sample `finetune`", "the store has "),
        ("nowhere/q0", "no sample `nowhere/q0`", ""),
    ],
)
def test_unknown_ids_have_the_nearest_as_hint(scored, name, fact, hint):
    with pytest.raises(NameUnknownError) as caught:
        scored.sample_show(name)
    assert caught.value.fact == fact
    assert caught.value.hint.startswith(hint)


def test_an_id_in_several_sources_is_refused_with_their_names(store, tmp_path):
    store.source_add("more", write_jsonl(tmp_path / "more.jsonl", qa_rows(1)), stage="pretrain")
    with pytest.raises(InputError) as caught:
        store.sample_show("q0")
    assert str(caught.value) == (
        "sample `q0` is in several sources: `finetune`, `more`\n\nhint: write `finetune/q0` or `more/q0`"
    )
    store.source_add("odd", write_jsonl(tmp_path / "odd.jsonl", [qa_rows(1)[0] | {"id": "a/b"}]), stage="query")
    assert store.sample_show("a/b").source == store.sample_show("odd/a/b").source == "odd"


def test_the_command_prints_text_and_data(scored):
    shown = lark("sample show finetune/q0", store=scored.path)
    assert (shown.code, shown.err) == (0, "")
    sample = scored.sample_show("finetune/q0")
    assert shown.out.startswith("finetune/q0 (stage finetune)\n")
    assert f"\nprompt:\n{sample.prompt}\n\nresponse:\n{sample.response}\n\nas `raw`:\n" in shown.out
    assert "sketches (2)" in shown.out
    data = lark("sample show finetune/q0 -f json", store=scored.path).rows
    assert data["sample"][0]["prompt"] == sample.prompt
    assert [row["variant"] for row in data["rendered"]] == ["raw", "chatml"]


def test_samples_are_listed_page_by_page(scored):
    everything = scored.sample_list("finetune")
    assert everything.columns == ["sample_id", *CONTENT, "label", "meta"]
    assert everything["sample_id"].to_list() == [row["id"] for row in qa_rows(6)]
    pages = [scored.sample_list("finetune", limit=4, offset=offset) for offset in (0, 4)]
    assert_frame_equal(pl.concat(pages), everything)
    chosen = scored.sample_list("finetune", where="response = 'yes'")
    assert_frame_equal(chosen, everything.filter(response="yes"))
    assert scored.sample_list("finetune", offset=6).is_empty()
    first = lark("sample list finetune -n 4 -f json", store=scored.path)
    assert first.columns("sample_id") == [(f"q{i}",) for i in range(4)]
    assert first.err == "there are more samples; `--offset 4` shows the next\n"
    last = lark("sample list finetune -n 4 --offset 4 -f json -w \"sample_id != 'q0'\"", store=scored.path)
    assert (last.columns("sample_id"), last.err) == ([("q5",)], "")


def test_wrong_pages_are_refused(scored):
    with pytest.raises(InputError, match="`limit` must be at least 1, not 0"):
        scored.sample_list("finetune", limit=0)
    with pytest.raises(InputError, match="`offset` must be at least 0, not -1"):
        scored.sample_list("finetune", offset=-1)
    with pytest.raises(NameUnknownError, match="no source `finetun`"):
        scored.sample_list("finetun")
    with pytest.raises(QueryError) as caught:
        scored.sample_list("finetune", where="n_tokens < 3")
    assert caught.value.hint.startswith("the columns are source, stage, domain, sample_id, prompt, ")


def test_snapshots_have_samples_too(scored_copy):
    scored_copy.snapshot_create("then")
    with Store.open(scored_copy.path, snapshot="then") as then:
        assert len(then.sample_list("finetune")) == 6
        assert then.sample_show("q0").template_of == "epoch-1"
