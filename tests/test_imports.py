"""Vectors that were made elsewhere: what they score, what is refused, what is recorded, and what a kill leaves."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import text_rows, write_jsonl
from test_cli import lark

from lark_store import Store
from lark_store.errors import InputError, LarkStoreError, NameTakenError, NameUnknownError, NothingToScoreError

IDS = {
    "finetune": [f"q{i}" for i in range(6)],
    "songs": [f"sea-{i}" for i in range(5)],
    "test": [f"q{i}" for i in range(100, 104)],
}
AT = {"checkpoint": "base", "variant": "raw"}
CLOSE = {"float16": 1e-3, "float32": 1e-6}  # of a cosine, in few dimensions


def vectors(source, dimensions, number="float32", seed=0):
    made = np.random.default_rng([seed, *source.encode()]).normal(size=(len(IDS[source]), dimensions))
    return (made * 10 + 1).astype(number)


def cosines(a, b):
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a @ b.T) / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)


def lines(path, ids):
    path.write_text("".join(f"{name}\n" for name in ids), encoding="utf-8")
    return path


def import_numpy(store, folder, source, array, name="trak", **options):
    np.save(folder / f"{source}.npy", array)
    ids = lines(folder / f"{source}.txt", IDS[source])
    return store.sketcher_import(name, folder / f"{source}.npy", source=source, ids=ids, **(AT | options))


def stored(store, name="trak"):
    return store.sql(f"SELECT * EXCLUDE (row_key, ingest_run) FROM sketches WHERE sketcher = '{name}' ORDER BY ALL")


def score(hits):
    return dict(hits.frame.select(pl.concat_str("source", "sample_id", separator="/"), "score").iter_rows())


@pytest.mark.parametrize(
    ("dimensions", "number", "dtype"),
    [(2, "float32", None), (3, "float64", None), (5, "float16", "float32"), (1001, "float32", None)],
)
def test_answers_on_imported_vectors_are_those_of_numpy(store, tmp_path, dimensions, number, dtype):
    made = {source: vectors(source, dimensions, number) for source in IDS}
    for source, array in made.items():
        report = import_numpy(store, tmp_path, source, array, dtype=dtype)
        assert report.units.select("n_samples", "n_existing", "n_sketched", "n_failed").row(0) == (
            *[len(array), 0, len(array), 0],
        )
    kept = dtype or ("float32" if number == "float64" else "float16")
    facts = "k, map_version, dtype, correction, positions"
    assert store.sql(f"SELECT {facts} FROM sketchers WHERE name = 'trak'").row(0) == (
        *[dimensions, 0, kept, "imported", "imported"],
    )
    expected = {
        f"{source}/{name}": value
        for source in ("finetune", "songs")
        for name, value in zip(IDS[source], cosines(made["test"], made[source])[1], strict=True)
    }
    hits = store.top("q101", checkpoint="base", k=20, sketcher="trak")
    assert score(hits) == pytest.approx(expected, abs=CLOSE[kept])
    assert hits.frame["score"].is_sorted(descending=True)

    assert set(store.attribute(["base"], sketcher="trak")["status"]) == {"scored"}
    best = store.sql("SELECT max, argmax FROM source_influence WHERE query_id = 'q101' AND source = 'songs'").row(0)
    songs = {name.removeprefix("songs/"): value for name, value in expected.items() if name.startswith("songs")}
    assert best == (pytest.approx(max(songs.values()), abs=CLOSE[kept]), max(songs, key=songs.get))
    metrics = store.metrics(sketcher="trak").filter(metric="mean_max_influence", source="finetune")
    phi = cosines(made["test"], made["finetune"]).max(axis=1).mean()
    assert metrics["value"].item() == pytest.approx(phi, abs=CLOSE[kept])


def test_dot_products_between_checkpoints_are_those_of_numpy(store, tmp_path):
    late, early = vectors("test", 7, "float64", seed=1), vectors("songs", 7, "float64")
    import_numpy(store, tmp_path, "test", late, checkpoint="epoch-1")
    import_numpy(store, tmp_path, "songs", early)
    hits = store.top("q103", checkpoint="base", query_checkpoint="epoch-1", sketcher="trak")
    expected = dict(zip([f"songs/{name}" for name in IDS["songs"]], early @ late[3], strict=True))
    assert score(hits) == pytest.approx(expected, rel=1e-5)
    assert hits.method == "dot"


def test_a_row_has_the_norm_of_its_vector_and_says_what_is_not_known(store, tmp_path):
    array = vectors("songs", 6)
    import_numpy(store, tmp_path, "songs", array)
    frame = stored(store)
    assert frame["sample_id"].to_list() == IDS["songs"]
    assert frame["grad_norm"].to_list() == pytest.approx(np.linalg.norm(array, axis=1).tolist(), rel=1e-6)
    assert frame["loss"].is_nan().all()
    assert frame.select("n_tokens", "n_loss_tokens").unique().rows() == [(0, 0)]
    recipe = json.loads(store.sql("SELECT recipe FROM ingest_runs").item())
    digest = subprocess.run(["sha256sum", tmp_path / "songs.npy"], capture_output=True, text=True, check=True)  # noqa: S607
    assert (recipe["imported"], recipe["kind"], recipe["dimensions"]) == ("songs.npy", "numpy", 6)
    assert recipe["sha256"] == digest.stdout.split()[0]


@pytest.mark.parametrize("array", [np.asfortranarray(vectors("songs", 4)), vectors("songs", 4).astype(">f8")])
def test_an_array_may_be_laid_out_in_any_way(store, tmp_path, array):
    import_numpy(store, tmp_path, "songs", array, dtype="float32")
    store.export("sketches", tmp_path / "out.parquet", vectors=True, sketcher="trak")
    frame = pl.read_parquet(tmp_path / "out.parquet").sort("sample_id")
    unit = vectors("songs", 4) / np.linalg.norm(vectors("songs", 4), axis=1)[:, None]
    np.testing.assert_allclose(frame["vector"].to_numpy() / 2, unit, rtol=1e-6)


# --- kinds of files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [pa.list_(pa.float16()), pa.list_(pa.float64()), pa.large_list(pa.float32()), pa.list_(pa.float32(), 9)],
    ids=str,
)
def test_parquet_has_its_ids_and_what_else_is_known(store, tmp_path, kind):
    array = vectors("songs", 9)
    columns = {
        "sample_id": pa.array(IDS["songs"], pa.string()).dictionary_encode(),
        "vector": pa.array([row.astype(kind.value_type.to_pandas_dtype()) for row in array], kind),
        "grad_norm": pa.array([1.5, None, 2, 3, 4]),
        "loss": pa.array([0.25, 0.5, None, 1, 2]),
        "n_tokens": pa.array([7, 8, 9, None, 10], pa.int64()),
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", row_group_size=2)
    store.sketcher_import("pq", tmp_path / "a.parquet", source="songs", dtype="float32", **AT)
    frame = stored(store, "pq")
    assert frame["grad_norm"].to_list() == pytest.approx([1.5, np.linalg.norm(array[1]), 2, 3, 4], rel=1e-3)
    assert frame["loss"].fill_nan(None).to_list() == [0.25, 0.5, None, 1, 2]
    assert frame["n_tokens"].to_list() == [7, 8, 9, 0, 10]
    store.export("sketches", tmp_path / "out.parquet", vectors=True, sketcher="pq")
    out = pl.read_parquet(tmp_path / "out.parquet").sort("sample_id")["vector"].to_numpy()
    np.testing.assert_allclose(out / 3, array / np.linalg.norm(array, axis=1)[:, None], atol=1e-3)


def bergson(folder, array, number, columns, loss="mean"):
    """Write an index as bergson 2.5.1's `bergson build` does; the package itself is not installed here.

    The layout was taken from indices that it built (float32 and bfloat16), and those were read by hand.
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
def test_an_index_of_bergson_is_read_in_each_of_its_number_types(store, tmp_path, number):
    made = {source: vectors(source, 11) for source in ("songs", "test")}
    bergson(tmp_path / "songs", made["songs"], number, {"sample_id": IDS["songs"], "id": ["other"] * 5})
    bergson(tmp_path / "test", made["test"], number, {"id": IDS["test"]}, loss="sum")
    for source in made:
        assert store.sketcher_import("bg", tmp_path / source, source=source, **AT).n_failed == 0
    expected = dict(zip([f"songs/{name}" for name in IDS["songs"]], cosines(*made.values())[:, 2], strict=True))
    hits = store.top("q102", checkpoint="base", sketcher="bg")
    assert score(hits) == pytest.approx(expected, abs=1e-2 if number == "bfloat16" else 1e-3)
    frame = stored(store, "bg")
    assert frame.filter(source="songs")["loss"].unique().to_list() == [1.5]
    assert frame.filter(source="test")["loss"].is_nan().all()  # a sum over tokens is not what `loss` holds
    assert frame.filter(source="songs")["n_tokens"].to_list() == [3, 4, 5, 6, 7]


