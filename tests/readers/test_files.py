"""Formats of files: each gives the same rows; folders, patterns, standard input, and their errors."""

from __future__ import annotations

import gzip
import io
import json
import sys

import datasets
import polars as pl
import pyarrow as pa
import pytest
from helpers.texts import write_jsonl

from lark_store.errors import InputError
from lark_store.modeling.forms.rows import RowReader
from lark_store.readers import json_list, read_rows
from lark_store.readers.inputs import ReadOptions, open_input

CALLS = [{"type": "function", "function": {"name": "f", "arguments": {"city": "Rome", "n": 2**53 + 1}}}]
CHATS = [
    {"id": "1", "messages": [{"role": "user", "content": "Is it?\n"}, {"role": "assistant", "content": " yes"}]},
    {
        "id": "2",
        "messages": [
            {"role": "system", "content": "α 🙂"},
            {"role": "assistant", "content": None, "tool_calls": CALLS},
            {"role": "tool", "content": "3", "name": "f"},
        ],
    },
]


def hashes(data, **options):
    """Return where rows come from, and the ids and hashes of their samples."""
    given, reader = open_input(data, ReadOptions(**options)), RowReader({})
    contents = [
        (sample.sample_id, sample.content_sha256)
        for place, rows in given.parts
        for _, _, _, samples in reader.read(rows, place)
        for sample in samples
    ]
    return given.uri, contents


EXPECTED = hashes(CHATS)[1]


def packed(path, content):
    """Write bytes, compressed by the path's ending."""
    if path.suffix == ".zst":
        with pa.CompressedOutputStream(str(path), "zstd") as file:
            file.write(content)
    else:
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet_bytes():
    buffer = io.BytesIO()
    pl.DataFrame(CHATS).write_parquet(buffer)
    return buffer.getvalue()


def csv_bytes(separator=","):
    rows = [{"id": row["id"], "messages": json.dumps(row["messages"])} for row in CHATS]
    return pl.DataFrame(rows).write_csv(separator=separator).encode()


FILES = {
    "a.jsonl": lambda: lines(CHATS),
    "a.jsonl.gz": lambda: lines(CHATS),
    "a.JSONL.GZ": lambda: lines(CHATS),
    "a.ndjson.zst": lambda: lines(CHATS),
    "a.json": lambda: json.dumps(CHATS, indent=2).encode(),
    "a.json.zst": lambda: json.dumps(CHATS).encode(),
    "data.json": lambda: json.dumps({"version": 2, "data": CHATS}).encode(),
    "lines.json": lambda: b"\xef\xbb\xbf" + lines(CHATS),
    "a.parquet": parquet_bytes,
    "a.parquet.gz": parquet_bytes,
    "a.csv": csv_bytes,
    "a.csv.gz": csv_bytes,
    "a.tsv.zst": lambda: csv_bytes("\t"),
}


@pytest.mark.parametrize("file", FILES)
def test_same_chats_of_any_format_have_the_same_hashes(tmp_path, file):
    path = tmp_path / file
    packed(path.with_suffix(path.suffix.lower()), FILES[file]())
    if not path.exists():
        path.with_suffix(path.suffix.lower()).rename(path)
    assert hashes(path) == (str(path), EXPECTED)


@pytest.mark.parametrize("file", ["a.arrow", "a.feather", "a.arrow.gz"])
@pytest.mark.parametrize("kind", ["file", "stream"])
def test_arrow_files_and_streams_are_read(tmp_path, file, kind):
    buffer = io.BytesIO()
    (pl.DataFrame(CHATS).write_ipc if kind == "file" else pl.DataFrame(CHATS).write_ipc_stream)(buffer)
    packed(tmp_path / file, buffer.getvalue())
    assert hashes(tmp_path / file)[1] == EXPECTED


def test_a_long_json_list_is_read_piece_by_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(json_list, "_PIECE", 7)
    rows = [{"id": str(i), "n": -i * 10**i, "text": '"[{,é' * i, "more": [{"a": None}, 1.5e3, True]} for i in range(40)]
    (tmp_path / "a.json").write_text(f" \n{json.dumps(rows, ensure_ascii=False, indent=1)}\n ", encoding="utf-8")
    assert list(read_rows(str(tmp_path / "a.json"))) == rows


