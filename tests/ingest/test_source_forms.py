"""`source add` of every form and kind of input: what is stored, summarised, previewed and replaced."""

from __future__ import annotations

import io
import json
import sys

import polars as pl
import pytest
from helpers.program import lark
from helpers.texts import write_jsonl

from lark_store import Store
from lark_store.errors import InputError
from lark_store.ingest.new_query import read_sample
from lark_store.modeling.forms import FORMS

CHATS = [
    {
        "id": "c1",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Is it safe?"},
            {"role": "assistant", "content": "Yes."},
        ],
        "tools": [{"type": "function"}],
        "year": 2020,
    },
    {"id": "c2", "messages": [{"role": "user", "content": "Hello!"}], "year": 2021},
]
PAIR = {"id": "p", "prompt": "Is it?", "chosen": " yes", "rejected": " no"}
ALPACA = {"id": "i", "instruction": "Add.", "output": "2"}


@pytest.fixture
def shelf(tmp_path):
    with Store.create(tmp_path / "lark.store") as store:
        yield store


def stored(store, name, columns="sample_id, messages, tools, prompt, completion, text"):
    return store.sql(f"SELECT {columns} FROM samples WHERE source = '{name}' ORDER BY sample_id").rows()


def test_chats_are_stored_as_given(shelf):
    report = shelf.source_add("chats", CHATS, stage="finetune")
    assert (report.n_read, report.n_added, report.forms) == (2, 2, {"messages": 2})
    assert report.summary == (
        "2 chats, 1.5 turns on average, 50% with a system prompt, 1 without an assistant turn (no targets)"
    )
    assert stored(shelf, "chats", "sample_id, messages, tools, meta") == [
        (
            row["id"],
            json.dumps(row["messages"]),
            json.dumps(row["tools"]) if "tools" in row else None,
            json.dumps({"year": row["year"]}),
        )
        for row in CHATS
    ]
    assert shelf.sql("SELECT uri FROM sources").item() == "Python: list"
    assert shelf.source_add("chats", pl.DataFrame(CHATS), stage="finetune").n_existing == 2


def test_pairs_and_instructions_are_stored(shelf):
    report = shelf.source_add("mixed", [PAIR, ALPACA], stage="finetune")
    assert (report.n_read, report.n_added, report.forms) == (2, 3, {"preference": 1, "alpaca": 1})
    assert report.summary == "1 preference pair; 1 prompt with a completion"
    assert report.notes == [FORMS["alpaca"].note]
    assert [row[:1] + row[3:5] for row in stored(shelf, "mixed")][1:] == [
        ("p#chosen", "Is it?", " yes"),
        ("p#rejected", "Is it?", " no"),
    ]
    assert stored(shelf, "mixed", "meta->>'$.pair', meta->>'$.side'")[1:] == [("p", "chosen"), ("p", "rejected")]


def test_a_mapping_of_messages_is_remembered(shelf):
    columns = {"messages": "log", "messages.role": "who", "role.user": "Customer"}
    rows = [{"id": "1", "log": [{"who": "Customer", "content": "a"}]}]
    assert shelf.source_add("logs", rows, stage="finetune", columns=columns).n_added == 1
    assert shelf.source_add("logs", rows, stage="finetune").n_existing == 1
    assert stored(shelf, "logs", "messages") == [('[{"role": "user", "content": "a"}]',)]


def changed(row, text):
    return row | {"messages": [{"role": "user", "content": text}]}


def test_a_generator_replaces_in_one_pass(shelf):
    shelf.source_add("chats", CHATS, stage="finetune")
    rows = (row for row in [changed(CHATS[0], "new"), CHATS[1], CHATS[1] | {"id": "c3"}, changed(CHATS[1], "late")])
    report = shelf.source_add("chats", rows, stage="finetune", replace=True)
    assert (report.n_replaced, report.n_added, report.n_existing, report.n_changed) == (1, 1, 1, 1)
    assert [json.loads(messages)[0]["content"] for (messages,) in stored(shelf, "chats", "messages")] == [
        "new",
        "Hello!",
        "Hello!",
    ]
    assert stored(shelf, "chats", "tools, meta")[0] == (json.dumps(CHATS[0]["tools"]), '{"year": 2020}')


def test_an_error_in_a_generator_adds_nothing(shelf):
    def rows():
        yield from CHATS
        yield {"id": "c4", "messages": [{"role": "human", "content": "a"}]}

    with pytest.raises(InputError, match="`Python: generator`, row 3: message 1 of column `messages`"):
        shelf.source_add("chats", rows(), stage="finetune")
    assert shelf.sql("SELECT count(*) FROM samples").item() == 0


def test_hint_of_python_speaks_python(shelf):
    with pytest.raises(InputError) as caught:
        shelf.source_add("chats", [{"messages": [{"role": "human", "content": "a"}]}], stage="finetune")
    assert 'translate it with `columns={"role.user": "human"}`' in caught.value.hint
    with pytest.raises(InputError, match="`Python: list` holds no samples"):
        shelf.source_add("chats", [], stage="finetune")