def test_an_index_without_ids_takes_them_from_a_file(store, tmp_path):
    folder = bergson(tmp_path / "index", vectors("songs", 4), "float32", {})
    with pytest.raises(InputError, match="--nodrop_columns"):
        store.sketcher_import("bg", folder, source="songs", **AT)
    ids = lines(tmp_path / "ids.txt", reversed(IDS["songs"]))
    assert store.sketcher_import("bg", folder, source="songs", ids=ids, **AT).units["n_sketched"].item() == 5
    norms = dict(stored(store, "bg").select("sample_id", "grad_norm").iter_rows())
    assert norms["sea-4"] == pytest.approx(np.linalg.norm(vectors("songs", 4)[0]), rel=1e-6)


# --- what is refused -----------------------------------------------------------------------------------------------


def parquet(**columns):
    return lambda path: pq.write_table(pa.table(columns), path)


def npy(array, **options):
    return lambda path: np.save(path, array, **options)


def cut(path):
    np.save(path, vectors("songs", 8))
    path.write_bytes(path.read_bytes()[:-1])


def savez(path):
    np.savez(path.with_suffix(".npz"), a=np.ones((5, 2)))
    path.with_suffix(".npz").rename(path)


SONGS = IDS["songs"]
FIVE = vectors("songs", 3).tolist()
REFUSED = {
    "integers": ("a.npy", npy(np.ones((5, 4), int)), SONGS, "holds int64 of shape"),
    "one row": ("a.npy", npy(np.ones(5)), SONGS, r"holds float64 of shape \(5,\)"),
    "objects": ("a.npy", npy(np.array([[None, "x"]] * 5)), SONGS, "is no .npy file"),
    "several": ("a.npy", savez, SONGS, "several arrays"),
    "text": ("a.npy", lambda path: path.write_text("1 2 3"), SONGS, "is no .npy file"),
    "cut short": ("a.npy", cut, SONGS, "is no .npy file"),
    "narrow": ("a.npy", npy(np.ones((5, 1))), SONGS, "1 dimensions, not from 2 to 4,194,304"),
    "wide": ("a.npy", npy(np.ones((1, 1 << 23), np.float16)), SONGS[:1], "8,388,608 dimensions"),
    "no ids": ("a.npy", npy(np.ones((5, 2))), None, "holds no ids"),
    "few ids": ("a.npy", npy(np.ones((5, 2))), SONGS[:4], "4 ids for the 5 rows"),
    "twice": ("a.npy", npy(np.ones((5, 2))), [*SONGS[:4], "sea-0"], "sample `sea-0` is there twice"),
    "unknown": (
        "a.npy",
        npy(np.ones((5, 2))),
        ["sea-0", "a", "b", "c", "d"],
        "4 of 5 ids are no samples of source `songs`: `a`, `b`, `c`, …",
    ),
    "of another source": ("a.npy", npy(np.ones((5, 2))), [*SONGS[:4], "q0"], "1 of 5 ids .*: `q0`\n"),
    "no such ending": ("a.bin", lambda path: path.write_bytes(b"1"), SONGS, "neither .npy nor .parquet nor a folder"),
    "nothing": ("a.npy", lambda _: None, SONGS, "there is no file"),
    "no vectors": ("a.parquet", parquet(sample_id=SONGS), None, "no column `vector` of lists of floats"),
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
        store.sketcher_import("trak", path, **({"source": "songs", "ids": ids} | AT | options))
    assert caught.value.hint
    assert "trak" not in store.sql("SELECT name FROM sketchers")["name"]
    assert store.sql("SELECT count(*) FROM ingest_runs").item() == 0
    assert [name for name in store._db.vectors.table_names() if name.startswith("sketches_")] == []


@pytest.fixture(scope="module")
def bare(tmp_path_factory, checkpoints):
    """A store with one source, for imports that change nothing."""
    folder = tmp_path_factory.mktemp("bare")
    with Store.create(folder / "lark.store") as made:
        made.checkpoint_add("base", checkpoints["base"])
        made.source_add("songs", write_jsonl(folder / "songs.jsonl", text_rows(5)), stage="pretrain")
        yield made


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_is_not_what_it_should_be_changes_nothing(bare, tmp_path, name):
    file, write, ids, message = REFUSED[name]
    write(tmp_path / file)
    refused(bare, message, tmp_path / file, None if ids is None else lines(tmp_path / "ids.txt", ids))


def edit_info(**changes):
    def change(folder):
        info = json.loads((folder / "info.json").read_text())
        (folder / "info.json").write_text(json.dumps(info | changes))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit_info(attribute_tokens=True), "a gradient per token"),
        (edit_info(base_dtype="int8"), "is not as bergson 2.5 writes it"),
        (edit_info(grad_sizes={"a": 10}), "has not the 5 rows"),
        (edit_info(grad_sizes=[6]), "is not as bergson 2.5 writes it"),
        (lambda folder: (folder / "info.json").write_text("{"), "is not as bergson 2.5 writes it"),
        (lambda folder: (folder / "gradients.bin").unlink(), "has not the 5 rows"),
        (lambda folder: (folder / "data.hf" / "state.json").unlink(), "can't be read as a dataset"),
        (edit_info(num_grads=4, grad_sizes={"a": 10, "b": 5}), "has not one row for each of the 4"),
    ],
)
def test_an_index_that_is_not_whole_changes_nothing(bare, tmp_path, change, message):
    folder = bergson(tmp_path / "index", vectors("songs", 12), "float32", {"id": SONGS})
    change(folder)
    refused(bare, message, folder)


