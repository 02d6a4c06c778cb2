"""Adding sources: what is read, what becomes of it, what is counted, and that an error adds nothing."""

from __future__ import annotations

import contextlib
import itertools
import json

import datasets
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import qa_rows, text_rows, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from lark_store import Store
from lark_store.errors import InputError, NameInvalidError, NameTakenError
from lark_store.ingest.sources import FIELDS, Sample, make_sample
from lark_store.schema.vectors import ROWS_PER_TEXT_BATCH

ROWS = [
    {"id": "1", "text": "plain", "year": "2020"},
    {"id": "2", "text": 'a "quote", a comma;\ta tab\nand a second line', "year": "2021"},
    {"id": "3", "text": "αβγ 漢字 🙂 \N{COMBINING ACUTE ACCENT}", "year": "2022"},
]
NUMBERS = itertools.count()
anything = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    with Store.create(tmp_path_factory.mktemp("shelf") / "lark.store") as made:
        yield made


@pytest.fixture
def name():
    return f"source-{next(NUMBERS)}"


def rows_of(store, name, columns="sample_id, prompt, response, text"):
    return store.sql(f"SELECT {columns} FROM samples WHERE source = '{name}' ORDER BY sample_id").rows()


def add_rows(store, name, folder, rows, **options):
    return store.source_add(name, write_jsonl(folder / "rows.jsonl", rows), stage="pretrain", **options)


WRITERS = {
    "rows.jsonl": lambda path: write_jsonl(path, ROWS),
    "rows.ndjson": lambda path: write_jsonl(path, ROWS),
    "ROWS.JSONL": lambda path: write_jsonl(path, ROWS),
    "rows.parquet": lambda path: pl.DataFrame(ROWS).write_parquet(path),
    "rows.csv": lambda path: pl.DataFrame(ROWS).write_csv(path),
    "rows.tsv": lambda path: pl.DataFrame(ROWS).write_csv(path, separator="\t"),
    "ROWS.TSV": lambda path: pl.DataFrame(ROWS).write_csv(path, separator="\t"),
    "folder": lambda path: datasets.Dataset.from_list(ROWS).save_to_disk(path),
}


@pytest.mark.parametrize("file", WRITERS)
def test_every_format_gives_the_same_samples_and_metadata(shelf, name, tmp_path, file):
    WRITERS[file](tmp_path / file)
    report = shelf.source_add(name, tmp_path / file, stage="pretrain")
    assert (report.n_read, report.n_added, report.examples) == (3, 3, {})
    expected = [(row["id"], None, None, row["text"], json.dumps({"year": row["year"]})) for row in ROWS]
    assert rows_of(shelf, name, "sample_id, prompt, response, text, meta") == expected


def test_a_byte_order_mark_and_blank_lines_are_no_content(shelf, name, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"id": "1", "text": "a"}\n\n  \n{"id": "2", "text": "b"}')
    assert shelf.source_add(name, tmp_path / "a.jsonl", stage="query").n_read == 2
    assert rows_of(shelf, name, "sample_id") == [("1",), ("2",)]


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    path = tmp_path_factory.mktemp("splits") / "folder"
    both = {"train": datasets.Dataset.from_list(qa_rows(3)), "test": datasets.Dataset.from_list(qa_rows(2, start=50))}
    datasets.DatasetDict(both).save_to_disk(path)
    return path


def test_a_folder_with_splits_needs_one_and_gives_that_one(shelf, name, splits):
    with pytest.raises(InputError, match="has splits `train`, `test`") as caught:
        shelf.source_add(name, splits, stage="query")
    assert caught.value.hint == "choose one with `--split`"
    assert shelf.source_add(name, splits, stage="query", split="test").n_added == 2
    assert rows_of(shelf, name, "sample_id") == [("q50",), ("q51",)]


