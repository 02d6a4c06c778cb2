"""The values of a row: which are ids, what JSON lacks, and paths into structs and lists."""

from __future__ import annotations

from decimal import Decimal
from uuid import UUID

import pytest

from lark_store.errors import InputError
from lark_store.readers.fields import finite, id_text, is_blank
from lark_store.readers.paths import follow, listed, without

UUID_TEXT = "12345678-1234-5678-1234-567812345678"


@pytest.mark.parametrize(
    ("value", "text"),
    [(7, "7"), (Decimal(3), "3"), (UUID(UUID_TEXT), UUID_TEXT), (" a ", " a "), (" ", None), (None, None)],
)
def test_texts_and_whole_numbers_are_ids(value, text):
    assert id_text("id", value) == text


@pytest.mark.parametrize(
    ("value", "fact"),
    [
        (True, "column `id` holds bool `True`, not an id"),
        (1.5, "column `id` holds float `1.5`, not an id"),
        ([1], "column `id` holds list `[1]`, not an id"),
        (list(range(30)), "column `id` holds list `[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 1`, not an id"),
        ({"a": 1}, "column `id` holds a dict, not text"),
        (b"a", "column `id` holds bytes, not text"),
    ],
)
def test_other_values_are_no_ids(value, fact):
    with pytest.raises(InputError) as caught:
        id_text("id", value)
    assert caught.value.fact == fact
    assert ("pandas turns integers" in caught.value.hint) == isinstance(value, float)


def test_numbers_that_json_lacks_become_null():
    assert finite({"a": [float("inf"), 1.5, (float("nan"),)], "b": 2}) == {"a": [None, 1.5, [None]], "b": 2}


@pytest.mark.parametrize("value", [None, float("nan"), "", " \n", [], {}])
def test_missing_empty_and_white_values_are_blank(value):
    assert is_blank(value)


@pytest.mark.parametrize("value", [0, 0.0, False, "a", [None], {"a": None}])
def test_other_values_are_not_blank(value):
    assert not is_blank(value)


@pytest.mark.parametrize(
    ("row", "column", "found"),
    [
        ({"a": None}, "a.b", (True, None)),
        ({"a": [1, 2]}, "a.1", (True, 2)),
        ({"a": [1, 2]}, "a.2", (True, None)),
        ({"a": [1, 2]}, "a.x", (False, None)),
        ({"a": {"0": 5}}, "a.0", (True, 5)),
        ({"a.0": 6, "a": [7]}, "a.0", (True, 6)),
    ],
)
def test_a_path_leads_into_structs_and_lists(row, column, found):
    assert follow(row, column) == found


@pytest.mark.parametrize(
    ("row", "columns", "rest"),
    [
        ({"a": {"0": 1, "b": 2}}, ["a.0"], {"a": {"b": 2}}),
        ({"a": [1]}, ["a.x"], {"a": [1]}),
        ({"a": [[1, 2], 3]}, ["a.0.1"], {"a": [[1], 3]}),
        ({"a": [{"x": 1}, {"y": 2}]}, ["a.0"], {"a": [{"y": 2}]}),
        ({"a": [{"x": 1}, {"y": 2}]}, ["a.0.x"], {"a": [{"y": 2}]}),
        ({"a": [1]}, ["a.5.x"], {"a": [1]}),
        ({"a": [1]}, ["a.5"], {"a": [1]}),
        ({"a": [0, 1, 2, 3]}, ["a.0", "a.2"], {"a": [1, 3]}),
        ({"b": {"c": 1}, "d": 2}, ["b.c"], {"d": 2}),
    ],
)
def test_the_neighbours_of_a_value_stay(row, columns, rest):
    assert without(row, columns) == rest


def test_columns_are_listed():
    assert (listed({}), listed({"a": 1, "b": 2})) == ("no columns", "`a`, `b`")