def test_options_that_name_nothing_change_nothing(bare, tmp_path):
    np.save(tmp_path / "a.npy", np.ones((5, 2)))
    ids = lines(tmp_path / "ids.txt", SONGS)
    refused(bare, "`npz` is no kind of file", tmp_path / "a.npy", ids, kind="npz")
    refused(bare, "can't be stored as `int8`", tmp_path / "a.npy", ids, dtype="int8")
    refused(bare, "there is no file .*no.txt", tmp_path / "a.npy", tmp_path / "no.txt")
    for wrong in ({"checkpoint": "bas"}, {"source": "song"}, {"variant": "rav"}):
        with pytest.raises(NameUnknownError, match="did you mean"):
            bare.sketcher_import("trak", tmp_path / "a.npy", **({"source": "songs", "ids": ids} | AT | wrong))


def test_one_name_has_one_number_of_dimensions(store, tmp_path):
    import_numpy(store, tmp_path, "songs", vectors("songs", 8))
    with pytest.raises(NameTakenError, match="with k `8`, not `9`"):
        import_numpy(store, tmp_path, "test", vectors("test", 9))
    with pytest.raises(NameTakenError, match="dtype `float16`, not `float32`"):
        import_numpy(store, tmp_path, "test", vectors("test", 8), dtype="float32")
    with pytest.raises(NameTakenError, match="correction `none`, not `imported`"):
        import_numpy(store, tmp_path, "test", vectors("test", 1024), name="small")
    import_numpy(store, tmp_path, "test", vectors("test", 8, "float64"))  # stored as the first were
    assert store.top("q100", checkpoint="base", sketcher="trak").n_searched == 5