def test_an_unknown_split_is_answered_with_the_known_ones(shelf, name, splits):
    with pytest.raises(InputError, match="`train`"):
        shelf.source_add(name, splits, stage="query", split="nosuch")
    with pytest.raises(InputError, match="is a saved dataset, without configurations"):
        shelf.source_add(name, splits, stage="query", split="test", config="large")


def test_a_split_of_a_folder_without_splits_is_refused(shelf, name, tmp_path):
    WRITERS["folder"](tmp_path / "folder")
    with pytest.raises(InputError, match="has no splits"):
        shelf.source_add(name, tmp_path / "folder", stage="query", split="test")


FORMS = [
    ({"prompt": "Sing!", "response": "La"}, ("Sing!", "La", None)),
    ({"question": "Is it?", "answer": "yes"}, ("Question: Is it?", "yes", None)),
    ({"question": "Q", "context": "C", "answer": "yes"}, ("Context: C\n\nQuestion: Q", "yes", None)),
    ({"question": "Is it?", "context": None, "answer": "yes"}, ("Question: Is it?", "yes", None)),
    ({"text": "A song."}, (None, None, "A song.")),
    ({"text": ["A song,", "a second line."]}, (None, None, "A song,\na second line.")),
    ({"text": 7}, (None, None, "7")),
    ({"text": "  spaces around \n"}, (None, None, "spaces around")),
    ({"prompt": "without a response", "text": "A song."}, (None, None, "A song.")),
]


def test_each_form_of_row_becomes_its_sample(shelf, name, tmp_path):
    add_rows(shelf, name, tmp_path, [{"id": f"{i}", **row} for i, (row, _) in enumerate(FORMS)])
    assert rows_of(shelf, name, "prompt, response, text") == [sample for _, sample in FORMS]


def test_rows_of_several_forms_are_read_from_parquet_as_from_jsonl(shelf, name, tmp_path):
    rows = [{"id": "1", "text": "A song."}, {"id": "2", "prompt": "Sing!", "response": "La"}]
    pl.DataFrame(rows).write_parquet(tmp_path / "rows.parquet")
    pl.DataFrame(rows).write_csv(tmp_path / "rows.csv")
    assert shelf.source_add(name, tmp_path / "rows.parquet", stage="pretrain").n_added == 2
    assert shelf.source_add(name, tmp_path / "rows.csv", stage="pretrain").n_existing == 2


def test_columns_map_fields_and_reach_into_nested_lists(shelf, name, tmp_path):
    nested = {"pubid": 7, "q": "Is it?", "context": {"contexts": ["One.", "Two."], "labels": ["A"]}, "final": "yes"}
    columns = {
        "sample_id": "pubid",
        "question": "q",
        "context": "context.contexts",
        "answer": "final",
        "label": "final",
    }
    add_rows(shelf, name, tmp_path, [nested], columns=columns)
    expected = ("7", "Context: One.\nTwo.\n\nQuestion: Is it?", "yes", "yes", '{"context": {"labels": ["A"]}}')
    assert rows_of(shelf, name, "sample_id, prompt, response, label, meta") == [expected]


def test_a_field_within_a_null_column_is_null():
    sample = make_sample({"question": "Is it?", "context": None, "answer": "yes"}, {"context": "context.contexts"})
    assert (sample.prompt, sample.meta) == ("Question: Is it?", {})


def test_a_mapping_is_remembered_for_the_next_time(shelf, name, tmp_path):
    add_rows(shelf, name, tmp_path, [{"id": "1", "body": "a"}], columns={"text": "body"})
    report = add_rows(shelf, name, tmp_path, [{"id": "1", "body": "a"}, {"id": "2", "body": "b"}])
    assert (report.n_added, report.n_existing) == (1, 1)


