"""Adding sources: formats, fields, counts; an error adds nothing."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json

import datasets
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.program import lark
from helpers.texts import qa_rows, text_rows, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from lark_store import Store
from lark_store.errors import InputError, NameInvalidError, NameTakenError
from lark_store.modeling.forms import fields_of_forms
from lark_store.modeling.forms.rows import make_sample, make_samples
from lark_store.modeling.sample import Sample
from lark_store.schema.catalog import Source
from lark_store.schema.database import find
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
    with Store.create(tmp_path_factory.mktemp("shelf") / "lark.store") as store:
        yield store


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


def test_folder_with_splits_needs_a_split(shelf, name, splits):
    with pytest.raises(InputError, match="has the splits `train`, `test`") as caught:
        shelf.source_add(name, splits, stage="query")
    assert caught.value.hint == "choose one with `split`"
    assert shelf.source_add(name, splits, stage="query", split="test").n_added == 2
    assert rows_of(shelf, name, "sample_id") == [("q50",), ("q51",)]


def test_unknown_split_error_lists_the_known_ones(shelf, name, splits):
    with pytest.raises(InputError, match="`train`"):
        shelf.source_add(name, splits, stage="query", split="nosuch")
    with pytest.raises(InputError, match="is a saved dataset, without configurations"):
        shelf.source_add(name, splits, stage="query", split="test", config="large")


def test_split_of_an_unsplit_folder_is_refused(shelf, name, tmp_path):
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
    ({"text": "  spaces around \n"}, (None, None, "  spaces around \n")),
    ({"text": ["  two", "lines \n"]}, (None, None, "  two\nlines \n")),
    ({"prompt": "def f(x):\n", "response": "    return x\n"}, ("def f(x):\n", "    return x\n", None)),
    (
        {"question": "Is it?\n", "context": " C\n", "answer": " yes"},
        ("Context:  C\n\n\nQuestion: Is it?\n", " yes", None),
    ),
    ({"question": "Is it?", "context": " \n", "answer": "yes"}, ("Question: Is it?", "yes", None)),
    ({"prompt": " \n", "response": "yes", "text": "\tA song."}, (None, None, "\tA song.")),
    ({"prompt": "without a response", "text": "A song."}, (None, None, "A song.")),
]


def test_each_form_of_row_becomes_its_sample(shelf, name, tmp_path):
    add_rows(shelf, name, tmp_path, [{"id": f"{i:02}", **row} for i, (row, _) in enumerate(FORMS)])
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


def test_mapping_is_remembered(shelf, name, tmp_path):
    add_rows(shelf, name, tmp_path, [{"id": "1", "body": "a"}], columns={"text": "body"})
    report = add_rows(shelf, name, tmp_path, [{"id": "1", "body": "a"}, {"id": "2", "body": "b"}])
    assert (report.n_added, report.n_existing) == (1, 1)


def test_ids_come_from_sample_id_else_id_else_the_content(shelf, name, tmp_path):
    add_rows(shelf, name, tmp_path, [{"sample_id": "s", "id": "i", "text": "a"}])
    add_rows(shelf, name, tmp_path, [{"id": 0, "text": "b"}])
    add_rows(shelf, name, tmp_path, [{"id": None, "text": "c"}, {"sample_id": " ", "text": "d"}, {"text": " d"}])
    ids = {text: sample_id for sample_id, text in rows_of(shelf, name, "sample_id, text")}
    results = {text: Sample("", text=text).content_sha256[:16] for text in ("c", "d", " d")}
    assert ids == {"a": "s", "b": "0"} | results


EXACT_IDS = ["a", " a ", "a\n", "A", "1", "1.0", "01", "nan", "None", "it's", "\N{LINE SEPARATOR}a", str(2**70), "a/b"]


def test_ids_are_kept_unchanged(shelf, name, tmp_path):
    rows = [{"id": item, "text": f"text {i}"} for i, item in enumerate(EXACT_IDS)]
    report = add_rows(shelf, name, tmp_path, [*rows, {"id": 2**71, "text": "an integer"}])
    assert (report.n_added, report.n_duplicate, report.n_changed) == (len(EXACT_IDS) + 1, 0, 0)
    ids = dict(rows_of(shelf, name, "text, sample_id"))
    assert ids == {f"text {i}": item for i, item in enumerate(EXACT_IDS)} | {"an integer": str(2**71)}
    assert add_rows(shelf, name, tmp_path, rows).n_existing == len(EXACT_IDS)


def save_numbers(path, kind):
    """Write whole numbers with a gap as ids, in the row without a text, in one format."""
    ids, texts = [7, None, 2**53 + 1], ["a", "", "c"]
    table = pa.table({"id": pa.array(ids, pa.int64()), "text": texts})
    if kind == "jsonl":
        return write_jsonl(path.with_suffix(".jsonl"), table.to_pylist())
    if kind == "parquet":
        pq.write_table(table, path.with_suffix(".parquet"))
        return path.with_suffix(".parquet")
    if kind == "csv":
        pl.from_arrow(table).write_csv(path.with_suffix(".csv"))
        return path.with_suffix(".csv")
    data = datasets.Dataset(table)
    (data if kind == "datasets" else data.with_format(kind)).save_to_disk(path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv", "datasets", "numpy", "pandas"])
def test_integers_with_nulls_stay_integers(shelf, name, tmp_path, kind):
    report = shelf.source_add(name, save_numbers(tmp_path / "rows", kind), stage="pretrain")
    assert (report.n_added, report.n_empty) == (2, 1)
    assert rows_of(shelf, name, "sample_id, text") == [("7", "a"), (str(2**53 + 1), "c")]


def test_integers_saved_as_floats_are_refused_with_a_hint(shelf, name, tmp_path):
    import pandas as pd

    pd.DataFrame({"id": [1, None], "text": ["a", "b"]}).to_parquet(tmp_path / "rows.parquet")
    error = nothing_is_added(shelf, name, tmp_path / "rows.parquet")
    assert error.fact.endswith("rows.parquet`, row 1: column `id` holds float `1.0`, not an id")
    assert "unless their type is `Int64`" in error.hint


NO_IDS = [
    (True, "bool `True`"),
    (1.0, "float `1.0`"),
    (float("inf"), "float `inf`"),
    ([1], "list `[1]`"),
    (["a"], "list `['a']`"),
    ({}, "dict"),
    (b"a", "bytes"),
]


@pytest.mark.parametrize(("value", "fact"), NO_IDS)
@pytest.mark.parametrize("columns", [{}, {"sample_id": "id"}])
def test_invalid_id_is_refused(value, fact, columns):
    with pytest.raises(InputError, match="column `id`") as caught:
        make_sample({"id": value, "text": "a"}, columns)
    assert fact in caught.value.fact


MISSING = [None, "", " \n", float("nan")]
MISSING_IDS = [
    ([{"id": "1", "text": "a"}, {"id": missing, "text": "b"}], {}, "row 2: it has no id, but row 1 has one in `id`")
    for missing in MISSING
]
MISSING_IDS += [
    ([{"pubid": missing, "text": "a"}], {"sample_id": "pubid"}, "row 1: column `pubid` has no id in this row")
    for missing in MISSING
]
MISSING_IDS += [
    ([{"id": 1, "text": "a"}, {"id": 2, "text": ""}, {"text": "b"}], {}, "row 3: it has no id, but row 1 has one"),
    ([{"text": ""}, {"text": "a"}, {"id": "1", "text": "b"}], {}, "row 3: it has an id in `id`, but row 2 has none"),
    (
        [{"sample_id": "1", "text": "a"}, {"id": "1", "text": "b"}],
        {},
        "row 2: its id is in `id`, but the id of row 1 is in",
    ),
    ([{"text": "a"}], {"sample_id": "pubid"}, "row 1: there is no column `pubid`"),
]


@pytest.mark.parametrize(("rows", "columns", "fact"), MISSING_IDS)
def test_row_with_a_missing_id_is_refused(shelf, name, tmp_path, rows, columns, fact):
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    error = nothing_is_added(shelf, name, path, columns=columns)
    assert fact in error.fact
    assert error.hint


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ('{"id": "1", "text": "a", "id": "2"}', "id"),
        ('{"id": "1", "text": "a", "text": "b"}', "text"),
        ('{"id": "1", "text": "a", "more": [{"year": 1, "x": {}, "year": 1}]}', "year"),
    ],
)
def test_duplicate_key_is_refused(shelf, name, tmp_path, line, key):
    (tmp_path / "rows.jsonl").write_text('{"id": "0", "text": "good"}\n\n' + line)
    error = nothing_is_added(shelf, name, tmp_path / "rows.jsonl")
    assert error.fact == f"`{tmp_path / 'rows.jsonl'}`, line 3, repeats the key `{key}`"


def test_keys_are_case_sensitive(shelf, name, tmp_path):
    row = {"id": "1", "ID": "2", "text": "a", "Text": "b", "Label": "no", "label": " yes", "Year": 1, "year": 2}
    for suffix in ("jsonl", "parquet"):
        path = tmp_path / f"rows.{suffix}"
        pq.write_table(pa.Table.from_pylist([row]), path) if suffix == "parquet" else write_jsonl(path, [row])
        shelf.source_add(f"{name}-{suffix}", path, stage="pretrain")
        [(sample_id, text, label, meta)] = rows_of(shelf, f"{name}-{suffix}", "sample_id, text, label, meta")
        assert (sample_id, text, label) == ("1", "a", " yes")
        assert json.loads(meta) == {"ID": "2", "Text": "b", "Label": "no", "Year": 1, "year": 2}


def test_other_columns_are_kept_as_json_metadata(shelf, name, tmp_path):
    rows = [{"id": "1", "text": "a", "label": 3, "year": 2020, "tags": ["x", {"y": None}], "ünï": "🙂"}]
    add_rows(shelf, name, tmp_path, rows)
    [(label, meta)] = rows_of(shelf, name, "label, meta")
    assert label == "3"
    assert json.loads(meta) == {"year": 2020, "tags": ["x", {"y": None}], "ünï": "🙂"}
    assert meta == '{"tags": ["x", {"y": null}], "year": 2020, "ünï": "🙂"}'  # the same from any order of columns
    assert rows_of(shelf, name, "meta->>'$.year'") == [("2020",)]


def test_unused_id_column_is_kept_as_metadata(shelf, name, tmp_path):
    add_rows(shelf, name, tmp_path, [{"id": "1", "pubid": "9", "text": "a"}], columns={"sample_id": "pubid"})
    assert rows_of(shelf, name, "meta") == [('{"id": "1"}',)]


def test_metadata_with_nan_is_valid_json(shelf, name, tmp_path):
    figures = {"figure": [float("nan")], "more": [[1.5, float("inf")]]}
    pl.DataFrame({"text": ["a"], **figures}).write_parquet(tmp_path / "rows.parquet")
    shelf.source_add(name, tmp_path / "rows.parquet", stage="pretrain")
    [(meta,)] = rows_of(shelf, name, "meta")
    assert json.loads(meta, parse_constant=pytest.fail) == {"figure": None, "more": [1.5, None]}


INDENTED = [
    "if x:\n    y()\n",
    "if x:\n  y()\n",
    "if x:\n    y()",
    "\n\tif x:",
    "\r\na\r\n",
    " \N{NO-BREAK SPACE}a\N{LINE SEPARATOR}",
]


@pytest.mark.parametrize("file", ["rows.jsonl", "rows.csv", "rows.tsv", "rows.parquet", "folder"])
def test_white_space_distinguishes_samples_in_every_format(shelf, name, tmp_path, file):
    frame = pl.DataFrame({"text": INDENTED})
    writers = {
        "rows.jsonl": lambda path: write_jsonl(path, frame.to_dicts()),
        "rows.csv": frame.write_csv,
        "rows.tsv": lambda path: frame.write_csv(path, separator="\t"),
        "rows.parquet": frame.write_parquet,
        "folder": datasets.Dataset.from_list(frame.to_dicts()).save_to_disk,
    }
    writers[file](tmp_path / file)
    report = shelf.source_add(name, tmp_path / file, stage="pretrain")
    assert (report.n_added, report.n_duplicate, report.n_stripped) == (len(INDENTED), 0, 0)
    assert {text for (text,) in rows_of(shelf, name, "text")} == set(INDENTED)
    again = shelf.source_add(name, tmp_path / file, stage="pretrain")
    assert (again.n_added, again.n_existing, again.n_stripped) == (0, len(INDENTED), 0)


def test_cells_of_a_csv_keep_their_spaces_and_line_ends(shelf, name, tmp_path):
    content = '\ufeffid,text, note\r\n a, b ,n\r\n"a","  c\r\nd\n"\r\na ," e\u2028f\r",\r\n'
    (tmp_path / "rows.csv").write_bytes(content.encode())
    shelf.source_add(name, tmp_path / "rows.csv", stage="pretrain")
    assert dict(rows_of(shelf, name, "sample_id, text")) == {" a": " b ", "a": "  c\r\nd\n", "a ": " e\u2028f\r"}


def test_duplicates_empty_and_changed_rows_are_counted_and_named(shelf, name, tmp_path):
    same, other = {"id": "a", "text": "A"}, {"id": "a", "text": "changed"}
    rows = [same, {"id": "b", "text": " "}, same, other, {"id": "c", "text": "C"}, {"id": "d", "text": None}]
    report = add_rows(shelf, name, tmp_path, rows)
    assert (report.n_read, report.n_added, report.n_existing) == (6, 2, 0)
    assert (report.n_duplicate, report.n_empty, report.n_changed) == (1, 2, 1)
    assert report.examples == {"duplicate": ["a"], "empty": ["row 2", "row 6"], "changed": ["a"]}
    assert rows_of(shelf, name, "sample_id, text") == [("a", "A"), ("c", "C")]


def test_at_most_three_examples_are_listed(shelf, name, tmp_path):
    report = add_rows(shelf, name, tmp_path, [{"text": "a"}] * 6)
    assert (report.n_duplicate, len(report.examples["duplicate"])) == (5, 3)


def test_adding_again_adds_only_new_rows(shelf, name, tmp_path):
    add_rows(shelf, name, tmp_path, text_rows(3))
    changed = [{"id": "sea-0", "text": "another text"}, *text_rows(5)[1:]]
    report = add_rows(shelf, name, tmp_path, changed)
    assert (report.n_added, report.n_existing, report.n_changed) == (2, 2, 1)
    assert report.examples["changed"] == ["sea-0"]
    assert rows_of(shelf, name, "text") == [(row["text"],) for row in text_rows(5)]
    assert add_rows(shelf, name, tmp_path, text_rows(5)).n_existing == 5


# --- a source of an older version, which left out the white space around texts and ids ------------------------------


GIVEN = [
    {"id": "1", "text": "  one\n"},
    {"id": " 2 ", "text": "two"},
    {"id": "3\n", "text": "three\n"},
    {"id": "4", "question": "Is it?\n", "context": " Seen.\n", "answer": " yes"},
    {"id": "5", "text": "five"},
]
WITHOUT_IDS = [{"text": "  one\n"}, {"text": "two"}, {"text": ["three", "lines\n"]}]


def add_as_before(store, name, folder, rows):
    """Add rows as a lark-store before schema 0008 did."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lark_store.modeling.forms.rows.make_samples", functools.partial(make_samples, strip=True))
        report = add_rows(store, name, folder, rows)
    assert report.n_added == len(rows)
    with store._db.session() as session:
        find(session, Source, name).is_stripped = 1  # as `db upgrade` says of older sources