def test_an_imported_sketcher_makes_no_sketches(store, tmp_path):
    import_numpy(store, tmp_path, "songs", vectors("songs", 1024))
    with pytest.raises(InputError, match="no sketches to verify"):
        store.verify()
    store.ingest(["base"], ["finetune"], ["raw"], sketcher="small")
    assert set(store.verify(sketches=100)["sketcher"]) == {"small"}
    job = (["base"], ["finetune"], ["raw"])
    for attempt in (
        lambda: store.ingest(*job, sketcher="trak"),
        lambda: store.plan(*job, sketcher="trak"),
        lambda: store.verify(sketcher="trak"),
        lambda: store.sketcher_show("trak", checkpoint="base"),
    ):
        with pytest.raises(InputError, match="`trak` were made elsewhere") as caught:
            attempt()
        assert "lark-store sketcher import" in caught.value.hint
    with pytest.raises(NameTakenError, match="correction `imported`, not `none`"):
        store.sketcher_add("trak", k=1024)
    with pytest.raises(NothingToScoreError) as caught:
        store.top("q100", checkpoint="epoch-1", sketcher="trak")
    assert "lark-store sketcher import trak FILE --checkpoint epoch-1" in caught.value.hint


# --- what fails, what is there, what breaks off ---------------------------------------------------------------------


