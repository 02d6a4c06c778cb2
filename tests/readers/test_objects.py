"""Rows of Python objects: dicts, frames and datasets give the same samples as a file; what has no rows is an error."""

from __future__ import annotations

import subprocess
import sys

import datasets
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

from lark_store.errors import InputError
from lark_store.modeling.forms.rows import make_sample
from lark_store.readers.inputs import ReadOptions, open_input

ROWS = [
    {
        "id": str(i),
        "messages": [
            {"role": "user", "content": f"Is it {i}?"},
            {"role": "assistant", "content": " yes", "weight": i % 2},
            {"role": "tool", "content": "3", "name": "f"},
        ],
    }
    for i in range(3)
]
FRAME = pl.DataFrame(ROWS)
OBJECTS = {
    "list": lambda: ROWS,
    "generator": lambda: (row for row in ROWS),
    "polars.DataFrame": lambda: FRAME,
    "pyarrow.Table": FRAME.to_arrow,
    "pyarrow.RecordBatchReader": lambda: FRAME.to_arrow().to_reader(max_chunksize=1),
    "pandas.DataFrame": lambda: pd.DataFrame(ROWS),
    "datasets.Dataset": lambda: datasets.Dataset.from_list(ROWS),
    "datasets.IterableDataset": lambda: datasets.Dataset.from_list(ROWS).to_iterable_dataset(),
}


def samples(data, **options):
    given = open_input(data, ReadOptions(**options))
    return given.uri, [make_sample(row, {}) for _, rows in given.parts for row in rows]


@pytest.mark.parametrize("name", OBJECTS)
def test_objects_give_the_samples_of_their_rows(name):
    uri, read = samples(OBJECTS[name]())
    assert uri == f"Python: {name}"
    assert [(sample.sample_id, sample.content_sha256) for sample in read] == [
        (row["id"], make_sample(row, {}).content_sha256) for row in ROWS
    ]


def test_arrays_of_structs_of_pandas_lose_their_null_keys(tmp_path):
    FRAME.write_parquet(tmp_path / "a.parquet")
    records = pd.read_parquet(tmp_path / "a.parquet").to_dict("records")
    assert isinstance(records[0]["messages"], np.ndarray)
    assert [sample.content_sha256 for sample in samples(records)[1]] == [
        make_sample(row, {}).content_sha256 for row in ROWS
    ]


def test_numpy_values_become_those_of_python():
    row = {"id": np.int64(3), "text": "a", "values": np.array([1, 2]), "pair": (np.float32(0.5), None)}
    (sample,) = samples([row])[1]
    assert (sample.sample_id, sample.meta) == ("3", {"values": [1, 2], "pair": [0.5, None]})


def test_rows_are_read_when_they_are_asked_for():
    def endless():
        while True:
            yield {"text": "a"}

    _, rows = next(open_input(endless(), ReadOptions()).parts)
    assert next(rows) == {"text": "a"}


NOTHING = [
    ({"text": ["a"]}, "a dict is not a list of rows"),
    (5, "int holds no rows"),
    (None, "NoneType holds no rows"),
    (b"abc", "bytes holds no rows"),
    ([1], "row 1 is int, not a dict"),
    ([{"text": "a"}, "b"], "row 2 is str, not a dict"),
    (["one text", "another text"], "a list of texts is not a list of rows"),
    (pl.LazyFrame({"text": ["a"]}), "a LazyFrame holds no rows yet"),
    (pl.Series(["a"]), "Series is not a table"),
    (pa.table([["a"], ["b"]], names=["text", "text"]), "two columns named `text`"),
    (datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}), "the dataset has the splits `train`"),
    ("a\udc80.jsonl", "is not UTF-8"),
]


@pytest.mark.parametrize(("data", "fact"), NOTHING, ids=range(len(NOTHING)))
def test_object_without_rows_is_an_error_with_a_hint(data, fact):
    with pytest.raises(InputError) as caught:
        samples(data)
    assert fact in caught.value.fact
    assert caught.value.hint


def test_object_has_no_split():
    with pytest.raises(InputError, match="`Python: list` has no configuration, split or file format"):
        samples(ROWS, split="train")


def test_reading_rows_imports_neither_datasets_nor_pandas():
    code = (
        "import sys; from lark_store.readers.inputs import *\n"
        "rows = list(next(open_input([{'text': 'a'}], ReadOptions()).parts)[1])\n"
        "sys.exit(bool({'datasets', 'pandas', 'polars', 'torch'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
