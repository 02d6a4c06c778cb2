"""Files of foreign vectors: each format is read, and an invalid file changes nothing."""

from __future__ import annotations

import contextlib
import json

import datasets
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers.imports import (
    BASE_RAW,
    IDS,
    SONGS,
    cosine_matrix,
    imported_sketches,
    random_vectors,
    scores_by_sample,
    write_lines,
)
from helpers.texts import text_rows, write_jsonl

from lark_store import Store
from lark_store.errors import InputError, LarkStoreError, NameUnknownError


@pytest.mark.parametrize(
    "kind",
    [pa.list_(pa.float16()), pa.list_(pa.float64()), pa.large_list(pa.float32()), pa.list_(pa.float32(), 9)],
    ids=str,
)
def test_parquet_holds_ids_and_metadata(store, tmp_path, kind):
    array = random_vectors("songs", 9)
    columns = {
        "sample_id": pa.array(IDS["songs"], pa.string()).dictionary_encode(),
        "vector": pa.array([row.astype(kind.value_type.to_pandas_dtype()) for row in array], kind),
        "grad_norm": pa.array([1.5, None, 2, 3, 4]),
        "loss": pa.array([0.25, 0.5, None, 1, 2]),
        "n_tokens": pa.array([7, 8, 9, None, 10], pa.int64()),
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", row_group_size=2)
    store.sketcher_import("pq", tmp_path / "a.parquet", source="songs", dtype="float32", **BASE_RAW)
    frame = imported_sketches(store, "pq")
    assert frame["grad_norm"].to_list() == pytest.approx([1.5, np.linalg.norm(array[1]), 2, 3, 4], rel=1e-3)
    assert frame["loss"].fill_nan(None).to_list() == [0.25, 0.5, None, 1, 2]
    assert frame["n_tokens"].to_list() == [7, 8, 9, 0, 10]
    store.export("sketches", tmp_path / "out.parquet", vectors=True, sketcher="pq")
    out = pl.read_parquet(tmp_path / "out.parquet").sort("sample_id")["vector"].to_numpy()
    np.testing.assert_allclose(out / 3, array / np.linalg.norm(array, axis=1)[:, None], atol=1e-3)


def bergson(folder, array, number, columns, loss="mean"):
    """Write an index as bergson 2.5.1's `bergson build` does; the package itself is not installed here.

    The layout follows real indices (float32 and bfloat16), read by hand.
    """
    folder.mkdir()
    half = array.shape[1] // 2
    sizes = {"layers.0.mlp.up_proj": half, "layers.1.mlp.up_proj": array.shape[1] - half}
    counts = {"attribute_tokens": False, "num_items": len(array), "num_grads": len(array)}
    (folder / "info.json").write_text(json.dumps(counts | {"grad_sizes": sizes, "base_dtype": number}, indent=2))
    if number == "bfloat16":
        torch.from_numpy(array).bfloat16().view(torch.int16).numpy().tofile(folder / "gradients.bin")
    else:
        array.astype(number).tofile(folder / "gradients.bin")
    (folder / "config.yaml").write_text(f"steps:\n- build:\n    index_cfg:\n      loss_reduction: {loss}\n")
    facts = {"length": list(range(3, 3 + len(array))), "loss": [1.5] * len(array)}
    datasets.Dataset.from_dict(columns | facts).save_to_disk(folder / "data.hf")
    return folder


@pytest.mark.parametrize("number", ["float16", "float32", "bfloat16"])
def test_bergson_index_is_read_in_each_number_type(store, tmp_path, number):
    vectors = {source: random_vectors(source, 11) for source in ("songs", "test")}
    bergson(tmp_path / "songs", vectors["songs"], number, {"sample_id": IDS["songs"], "id": ["other"] * 5})
    bergson(tmp_path / "test", vectors["test"], number, {"id": IDS["test"]}, loss="sum")
    for source in vectors:
        assert store.sketcher_import("bg", tmp_path / source, source=source, **BASE_RAW).n_failed == 0
    expected = dict(
        zip([f"songs/{name}" for name in IDS["songs"]], cosine_matrix(*vectors.values())[:, 2], strict=True)
    )
    hits = store.top("q102", checkpoint="base", sketcher="bg")
    assert scores_by_sample(hits) == pytest.approx(expected, abs=1e-2 if number == "bfloat16" else 1e-3)
    frame = imported_sketches(store, "bg")
    assert frame.filter(source="songs")["loss"].unique().to_list() == [1.5]
    assert frame.filter(source="test")["loss"].is_nan().all()  # `loss` holds a mean, not a sum over tokens
    assert frame.filter(source="songs")["n_tokens"].to_list() == [3, 4, 5, 6, 7]


def test_an_index_without_ids_takes_them_from_a_file(store, tmp_path):
    folder = bergson(tmp_path / "index", random_vectors("songs", 4), "float32", {})
    with pytest.raises(InputError, match="--nodrop_columns"):
        store.sketcher_import("bg", folder, source="songs", **BASE_RAW)
    ids = write_lines(tmp_path / "ids.txt", reversed(IDS["songs"]))
    assert store.sketcher_import("bg", folder, source="songs", ids=ids, **BASE_RAW).units["n_sketched"].item() == 5
    norms = dict(imported_sketches(store, "bg").select("sample_id", "grad_norm").iter_rows())
    assert norms["sea-4"] == pytest.approx(np.linalg.norm(random_vectors("songs", 4)[0]), rel=1e-6)


# --- refused files -------------------------------------------------------------------------------------------------


def parquet(**columns):
    return lambda path: pq.write_table(pa.table(columns), path)


def npy(array, **options):
    return lambda path: np.save(path, array, **options)


def cut(path):
    np.save(path, random_vectors("songs", 8))
    path.write_bytes(path.read_bytes()[:-1])


def savez(path):
    np.savez(path.with_suffix(".npz"), a=np.ones((5, 2)))
    path.with_suffix(".npz").rename(path)


FIVE = random_vectors("songs", 3).tolist()
REFUSED = {
    "integers": ("a.npy", npy(np.ones((5, 4), int)), SONGS, "holds int64 of shape"),
    "one row": ("a.npy", npy(np.ones(5)), SONGS, r"holds float64 of shape \(5,\)"),
    "objects": ("a.npy", npy(np.array([[None, "x"]] * 5)), SONGS, "is not a .npy file"),
    "several": ("a.npy", savez, SONGS, "several arrays"),
    "text": ("a.npy", lambda path: path.write_text("1 2 3"), SONGS, "is not a .npy file"),
    "cut short": ("a.npy", cut, SONGS, "is not a .npy file"),
    "narrow": ("a.npy", npy(np.ones((5, 1))), SONGS, "1 dimensions, not from 2 to 4,194,304"),
    "wide": ("a.npy", npy(np.ones((1, 1 << 23), np.float16)), SONGS[:1], "8,388,608 dimensions"),
    "no ids": ("a.npy", npy(np.ones((5, 2))), None, "has no ids"),
    "few ids": ("a.npy", npy(np.ones((5, 2))), SONGS[:4], "4 ids for the 5 rows"),
    "twice": ("a.npy", npy(np.ones((5, 2))), [*SONGS[:4], "sea-0"], "sample `sea-0` appears twice"),
    "unknown": (
        "a.npy",
        npy(np.ones((5, 2))),
        ["sea-0", "a", "b", "c", "d"],
        "4 of 5 ids are not samples of source `songs`: `a`, `b`, `c`, …",
    ),
    "of another source": ("a.npy", npy(np.ones((5, 2))), [*SONGS[:4], "q0"], "1 of 5 ids .*: `q0`\n"),
    "no such ending": ("a.bin", lambda path: path.write_bytes(b"1"), SONGS, "neither .npy nor .parquet nor a folder"),
    "nothing": ("a.npy", lambda _: None, SONGS, "there is no file"),
    "no vectors": ("a.parquet", parquet(sample_id=SONGS), None, "no column `vector` of float lists"),
    "no lists": ("a.parquet", parquet(sample_id=SONGS, vector=[1.0] * 5), None, "no column `vector`"),
    "no column of ids": ("a.parquet", parquet(vector=FIVE), None, "has no column `sample_id`"),
    "an id is null": ("a.parquet", parquet(sample_id=[*SONGS[:4], None], vector=FIVE), None, "1 rows without"),
    "no Parquet": ("a.parquet", lambda path: path.write_bytes(b"PAR1"), None, "can't be read"),
    "no rows": (
        "a.parquet",
        parquet(sample_id=pa.array([], pa.string()), vector=pa.array([], pa.list_(pa.float32()))),
        None,
        "holds no vectors",
    ),
    "no index": ("a", lambda path: path.mkdir(), None, "has no info.json"),
}


def refused(store, message, path, ids=None, **options):
    with pytest.raises(InputError, match=message) as caught:
        store.sketcher_import("trak", path, **({"source": "songs", "ids": ids} | BASE_RAW | options))
    assert caught.value.hint
    assert "trak" not in store.sql("SELECT name FROM sketchers")["name"]
    assert store.sql("SELECT count(*) FROM ingest_runs").item() == 0
    assert [name for name in store._db.vectors.table_names() if name.startswith("sketches_")] == []


@pytest.fixture(scope="module")
def bare(tmp_path_factory, checkpoints):
    """A store with one source, for failing imports."""
    folder = tmp_path_factory.mktemp("bare")
    with Store.create(folder / "lark.store") as store:
        store.checkpoint_add("base", checkpoints["base"])
        store.source_add("songs", write_jsonl(folder / "songs.jsonl", text_rows(5)), stage="pretrain")
        yield store


@pytest.mark.parametrize("name", REFUSED)
def test_invalid_file_changes_nothing(bare, tmp_path, name):
    file, write, ids, message = REFUSED[name]
    write(tmp_path / file)
    refused(bare, message, tmp_path / file, None if ids is None else write_lines(tmp_path / "ids.txt", ids))


def edit_info(**changes):
    def change(folder):
        info = json.loads((folder / "info.json").read_text())
        (folder / "info.json").write_text(json.dumps(info | changes))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit_info(attribute_tokens=True), "a gradient per token"),
        (edit_info(base_dtype="int8"), "is not in the format of bergson 2.5"),
        (edit_info(grad_sizes={"a": 10}), "does not have the 5 rows"),
        (edit_info(grad_sizes=[6]), "is not in the format of bergson 2.5"),
        (lambda folder: (folder / "info.json").write_text("{"), "is not in the format of bergson 2.5"),
        (lambda folder: (folder / "gradients.bin").unlink(), "does not have the 5 rows"),
        (lambda folder: (folder / "data.hf" / "state.json").unlink(), "can't be read as a dataset"),
        (edit_info(num_grads=4, grad_sizes={"a": 10, "b": 5}), "does not have one row for each of the 4"),
    ],
)
def test_incomplete_index_changes_nothing(bare, tmp_path, change, message):
    folder = bergson(tmp_path / "index", random_vectors("songs", 12), "float32", {"id": SONGS})
    change(folder)
    refused(bare, message, folder)