def test_vectors_without_a_direction_are_recorded_and_the_others_taken(store, tmp_path):
    rows = [[1.0, 2.0], [0.0, 0.0], [np.nan, 1.0], [np.inf, 1.0], None]
    pq.write_table(pa.table({"sample_id": SONGS, "vector": rows}), tmp_path / "songs.parquet")
    more = [[3.0, 4.0], [1.0], [1.0, None], [1e200, 1e200], [1e-200, 0.0], [1.0, 1.0]]
    pq.write_table(
        pa.table({"sample_id": IDS["finetune"], "vector": more, "grad_norm": [1.0] * 3 + [None] * 2 + [np.nan]}),
        tmp_path / "finetune.parquet",
    )
    reasons = {}
    for source, n in (("songs", 1), ("finetune", 1)):
        report = store.sketcher_import("pq", tmp_path / f"{source}.parquet", source=source, **AT)
        assert report.units.select("n_sketched", "n_failed").row(0) == (n, len(IDS[source]) - n)
        reasons |= dict(report.failures.select("sample_id", "reason").iter_rows())
    assert reasons == {
        "sea-1": "its vector is zero",
        "sea-2": "its vector holds NaN or infinite numbers",
        "sea-3": "its vector holds NaN or infinite numbers",
        "sea-4": "it has no vector",
        "q1": "its vector has 1 numbers, not 2",
        "q2": "its vector holds NaN or infinite numbers",
        "q3": "its norm is 1.41421e+200, which float32 can't hold",
        "q4": "its norm is 1e-200, which float32 can't hold",
        "q5": "its norm is nan, which float32 can't hold",
    }
    assert stored(store, "pq").select("sample_id", "grad_norm").rows() == [
        ("q0", 1.0),
        ("sea-0", pytest.approx(5**0.5)),
    ]
    assert dict(store.sql("SELECT sample_id, reason FROM failures").iter_rows()) == reasons


def test_very_large_and_small_numbers_keep_their_direction(store, tmp_path):
    for source, scale in (("songs", 1e30), ("test", 1e-30)):
        import_numpy(store, tmp_path, source, vectors(source, 4, "float64") * scale)
    hits = store.top("q100", checkpoint="base", sketcher="trak")
    expected = cosines(vectors("test", 4, "float64"), vectors("songs", 4, "float64"))[0]
    assert score(hits) == pytest.approx(dict(zip([f"songs/{n}" for n in SONGS], expected, strict=True)), abs=1e-6)


def test_an_import_once_more_writes_nothing_and_another_file_fills_in_what_is_missing(store, tmp_path):
    array = vectors("songs", 5)
    array[3] = 0
    assert import_numpy(store, tmp_path, "songs", array).units["n_failed"].item() == 1
    first = stored(store)
    again = import_numpy(store, tmp_path, "songs", array)
    assert again.units.select("n_existing", "n_sketched", "n_failed").row(0) == (4, 0, 1)
    assert again.notes == []
    other = import_numpy(store, tmp_path / "..", "songs", vectors("songs", 5, seed=1))
    assert other.units.select("n_existing", "n_sketched", "n_failed").row(0) == (4, 1, 0)
    assert other.notes == ["4 samples had sketches already, imported from `songs.npy`; they are kept"]
    assert stored(store).filter(pl.col("sample_id") != "sea-3").equals(first)