ONE = "not a list of rows"
BAD_JSON = [
    ('{"text": "a"}', f"holds one object with `text`, {ONE}"),
    ('{"text": ["a", "b"]}', f"holds one object with `text`, {ONE}"),
    ('{"a": [{"text": "a"}], "b": [{"text": "a"}]}', f"holds one object with `a`, `b`, {ONE}"),
    ("{}", f"holds one object with no keys, {ONE}"),
    ('["a", "b"]', "row 1: it is a text, not an object"),
    ('[{"text": "a"}, 3]', "row 2: it is int, not an object"),
    ('[{"text": "a"}\n{"text": "b"}]', "line 2, is not JSON: a comma or `]` is missing"),
    ('[{"text": "a"},\n{"text": b}]', "line 2, is not JSON: Expecting value"),
    ('[{"text": "a"},\n{"text": "b', "line 2, is not JSON: Unterminated string"),
    ('[{"text": "a"}', "line 1, is not JSON"),
    ('[{"text": "a"}] 3', "line 1, is not JSON: text follows the list"),
    ('[{"text": "a", "text": "b"}]', "from line 1, repeats the key `text`"),
    ('[{"text": "\\ud800"}]', "an unpaired surrogate"),
    ("[" * 100_000, "nested too deeply"),
    ('"text"', 'it begins with `"`'),
    ("", "is empty"),
    ("text", "it begins with `t`"),
]