def test_white_space_distinguishes_ids_and_texts(shelf, name, tmp_path):
    add_rows(shelf, name, tmp_path, [{"id": "a", "text": "x"}])
    added = add_rows(shelf, name, tmp_path, [{"id": " a ", "text": "x"}])
    assert (added.n_added, added.n_existing, added.n_stripped) == (1, 0, 0)
    changed = add_rows(shelf, name, tmp_path, [{"id": "a", "text": " x"}])
    assert (changed.n_changed, changed.n_stripped) == (1, 0)
    assert rows_of(shelf, name, "sample_id, text") == [(" a ", "x"), ("a", "x")]


def test_source_of_an_older_version_is_not_duplicated(shelf, name, tmp_path):
    add_as_before(shelf, name, tmp_path, GIVEN)
    before = rows_of(shelf, name, "sample_id, prompt, text")
    assert before[0] == ("1", None, "one")
    assert before[3] == ("4", "Context: Seen.\n\nQuestion: Is it?", None)
    report = add_rows(shelf, name, tmp_path, GIVEN)
    assert (report.n_added, report.n_existing, report.n_stripped, report.n_changed) == (0, 5, 4, 0)
    assert report.examples["stripped"] == ["1", "2", "3"]
    assert rows_of(shelf, name, "sample_id, prompt, text") == before