def test_a_write_that_landed_and_then_broke_off_is_not_done_twice(store, tmp_path, monkeypatch):
    append = store._db.vectors.append

    def land_and_break(table, data):
        append(table, data)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store._db.vectors, "append", land_and_break)
        with pytest.raises(KeyboardInterrupt):
            import_numpy(store, tmp_path, "songs", vectors("songs", 5))
    assert stored(store).is_empty()
    report = import_numpy(store, tmp_path, "songs", vectors("songs", 5))
    assert report.units.select("n_existing", "n_sketched").row(0) == (5, 0)
    assert len(stored(store)) == 5


KILLED = """
import os, signal, sys
from lark_store import Store

store, folder = Store.open(sys.argv[1]), sys.argv[2]
append, n = store._db.vectors.append, 0

def append_and_die(table, rows):
    global n
    n += 1
    if n == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return append(table, rows)

store._db.vectors.append = append_and_die
store.sketcher_import("trak", f"{folder}/many.npy", checkpoint="base", source="many", variant="raw",
                      ids=f"{folder}/many.txt")
"""


def test_a_kill_loses_the_rows_in_hand_at_most_and_the_next_import_goes_on(store, tmp_path):
    n = 300
    store.source_add("many", write_jsonl(tmp_path / "many.jsonl", text_rows(n, "many")), stage="pretrain")
    array = np.random.default_rng(0).normal(size=(n, 6)).astype(np.float32)
    np.save(tmp_path / "many.npy", array)
    ids = lines(tmp_path / "many.txt", [f"many-{i}" for i in range(n)])
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", KILLED, store.path, tmp_path], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert stored(store).is_empty()
    assert store.sql("SELECT status, n_sketched FROM ingest_runs").rows() == [("running", 128)]
    report = store.sketcher_import("trak", tmp_path / "many.npy", source="many", ids=ids, **AT)
    assert report.units.select("n_samples", "n_existing", "n_sketched").row(0) == (300, 128, 172)
    assert store.sql("SELECT status, n_sketched FROM ingest_runs").rows() == [("done", 300)]
    norms = dict(stored(store).select("sample_id", "grad_norm").iter_rows())
    assert norms == pytest.approx(dict(zip(ids.read_text().split(), np.linalg.norm(array, axis=1), strict=True)), 1e-6)


def test_the_command_does_what_the_method_does(store, tmp_path):
    array = vectors("songs", 5)
    array[0] = 0
    np.save(tmp_path / "songs.npy", array)
    ids = lines(tmp_path / "ids.txt", SONGS)
    line = f"sketcher import trak {tmp_path}/songs.npy --ids {ids} -c base -s songs --variant raw -f json"
    result = lark(line, store=store.path)
    assert result.code == 1
    assert result.columns("n_samples", "n_sketched", "n_failed") == [(5, 4, 1)]
    assert "songs sea-0: its vector is zero" in result.err
    unknown = lark(line.replace("-s songs", "-s medical"), store=store.path)
    assert (unknown.code, unknown.out) == (1, "")
    assert "5 of 5 ids are no samples of source `medical`: `sea-0`, `sea-1`, `sea-2`, …" in unknown.err


def test_every_error_of_an_import_is_one_of_ours(store, tmp_path):
    """Bytes changed anywhere in a file are read as other vectors or refused, never a traceback."""
    pq.write_table(pa.table({"sample_id": SONGS, "vector": FIVE}), tmp_path / "a.parquet", compression="zstd")
    whole = (tmp_path / "a.parquet").read_bytes()
    for at in range(4, len(whole), 61):
        (tmp_path / "b.parquet").write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
        with contextlib.suppress(LarkStoreError):
            store.sketcher_import("fuzz", tmp_path / "b.parquet", source="songs", **AT)