def test_ids_come_from_sample_id_else_id_else_the_content(shelf, name, tmp_path):
    rows = [{"sample_id": "s", "id": "i", "text": "a"}, {"id": 0, "text": "b"}, {"id": None, "text": "c"}]
    add_rows(shelf, name, tmp_path, rows)
    ids = {text: sample_id for sample_id, text in rows_of(shelf, name, "sample_id, text")}
    assert (ids["a"], ids["b"]) == ("s", "0")
    assert ids["c"] == Sample("", text="c").content_sha256[:16]


def test_other_columns_are_kept_as_json_metadata(shelf, name, tmp_path):
    rows = [{"id": "1", "text": "a", "label": 3, "year": 2020, "tags": ["x", {"y": None}], "ünï": "🙂"}]
    add_rows(shelf, name, tmp_path, rows)
    [(label, meta)] = rows_of(shelf, name, "label, meta")
    assert label == "3"
    assert json.loads(meta) == {"year": 2020, "tags": ["x", {"y": None}], "ünï": "🙂"}
    assert rows_of(shelf, name, "meta->>'$.year'") == [("2020",)]


def test_an_id_column_that_is_not_used_is_kept_as_metadata(shelf, name, tmp_path):
    add_rows(shelf, name, tmp_path, [{"id": "1", "pubid": "9", "text": "a"}], columns={"sample_id": "pubid"})
    assert rows_of(shelf, name, "meta") == [('{"id": "1"}',)]


def test_metadata_is_json_even_where_a_figure_is_not_a_number(shelf, name, tmp_path):
    figures = {"figure": [float("nan")], "more": [[1.5, float("inf")]]}
    pl.DataFrame({"text": ["a"], **figures}).write_parquet(tmp_path / "rows.parquet")
    shelf.source_add(name, tmp_path / "rows.parquet", stage="pretrain")
    [(meta,)] = rows_of(shelf, name, "meta")
    assert json.loads(meta, parse_constant=pytest.fail) == {"figure": None, "more": [1.5, None]}


def test_duplicates_empty_and_changed_rows_are_counted_and_named(shelf, name, tmp_path):
    same, other = {"id": "a", "text": "A"}, {"id": "a", "text": "changed"}
    rows = [same, {"id": "b", "text": " "}, same, other, {"id": "c", "text": "C"}, {"id": "d", "text": None}]
    report = add_rows(shelf, name, tmp_path, rows)
    assert (report.n_read, report.n_added, report.n_existing) == (6, 2, 0)
    assert (report.n_duplicate, report.n_empty, report.n_changed) == (1, 2, 1)
    assert report.examples == {"duplicate": ["a"], "empty": ["row 2", "row 6"], "changed": ["a"]}
    assert rows_of(shelf, name, "sample_id, text") == [("a", "A"), ("c", "C")]


def test_at_most_three_examples_are_named(shelf, name, tmp_path):
    report = add_rows(shelf, name, tmp_path, [{"text": "a"}] * 6)
    assert (report.n_duplicate, len(report.examples["duplicate"])) == (5, 3)


def test_adding_again_adds_only_new_rows_and_keeps_the_old(shelf, name, tmp_path):
    add_rows(shelf, name, tmp_path, text_rows(3))
    changed = [{"id": "sea-0", "text": "another text"}, *text_rows(5)[1:]]
    report = add_rows(shelf, name, tmp_path, changed)
    assert (report.n_added, report.n_existing, report.n_changed) == (2, 2, 1)
    assert report.examples["changed"] == ["sea-0"]
    assert rows_of(shelf, name, "text") == [(row["text"],) for row in text_rows(5)]
    assert add_rows(shelf, name, tmp_path, text_rows(5)).n_existing == 5


def nothing_is_added(store, name, path, **options):
    before = store.sql("SELECT count(*) FROM samples").item()
    with pytest.raises(InputError) as caught:
        store.source_add(name, path, **({"stage": "pretrain"} | options))
    assert store.sql("SELECT count(*) FROM samples").item() == before
    assert store.sql(f"SELECT * FROM sources WHERE name = '{name}'").is_empty()
    return caught.value