def test_replace_stores_the_original_text_under_its_id(shelf, name, tmp_path):
    add_as_before(shelf, name, tmp_path, GIVEN)
    report = add_rows(shelf, name, tmp_path, GIVEN, replace=True)
    assert (report.n_added, report.n_replaced, report.n_existing, report.n_stripped) == (0, 3, 2, 1)
    assert report.examples["stripped"] == ["2"]  # its id: the text is as given
    prompt = "Context:  Seen.\n\n\nQuestion: Is it?\n"
    stored = [
        ("1", None, "  one\n"),
        ("2", None, "two"),
        ("3", None, "three\n"),
        ("4", prompt, None),
        ("5", None, "five"),
    ]
    assert rows_of(shelf, name, "sample_id, prompt, text") == stored
    for options in ({}, {"replace": True}):
        again = add_rows(shelf, name, tmp_path, GIVEN, **options)
        assert (again.n_added, again.n_replaced, again.n_existing, again.n_stripped) == (0, 0, 5, 2)
    assert rows_of(shelf, name, "sample_id, prompt, text") == stored


def test_content_ids_of_an_older_version_are_kept(shelf, name, tmp_path):
    add_as_before(shelf, name, tmp_path, WITHOUT_IDS)
    ids = {Sample("", text=text).content_sha256[:16] for text in ("one", "two", "three\nlines")}
    report = add_rows(shelf, name, tmp_path, WITHOUT_IDS * 2)
    assert (report.n_added, report.n_existing, report.n_stripped, report.n_changed) == (0, 4, 2, 0)
    assert report.n_duplicate == 2  # the second time, under ids unknown to the store
    replaced = add_rows(shelf, name, tmp_path, WITHOUT_IDS, replace=True)
    assert (replaced.n_added, replaced.n_replaced, replaced.n_existing, replaced.n_stripped) == (0, 2, 1, 0)
    assert {sample_id for sample_id, _ in rows_of(shelf, name, "sample_id, text")} == ids
    assert {text for (text,) in rows_of(shelf, name, "text")} == {"  one\n", "two", "three\nlines\n"}
    again = add_rows(shelf, name, tmp_path, WITHOUT_IDS)
    assert (again.n_added, again.n_existing, again.n_stripped) == (0, 3, 0)