def test_options_with_unknown_names_change_nothing(bare, tmp_path):
    np.save(tmp_path / "a.npy", np.ones((5, 2)))
    ids = write_lines(tmp_path / "ids.txt", SONGS)
    refused(bare, "unknown file kind `npz`", tmp_path / "a.npy", ids, kind="npz")
    refused(bare, "can't be stored as `int8`", tmp_path / "a.npy", ids, dtype="int8")
    refused(bare, "there is no file .*no.txt", tmp_path / "a.npy", tmp_path / "no.txt")
    for wrong in ({"checkpoint": "bas"}, {"source": "song"}, {"variant": "rav"}):
        with pytest.raises(NameUnknownError, match="did you mean"):
            bare.sketcher_import("trak", tmp_path / "a.npy", **({"source": "songs", "ids": ids} | BASE_RAW | wrong))


def test_import_raises_only_own_errors(store, tmp_path):
    """Bytes changed anywhere in a file are read as other vectors or refused, never a traceback."""
    pq.write_table(pa.table({"sample_id": SONGS, "vector": FIVE}), tmp_path / "a.parquet", compression="zstd")
    whole = (tmp_path / "a.parquet").read_bytes()
    for position in range(4, len(whole), 61):
        (tmp_path / "b.parquet").write_bytes(whole[:position] + bytes([whole[position] ^ 255]) + whole[position + 1 :])
        with contextlib.suppress(LarkStoreError):
            store.sketcher_import("fuzz", tmp_path / "b.parquet", source="songs", **BASE_RAW)