@pytest.mark.parametrize(("content", "fact"), BAD_JSON, ids=range(len(BAD_JSON)))
def test_json_that_is_no_list_of_rows_is_an_error(tmp_path, content, fact):
    (tmp_path / "a.json").write_text(content, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        list(read_rows(str(tmp_path / "a.json")))
    assert fact in caught.value.fact
    assert "a.json`" in caught.value.fact
    assert caught.value.hint


BAD_FILES = [
    ("a.jsonl", gzip.compress(b"{}"), "is compressed with gzip, despite its name", "rename it to `a.jsonl.gz`"),
    ("a.jsonl.zst", gzip.compress(b"{}"), "is compressed with gzip, despite its name", "a.jsonl.zst.gz"),
    ("a.jsonl", b"PK\x03\x04", "is a zip archive, despite its name", "unpack it first"),
    ("a.jsonl.gz", gzip.compress(lines(CHATS))[:-20], "can't be read", "complete"),
    ("a.jsonl.zst", b"\x28\xb5\x2f\xfd\x00", "can't be read", "complete"),
    ("a.arrow", b"no Arrow", "can't be read", "complete"),
    ("a.jsonl.gz", gzip.compress(b'{"text": "\xff"}'), "is not UTF-8: line 1, byte 11", "UTF-8"),
]


@pytest.mark.parametrize(("file", "content", "fact", "hint"), BAD_FILES, ids=range(len(BAD_FILES)))
def test_damaged_or_misnamed_file_is_an_error(tmp_path, file, content, fact, hint):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(InputError) as caught:
        list(read_rows(str(tmp_path / file)))
    assert fact in caught.value.fact
    assert hint in caught.value.hint


def test_format_names_what_a_file_without_an_ending_holds(tmp_path):
    (tmp_path / "rows.txt").write_bytes(csv_bytes("\t"))
    assert hashes(tmp_path / "rows.txt", form="tsv")[1] == EXPECTED


# --- folders -------------------------------------------------------------------------------------------------------


def test_files_of_a_folder_are_read_in_order(tmp_path):
    write_jsonl(tmp_path / "part-2.jsonl", CHATS[1:])
    (tmp_path / "part-1.json").write_text(json.dumps(CHATS[:1]), encoding="utf-8")
    (tmp_path / "README.md").write_text("about", encoding="utf-8")
    assert hashes(tmp_path) == (str(tmp_path), EXPECTED)
    assert len(list(read_rows(str(tmp_path)))) == 2
    write_jsonl(tmp_path / "part-3.jsonl", [{"id": "3", "body": "a"}])
    with pytest.raises(InputError, match=r"part-3.jsonl`, row 1: a row needs"):
        hashes(tmp_path)


@pytest.fixture
def splits(tmp_path, monkeypatch):
    """A folder with files of two splits."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "splits"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", [{"id": str(i), "text": f"a{i}"} for i in range(4)])
    write_jsonl(folder / "test.jsonl", [{"id": "9", "text": "b"}])
    return folder


def test_splits_of_a_folder_are_not_mixed(splits):
    with pytest.raises(InputError, match="has the splits `train`, `test`"):
        hashes(splits)
    ids = {split: [name for name, _ in hashes(splits, split=split)[1]] for split in ("train", "train[:2]", "test")}
    assert ids == {"train": ["0", "1", "2", "3"], "train[:2]": ["0", "1"], "test": ["9"]}


def test_parts_of_a_saved_split_are_read(tmp_path):
    data = datasets.Dataset.from_list([{"id": str(i), "text": f"a{i}"} for i in range(4)])
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(tmp_path / "both")
    datasets.DatasetDict({"train": data}).save_to_disk(tmp_path / "one")

    def ids(folder, split):
        return "".join(name for name, _ in hashes(tmp_path / folder, split=split)[1])

    cases = {"train[:2]": "01", "train[50%:]": "23", "train[-1:]": "3", "test": "0123"}
    assert {split: ids("both", split) for split in cases} == cases
    assert ids("one", None) == "0123"
    with pytest.raises(InputError, match=r"has no split `nosuch\[:2\]`"):
        ids("both", "nosuch[:2]")


# --- patterns, several paths, standard input -----------------------------------------------------------------------


def test_patterns_and_several_paths_are_read_in_order(tmp_path):
    (tmp_path / "inner").mkdir()
    first, second = (
        write_jsonl(tmp_path / name, [row]) for name, row in zip(("inner/a.jsonl", "b.jsonl"), CHATS, strict=True)
    )
    assert hashes([first, second]) == (f"{first}, {second}", EXPECTED)
    assert hashes(str(tmp_path / "*" / "*.jsonl"))[1] == EXPECTED[:1]
    assert hashes(str(tmp_path / "**" / "?.jsonl"))[1] == EXPECTED[::-1]
    assert hashes([first] * 9)[0] == f"{first}, {first}, {first}, {first}, … (9 files)"
    with pytest.raises(InputError) as caught:
        hashes(str(tmp_path / "*.csv"))
    assert caught.value.fact == f"no file matches `{tmp_path / '*.csv'}`"


def test_file_whose_name_looks_like_a_pattern_is_read(tmp_path):
    assert hashes(write_jsonl(tmp_path / "a[1].jsonl", CHATS))[1] == EXPECTED


def test_row_of_the_second_file_is_named_by_its_file(tmp_path):
    files = [
        write_jsonl(tmp_path / f"{n}.jsonl", [row]) for n, row in enumerate([{"id": 1, "text": "a"}, {"text": "b"}])
    ]
    with pytest.raises(InputError) as caught:
        hashes(files)
    assert caught.value.fact == f"`{files[1]}`, row 1: it has no id, but row 1 of `{files[0]}` has one in `id`"


@pytest.mark.parametrize(
    ("form", "content"), [(None, lines(CHATS)), ("parquet", parquet_bytes()), ("csv", csv_bytes())]
)
def test_standard_input_is_read_in_any_format(monkeypatch, form, content):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert hashes("-", form=form) == ("stdin", EXPECTED)


def test_errors_of_standard_input_name_it(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"text": "a"}\nb')))
    with pytest.raises(InputError, match=r"^`stdin`, line 2, is not JSON"):
        hashes("-")
    with pytest.raises(InputError, match=r"standard input \(`-`\) is given twice"):
        hashes(["-", "-"])
    with pytest.raises(InputError, match="standard input has no configurations"):
        hashes("-", split="train")