def test_exact_row_is_not_matched_by_its_older_form(shelf, name, tmp_path):
    add_rows(shelf, name, tmp_path, [{"id": "a", "text": "x"}])
    report = add_rows(shelf, name, tmp_path, [{"id": "a", "text": "x"}, {"id": " a ", "text": "x"}])
    assert (report.n_added, report.n_existing, report.n_stripped) == (1, 1, 0)
    changed = add_rows(shelf, name, tmp_path, [{"id": "a", "text": "x y"}])
    assert (changed.n_changed, changed.n_stripped) == (1, 0)


def test_first_row_of_an_id_replaces(shelf, name, tmp_path):
    add_rows(shelf, name, tmp_path, [{"id": item, "text": f"{item} old"} for item in "abc"])
    rows = [
        ("a", "1"),
        ("b", "old"),
        ("c", "1"),
        ("d", "1"),
        ("a", "2"),
        ("b", "1"),
        ("c", "old"),
        ("d", "2"),
        ("a", "1"),
    ]
    rows = [{"id": item, "text": f"{item} {text}"} for item, text in rows]
    report = add_rows(shelf, name, tmp_path, rows, replace=True)
    assert (report.n_added, report.n_replaced, report.n_existing, report.n_changed) == (1, 2, 2, 4)
    assert [text for (text,) in rows_of(shelf, name, "text")] == ["a 1", "b old", "c 1", "d 1"]