def test_empty_rows_of_several_files_are_named_by_file(shelf, tmp_path):
    files = [
        write_jsonl(tmp_path / f"{name}.jsonl", [{"id": name, "text": "a"}, {"id": "", "text": ""}]) for name in "ab"
    ]
    report = shelf.source_add("texts", files, stage="pretrain")
    assert report.examples["empty"] == [f"{file}, row 2" for file in files]
    assert shelf.sql("SELECT uri FROM sources").item() == f"{files[0]}, {files[1]}"


def test_query_from_a_file_may_be_a_chat_of_any_format(tmp_path):
    row = {"messages": [{"role": "user", "content": "a", "name": "b"}, {"role": "assistant", "content": "c"}]}
    pl.DataFrame([row]).write_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text(json.dumps([row]), encoding="utf-8")
    files = [tmp_path / "a.parquet", tmp_path / "a.json", write_jsonl(tmp_path / "a.jsonl", [row])]
    assert {read_sample(file).messages for file in files} == {json.dumps(row["messages"])}


# --- the command ---------------------------------------------------------------------------------------------------


def test_program_reads_patterns_and_summarises(shelf, tmp_path):
    for row in CHATS:
        write_jsonl(tmp_path / f"{row['id']}.jsonl", [row])
    result = lark("source add chats --stage finetune", tmp_path / "c?.jsonl", store=shelf.path)
    assert (result.code, result.err.splitlines()) == (
        0,
        [
            "source `chats`: 2 samples added, 0 already stored",
            "  read 2 chats, 1.5 turns on average, 50% with a system prompt, 1 without an assistant turn (no targets)",
        ],
    )
    files = [tmp_path / f"{row['id']}.jsonl" for row in CHATS]
    again = lark("source add chats --stage finetune", *files, store=shelf.path)
    assert again.err.startswith("source `chats`: 0 samples added, 2 already stored")


def test_program_reads_standard_input(shelf, monkeypatch):
    def add(options, text):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        result = lark(f"source add piped - --stage pretrain {options}", store=shelf.path)
        return result.err.splitlines()[0].partition(": ")[2]

    assert add("", '{"id": "1", "text": "a"}\n') == "1 samples added, 0 already stored"
    assert add("--replace", '{"id": "1", "text": "b"}\n') == "0 samples added, 0 already stored, 1 replaced"
    assert add("--input-format csv", "id,text\n2,c\n") == "1 samples added, 0 already stored"
    assert stored(shelf, "piped", "sample_id, text") == [("1", "b"), ("2", "c")]
    assert shelf.sql("SELECT uri FROM sources").item() == "stdin"


def test_program_prints_notes_of_forms(shelf, tmp_path):
    result = lark("source add i --stage finetune", write_jsonl(tmp_path / "i.jsonl", [ALPACA]), store=shelf.path)
    assert f"note: {FORMS['alpaca'].note}" in result.err


def test_dry_run_previews_and_writes_nothing(shelf, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [*CHATS, PAIR, {"id": "", "text": " "}])
    result = lark("source add mixed --dry-run --stage finetune", path, store=shelf.path)
    assert result.code == 0
    assert result.err.splitlines()[0] == "source `mixed`: 4 samples would be added, 0 already stored"
    assert "  2 rows of form `messages`" in result.err
    assert "  1 row of form `preference`" in result.err
    assert result.out == (
        "--- c1\nsystem: Be brief.\nuser: Is it safe?\nassistant: Yes.\n--- c2\nuser: Hello!\n"
        "--- p#chosen\nIs it? yes\n"
    )
    assert shelf.sql("SELECT count(*) FROM samples").item() == 0
    assert shelf.sql("SELECT count(*) FROM sources").item() == 0


def test_dry_run_of_replacements_changes_nothing(shelf):
    shelf.source_add("chats", CHATS, stage="finetune")
    report = shelf.source_add("chats", [changed(CHATS[0], "new")], stage="finetune", replace=True, dry_run=True)
    assert (report.n_replaced, report.previews) == (1, [{"sample_id": "c1", "content": "user: new"}])
    assert json.loads(stored(shelf, "chats", "messages")[0][0]) == CHATS[0]["messages"]


def test_dry_run_checks_every_row(shelf):
    rows = [*CHATS, *CHATS, {"body": "a"}]
    with pytest.raises(InputError, match="row 5: a row needs"):
        shelf.source_add("chats", rows, stage="finetune", dry_run=True)


def test_dry_run_renders_with_the_newest_checkpoint(store):
    rows = [CHATS[0] | {"tools": None}, PAIR]
    first, second, _ = store.source_add("new", rows, stage="finetune", dry_run=True).previews
    assert first["variant"] == "chatml"
    assert "⟦Yes.⟧" in first["rendered"].replace("⟦ ", "⟦")
    assert (second["variant"], second["rendered"]) == ("raw", "Is it?⟦ yes⟧")


def test_dry_run_says_why_a_sample_is_not_rendered(store, tmp_path):
    row = {"prompt": "Repeat.", "response": "x " * 5000}
    [preview] = store.source_add("new", [row], stage="finetune", dry_run=True).previews
    assert preview["note"].startswith("`chatml`: ")
    path = write_jsonl(tmp_path / "a.jsonl", [row])
    result = lark("source add new --dry-run --stage finetune", path, store=store.path)
    assert "is not rendered: `chatml`: " in result.err