GOOD = b'{"id": "0", "text": "good"}\n'
NESTED = b'{"text": "a", "m": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
DEEP = b'{"text": "a", "m": ' + b"[" * 990 + b"]" * 990 + b"}"  # refused as JSON or as metadata, by Python's version
BROKEN = [
    ("a.jsonl", GOOD + b'{"text":\n', ["a.jsonl`, line 2, is not JSON", "column 1"]),
    ("a.jsonl", GOOD + b"\n[1]\n", ["a.jsonl`, line 3, is not a JSON object"]),
    ("a.jsonl", GOOD + b'{"text": {"parts": ["a"]}}\n', ["column `text` holds dict"]),
    ("a.jsonl", GOOD + b'{"body": "b"}\n', ["`prompt` and `response`", "it has `body`"]),
    ("a.jsonl", GOOD + b'{"text": "\xff"}\n', ["a.jsonl` is not UTF-8"]),
    ("a.jsonl", GOOD.decode().encode("utf-16"), ["a.jsonl` is not UTF-8: line 1, byte 1 of the file"]),
    ("a.jsonl", b"\xef\xbb\xbf\xff", ["line 1, byte 4 of the file"]),
    ("a.csv", b"id,text\n1,\xff\n", ["a.csv` is not UTF-8: line 2, byte 11 of the file"]),
    ("a.csv", b"id;text\n1;a\n", ["it has `id;text`"]),
    ("a.jsonl", b'{"text": ""}\n{"text": null}\n', ["a.jsonl` holds no samples", "2 empty rows"]),
    ("a.jsonl", b"", ["a.jsonl` holds no samples"]),
    ("a.csv", b"id,text\n", ["a.csv` holds no samples"]),
    ("a.parquet", b"", ["a.parquet` can't be read"]),
    ("a.parquet", b"no Parquet at all", ["a.parquet` can't be read"]),
    ("a.jsonl", GOOD + b'{"body": "b"}', ["a.jsonl", "row 2"]),
    ("a.jsonl", GOOD + b'{"text": {"parts": []}}', ["a.jsonl", "row 2"]),
    ("a.jsonl", GOOD * 9000 + b'{"text": "\xff"}', ["line 9001, byte 252011 of"]),
    ("a.jsonl", GOOD + rb'{"text": "\ud800"}', ["a.jsonl", "2"]),
    ("a.jsonl", GOOD + NESTED, ["a.jsonl", "2"]),
    ("a.jsonl", GOOD + b'{"text": "a", "n": %s}' % (b"9" * 5000), ["a.jsonl"]),
    ("a.csv", b"id,text,z\n1,a,b,c\n", ["a.csv", "line 2"]),
    ("a.csv", b'id,text\n1,"a\nb"\n2,b,c\n', ["the row that ends at line 4 has more cells"]),
    ("a.jsonl", GOOD + DEEP, ["a.jsonl`, ", " 2", "nested too deeply"]),
    ("a.jsonl", GOOD + b'{"text": ["a", 1, null]}', ["row 2: column `text` holds list of NoneType and int and str"]),
]


@pytest.mark.parametrize(("file", "content", "facts"), BROKEN, ids=itertools.count())
def test_an_error_in_a_file_adds_nothing_and_says_what_and_where(shelf, name, tmp_path, file, content, facts):
    (tmp_path / file).write_bytes(content)
    error = nothing_is_added(shelf, name, tmp_path / file)
    assert [fact for fact in facts if fact not in error.fact] == []
    assert error.hint


@pytest.mark.parametrize("last", ["{broken", '{"body": "b"}'])
def test_an_error_after_the_first_batch_adds_nothing(shelf, name, tmp_path, last):
    path = write_jsonl(tmp_path / "long.jsonl", text_rows(ROWS_PER_TEXT_BATCH + 10))
    with path.open("a", encoding="utf-8") as lines:
        lines.write(last)
    nothing_is_added(shelf, name, path)