def test_program_reports_text_stripped_by_an_older_version(shelf, name, tmp_path):
    add_as_before(shelf, name, tmp_path, GIVEN)
    line = f"source add {name} {write_jsonl(tmp_path / 'rows.jsonl', GIVEN)} --stage pretrain"
    result = lark(line, store=shelf.path)
    assert (result.code, result.err.splitlines()) == (
        0,
        [
            f"source `{name}`: 0 samples added, 5 already stored",
            "  read 4 texts; 1 prompt with a response",
            "  4 stored by an older lark-store without the white space around their text or id: 1, 2, 3, …",
            "",
            "hint: store the original texts under the same ids with `--replace`",
        ],
    )
    replaced = lark(f"{line} --replace", store=shelf.path)
    assert replaced.code == 0
    assert "0 samples added, 2 already stored, 3 replaced\n" in replaced.err
    assert "\n  1 stored by an older lark-store without" in replaced.err
    assert "hint" not in replaced.err


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
    ("a.jsonl", GOOD + b'{"text": {"parts": ["a"]}}\n', ["column `text` holds a dict"]),
    ("a.jsonl", GOOD + b'{"body": "b"}\n', ["`prompt` and `response`", "this one has `body`"]),
    ("a.jsonl", GOOD + b'{"text": "\xff"}\n', ["a.jsonl` is not UTF-8"]),
    ("a.jsonl", GOOD.decode().encode("utf-16"), ["a.jsonl` is not UTF-8: line 1, byte 1 of the file"]),
    ("a.jsonl", b"\xef\xbb\xbf\xff", ["line 1, byte 4 of the file"]),
    ("a.csv", b"id,text\n1,\xff\n", ["a.csv` is not UTF-8: line 2, byte 11 of the file"]),
    ("a.csv", b"id;text\n1;a\n", ["this one has `id;text`"]),
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
    ("a.jsonl", GOOD + b'{"text": ["a", 1, null]}', ["row 2: column `text` holds a list of NoneType and int and str"]),
]


