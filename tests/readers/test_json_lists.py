"""Lists of rows in a .json file, and rows of Python objects: where an error is, and what is read at a time."""

from __future__ import annotations

import json

import pytest

from lark_store.errors import InputError
from lark_store.readers import json_list
from lark_store.readers.json_list import read_json
from lark_store.readers.json_text import parse


def rows_of(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    return list(read_json(path))


@pytest.mark.parametrize("piece", [1, 2, 3, 16, 1 << 20])
@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ('[\n{"a": 1}\n{"a": 2}]', "line 3, is not JSON: a comma or `]` is missing"),
        ('[{"a": 1}]\n\n3', "line 3, is not JSON: text follows the list"),
        ('[\n\n{"a": 1},\n {"a": x}]', "line 4, is not JSON: Expecting value"),
        ('[{"a": 1},\n{"b": 2,\n "b": 3}]', "from line 2, repeats the key `b`"),
        ('[{"a": 1},\n\n3]', "row 2: it is int, not an object"),
        ('[{"a": 1},\n{"b":\n  x}, {"c": "a long text behind it"}]', "line 3, is not JSON: Expecting value"),
        ('\n[{"a": x}, {"b": "a long text behind it"}]', "line 2, is not JSON: Expecting value"),
        ('[{"a": 1} "b"]', "line 1, is not JSON: a comma or `]` is missing"),
        ("[]3", "line 1, is not JSON: text follows the list"),
        ('[{"a": "\\x"}]', "line 1, is not JSON: Invalid \\escape"),
    ],
)
def test_errors_name_their_line_whatever_is_read_at_once(tmp_path, monkeypatch, piece, text, fact):
    monkeypatch.setattr(json_list, "_PIECE", piece)
    with pytest.raises(InputError) as caught:
        rows_of(tmp_path, text)
    assert fact in caught.value.fact


@pytest.mark.parametrize("piece", [1, 2, 3, 5, 16, 1 << 20])
def test_values_cut_by_the_end_of_a_piece_are_whole(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(json_list, "_PIECE", piece)
    rows = [
        {"n": -12.5e-3, "big": 12345678901, "t": True, "f": False, "x": None, "s": '\\"é🙂\n]},'},
        {},
        {"l": [[], {}]},
    ]
    for text in (
        json.dumps(rows, separators=(",", ":")),
        json.dumps(rows, indent=1, ensure_ascii=False),
        "\ufeff " + json.dumps(rows) + "\n\t ",
    ):
        assert rows_of(tmp_path, text) == rows
    assert rows_of(tmp_path, " [ ] ") == []


def test_an_object_with_one_list_of_rows_is_that_list(tmp_path):
    assert rows_of(tmp_path, '{"version": 1, "data": [{"a": 1}, {"a": 2}]}') == [{"a": 1}, {"a": 2}]
    for text in ('{"data": [{"a": 1}, 2]}', '{"data": []}', '{"data": [{"a": 1}], "more": []}', '{"n": 1}'):
        with pytest.raises(InputError, match="holds one object with"):
            rows_of(tmp_path, text)


@pytest.mark.parametrize("text", ["{}", "", "3", '"a"'])
def test_other_json_is_no_list_of_rows(tmp_path, text):
    facts = {"{}": "with no keys", "": "is empty", "3": "begins with `3`", '"a"': 'begins with `"`'}
    with pytest.raises(InputError) as caught:
        rows_of(tmp_path, text)
    assert facts[text] in caught.value.fact


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        (r'["\ud83d"]', r"x holds `\ud83d`, an unpaired surrogate"),
        ('{"a": 1, "b": 2, "a": 3}', "x repeats the key `a`"),
        ("[" * 100_000, "x is nested too deeply"),
        ("9" * 5000, "x holds an integer of more than 4300 digits"),
        ("[1,\n2,,]", "x is not JSON: Expecting value at column 3"),
    ],
)
def test_json_is_parsed_strictly(text, fact):
    assert parse(r'["\ud83d\ude42", {"a": 1}]', "x", "y") == ["🙂", {"a": 1}]
    with pytest.raises(InputError) as caught:
        parse(text, "x", "y")
    assert caught.value.fact == fact