def test_an_error_while_adding_again_leaves_the_source_as_it_was(shelf, name, tmp_path):
    add_rows(shelf, name, tmp_path, text_rows(2))
    (tmp_path / "rows.jsonl").write_text('{"id": "new", "text": "a"}\n{broken', encoding="utf-8")
    with pytest.raises(InputError, match="line 2, is not JSON"):
        shelf.source_add(name, tmp_path / "rows.jsonl", stage="pretrain")
    assert rows_of(shelf, name, "sample_id") == [("sea-0",), ("sea-1",)]


@pytest.mark.parametrize("damage", ["truncated", "overwritten"])
def test_a_damaged_parquet_file_adds_nothing(shelf, name, tmp_path, damage):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(text_rows(6000)), path, row_group_size=1000, compression="none")
    data = path.read_bytes()
    third = len(data) // 3
    path.write_bytes(data[: 2 * third] if damage == "truncated" else data[:third] + b"\xff" * third + data[2 * third :])
    assert "rows.parquet` can't be read: " in nothing_is_added(shelf, name, path).fact


def test_a_column_of_bytes_is_no_text(shelf, name, tmp_path):
    pl.DataFrame({"text": [b"abc"]}).write_parquet(tmp_path / "rows.parquet")
    error = nothing_is_added(shelf, name, tmp_path / "rows.parquet")
    assert error.fact.endswith("row 1: column `text` holds bytes, not text")


NO_TEXT = [
    ({"id": {"x": 1}, "text": "a"}, {}, "`--map sample_id=id.KEY`; its keys are `x`"),
    ({"id": {}, "text": "a"}, {}, "`--map sample_id=COLUMN`"),
    ({"text": {"parts": ["a"], "n": 1}}, {}, "`--map text=text.KEY`; its keys are `parts`, `n`"),
    ({"body": {"parts": ["a"]}}, {"text": "body"}, "`--map text=body.KEY`; its keys are `parts`"),
    ({"text": [{"content": "a"}]}, {}, "map another column with `--map text=COLUMN`"),
]


@pytest.mark.parametrize(("row", "columns", "hint"), NO_TEXT, ids=itertools.count())
def test_a_column_without_text_is_answered_with_a_mapping_that_can_help(row, columns, hint):
    with pytest.raises(InputError) as caught:
        make_sample(row, columns)
    assert hint in caught.value.hint


KNOWN = "known are .jsonl, .ndjson, .parquet, .csv, .tsv and datasets"
HUB = "check the path; hub names look like `org/name`, and others are tried with `--config` or `--split` only"
STAGES = "a stage is one of `finetune`, `pretrain`, `query`"
REFUSED = [
    *[(file, {}, "there is no file `{path}`", "check the path") for file in ("no.jsonl", "no.json", "no", "dir.csv")],
    *[(file, {}, "`{path}` has an unknown format", KNOWN) for file in ("a.json", "a.txt", "a.jsonl.gz", "a")],
    ("a.jsonl", {"split": "train"}, "`{path}` is a file", "leave out `--config`, `--split`"),
    ("a.jsonl", {"stage": "train"}, "`train` is no stage", STAGES),
    ("a.jsonl", {"columns": {"body": "text"}}, "`body` is no field of a sample", f"the fields are {', '.join(FIELDS)}"),
    ("a.jsonl", {"columns": {"text": "body"}}, "there is no column `body`", "the columns are `id`, `text`"),
    (f"{'x' * 300}.csv", {}, "there is no file `{path}`", "check the path"),
]