@pytest.mark.parametrize(("file", "content", "facts"), BROKEN, ids=itertools.count())
def test_an_error_in_a_file_adds_nothing_and_names_the_place(shelf, name, tmp_path, file, content, facts):
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


def test_error_while_adding_again_leaves_the_source_unchanged(shelf, name, tmp_path):
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
    ({"id": {"x": 1}, "text": "a"}, {}, "`--column sample_id=id.KEY`; the keys are `x`"),
    ({"id": {}, "text": "a"}, {}, "`--column sample_id=COLUMN`"),
    ({"text": {"parts": ["a"], "n": 1}}, {}, "`--column text=text.KEY`; the keys are `parts`, `n`"),
    ({"body": {"parts": ["a"]}}, {"text": "body"}, "`--column text=body.KEY`; the keys are `parts`"),
    ({"text": [{"content": "a"}]}, {}, "map another column with `--column text=COLUMN`"),
]


@pytest.mark.parametrize(("row", "columns", "hint"), NO_TEXT, ids=itertools.count())
def test_a_column_without_text_hints_a_mapping(row, columns, hint):
    with pytest.raises(InputError) as caught:
        make_sample(row, columns)
    assert hint in caught.value.hint


KNOWN = (
    "use .jsonl, .ndjson, .json, .parquet, .arrow, .feather, .csv, .tsv or a dataset, "
    "or name the format with `input_format`"
)
HUB = "check the path; hub names look like `org/name`, or need `config` or `split`"
ONE_OBJECT = 'write a list of objects, [{…}], or an object with one such list, {"data": [{…}]}'
COMPLETE = "check that the file is complete and matches its extension"
STAGES = "the stages are `finetune`, `pretrain`, `query`"
REFUSED = [
    *[(file, {}, "there is no file `{path}`", "check the path") for file in ("no.jsonl", "no.json", "no")],
    ("dir.csv", {}, "`{path}` is a folder, not a file", "check the path"),
    *[(file, {}, "`{path}` has an unknown file format", KNOWN) for file in ("a.txt", "a")],
    ("a.json", {}, "`{path}` holds one object with `id`, `text`, not a list of rows", ONE_OBJECT),
    ("a.jsonl.gz", {}, "`{path}` can't be read: Not a gzipped file", COMPLETE),
    ("a.txt", {"input_format": "txt"}, "unknown format `txt`", "the formats are jsonl, ndjson, json, parquet, arrow"),
    ("a.jsonl", {"split": "train"}, "`{path}` is a file", "omit `config` and `split`"),
    ("a.jsonl", {"stage": "train"}, "unknown stage `train`", STAGES),
    (
        "a.jsonl",
        {"columns": {"body": "text"}},
        "unknown sample field `body`",
        f"the fields are {', '.join(fields_of_forms())}",
    ),
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
    assert error.hint.startswith(hint)


@pytest.mark.parametrize(("uri", "options"), [("no-org/no-such-dataset", {}), ("no-such-dataset", {"split": "train"})])
def test_unreachable_dataset_is_an_input_error(shelf, name, uri, options):
    assert f"`{uri}` can't be read as a dataset" in nothing_is_added(shelf, name, uri, **options).fact


@pytest.mark.parametrize("uri", ["none", "none.tst", "tests/none", "a/b/c", "x" * 300, f"org/{'x' * 300}", "a\0b"])
def test_wrong_relative_path_is_not_looked_up_on_the_hub(shelf, name, tmp_path, monkeypatch, uri):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").mkdir()
    monkeypatch.setattr(datasets, "load_dataset", pytest.fail)
    error = nothing_is_added(shelf, name, uri)
    assert (error.fact, error.hint) == (f"there is no file or folder `{uri}`", HUB)


def test_an_empty_path_is_an_input_error(shelf, name):
    assert nothing_is_added(shelf, name, "").fact == "the path is empty"


def test_folder_named_like_a_file_is_reported_as_folder(shelf, name, tmp_path):
    (tmp_path / "x.jsonl").mkdir()
    assert nothing_is_added(shelf, name, tmp_path / "x.jsonl").fact.endswith("x.jsonl` is a folder, not a file")


@pytest.mark.parametrize(("bad", "hint"), [("Pub Med", "try `pub-med`"), ("", "for example `epoch-2`")])
def test_invalid_name_hints_a_valid_one(shelf, tmp_path, bad, hint):
    with pytest.raises(NameInvalidError) as caught:
        add_rows(shelf, bad, tmp_path, text_rows(1))
    assert caught.value.hint == hint


def test_a_name_never_changes_its_stage_or_domain(shelf, name, tmp_path):
    add_rows(shelf, name, tmp_path, text_rows(1), domain="songs")
    path = write_jsonl(tmp_path / "more.jsonl", text_rows(2))
    with pytest.raises(NameTakenError, match="already exists with stage `pretrain`, not `query`"):
        shelf.source_add(name, path, stage="query")
    with pytest.raises(NameTakenError, match="already exists with domain `songs`, not `medical`"):
        shelf.source_add(name, path, stage="pretrain", domain="medical")
    assert rows_of(shelf, name, "sample_id") == [("sea-0",)]


@given(texts=st.lists(anything, min_size=1, max_size=20), note=anything)
@settings(max_examples=25, deadline=None)
def test_any_text_round_trips(shelf, tmp_path_factory, texts, note):
    name = f"source-{next(NUMBERS)}"
    rows = [{"id": f"{i:02}", "text": text, "note": note} for i, text in enumerate(["anchor", *texts])]
    report = add_rows(shelf, name, tmp_path_factory.mktemp("any"), rows)
    kept = [(row["id"], row["text"]) for row in rows if row["text"].strip()]
    assert (report.n_added, report.n_empty) == (len(kept), len(rows) - len(kept))
    assert rows_of(shelf, name, "sample_id, text") == kept
    assert {json.loads(meta)["note"] for (meta,) in rows_of(shelf, name, "meta")} == {note}


cells = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from([*fields_of_forms(), "id", "other"]), cells))
@settings(deadline=None)
def test_any_row_is_a_complete_sample_or_an_input_error(row):
    with contextlib.suppress(InputError):
        for sample in make_samples(row, {})[1]:
            assert sample.text or sample.messages or (sample.prompt and (sample.response or sample.completion))
            assert sample.sample_id