@pytest.mark.parametrize(("file", "options", "fact", "hint"), REFUSED, ids=itertools.count())
def test_a_wrong_path_suffix_or_option_is_named_and_adds_nothing(shelf, name, tmp_path, file, options, fact, hint):
    (tmp_path / "dir.csv").mkdir()
    for known in ("a.jsonl", "a.json", "a.txt", "a.jsonl.gz", "a"):
        (tmp_path / known).write_bytes(GOOD)
    error = nothing_is_added(shelf, name, tmp_path / file, **options)
    assert fact.format(path=tmp_path / file) in error.fact
    assert error.hint == hint


@pytest.mark.parametrize(("uri", "options"), [("no-org/no-such-dataset", {}), ("no-such-dataset", {"split": "train"})])
def test_an_unreachable_dataset_name_is_an_input_error(shelf, name, uri, options):
    assert f"`{uri}` can't be read as a dataset" in nothing_is_added(shelf, name, uri, **options).fact


@pytest.mark.parametrize("uri", ["none", "none.tst", "tests/none", "a/b/c", "x" * 300, f"org/{'x' * 300}", "a\0b"])
def test_a_wrong_relative_path_is_never_asked_of_the_hub(shelf, name, tmp_path, monkeypatch, uri):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").mkdir()
    monkeypatch.setattr(datasets, "load_dataset", pytest.fail)
    error = nothing_is_added(shelf, name, uri)
    assert (error.fact, error.hint) == (f"there is no file or folder `{uri}`", HUB)


def test_an_empty_path_is_an_input_error(shelf, name):
    assert nothing_is_added(shelf, name, "").fact == "the path is empty"


def test_a_folder_with_a_files_name_is_called_a_folder(shelf, name, tmp_path):
    (tmp_path / "x.jsonl").mkdir()
    assert nothing_is_added(shelf, name, tmp_path / "x.jsonl").fact.endswith("x.jsonl`: it is a folder")


@pytest.mark.parametrize(("bad", "hint"), [("Pub Med", "try `pub-med`"), ("", "for example `epoch-2`")])
def test_a_bad_name_is_answered_with_a_good_one(shelf, tmp_path, bad, hint):
    with pytest.raises(NameInvalidError) as caught:
        add_rows(shelf, bad, tmp_path, text_rows(1))
    assert caught.value.hint == hint


def test_a_name_never_changes_its_stage_or_domain(shelf, name, tmp_path):
    add_rows(shelf, name, tmp_path, text_rows(1), domain="songs")
    path = write_jsonl(tmp_path / "more.jsonl", text_rows(2))
    with pytest.raises(NameTakenError, match="already with stage `pretrain`, not `query`"):
        shelf.source_add(name, path, stage="query")
    with pytest.raises(NameTakenError, match="already with domain `songs`, not `medical`"):
        shelf.source_add(name, path, stage="pretrain", domain="medical")
    assert rows_of(shelf, name, "sample_id") == [("sea-0",)]


@given(texts=st.lists(anything, min_size=1, max_size=20), note=anything)
@settings(max_examples=25, deadline=None)
def test_any_texts_come_back_as_they_were_but_for_space_around_them(shelf, tmp_path_factory, texts, note):
    name = f"source-{next(NUMBERS)}"
    rows = [{"id": f"{i:02}", "text": text, "note": note} for i, text in enumerate(["anchor", *texts])]
    report = add_rows(shelf, name, tmp_path_factory.mktemp("any"), rows)
    kept = [(row["id"], row["text"].strip()) for row in rows if row["text"].strip()]
    assert (report.n_added, report.n_empty) == (len(kept), len(rows) - len(kept))
    assert rows_of(shelf, name, "sample_id, text") == kept
    assert {json.loads(meta)["note"] for (meta,) in rows_of(shelf, name, "meta")} == {note}


cells = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from([*FIELDS, "id", "other"]), cells))
@settings(deadline=None)
def test_any_row_is_a_whole_sample_or_none_or_an_input_error(row):
    with contextlib.suppress(InputError):
        sample = make_sample(row, {})
        assert sample is None or sample.text or (sample.prompt and sample.response)
        assert sample is None or sample.sample_id
