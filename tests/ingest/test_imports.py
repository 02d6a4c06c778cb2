"""Imported vectors: scores, refused files, provenance, and kills."""

from __future__ import annotations

import json
import signal
import subprocess
from types import SimpleNamespace

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.forked import run_forked
from helpers.imports import (
    BASE_RAW,
    IDS,
    SONGS,
    cosine_matrix,
    import_numpy,
    imported_sketches,
    random_vectors,
    scores_by_sample,
    write_lines,
)
from helpers.program import lark
from helpers.stores import store_label
from helpers.texts import text_rows, write_jsonl

from lark_store.errors import InputError, NameTakenError, NothingToScoreError
from lark_store.ingest.import_vectors import _check_ids

CLOSE = {"float16": 1e-3, "float32": 1e-6}  # of a cosine, in few dimensions


@pytest.mark.parametrize(
    ("dimensions", "number", "dtype"),
    [(2, "float32", None), (3, "float64", None), (5, "float16", "float32"), (1001, "float32", None)],
)
def test_answers_on_imported_vectors_equal_numpy(store, tmp_path, dimensions, number, dtype):
    vectors = {source: random_vectors(source, dimensions, number) for source in IDS}
    for source, array in vectors.items():
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
        for name, value in zip(IDS[source], cosine_matrix(vectors["test"], vectors[source])[1], strict=True)
    }
    hits = store.top("q101", checkpoint="base", k=20, sketcher="trak")
    assert scores_by_sample(hits) == pytest.approx(expected, abs=CLOSE[kept])
    assert hits.frame["score"].is_sorted(descending=True)

    assert set(store.attribute(["base"], sketcher="trak")["status"]) == {"scored"}
    best = store.sql("SELECT max, argmax FROM source_influence WHERE query_id = 'q101' AND source = 'songs'").row(0)
    songs = {name.removeprefix("songs/"): value for name, value in expected.items() if name.startswith("songs")}
    assert best == (pytest.approx(max(songs.values()), abs=CLOSE[kept]), max(songs, key=songs.get))
    metrics = store.metrics(sketcher="trak").filter(metric="mean_max_influence", source="finetune")
    phi = cosine_matrix(vectors["test"], vectors["finetune"]).max(axis=1).mean()
    assert metrics["value"].item() == pytest.approx(phi, abs=CLOSE[kept])


def test_dot_products_between_checkpoints_equal_numpy(store, tmp_path):
    late, early = random_vectors("test", 7, "float64", seed=1), random_vectors("songs", 7, "float64")
    import_numpy(store, tmp_path, "test", late, checkpoint="epoch-1")
    import_numpy(store, tmp_path, "songs", early)
    hits = store.top("q103", checkpoint="base", query_checkpoint="epoch-1", sketcher="trak")
    expected = dict(zip([f"songs/{name}" for name in IDS["songs"]], early @ late[3], strict=True))
    assert scores_by_sample(hits) == pytest.approx(expected, rel=1e-5)
    assert hits.method == "dot"


def test_imported_row_has_its_norm_and_null_for_unknowns(store, tmp_path):
    array = random_vectors("songs", 6)
    import_numpy(store, tmp_path, "songs", array)
    frame = imported_sketches(store)
    assert frame["sample_id"].to_list() == IDS["songs"]
    assert frame["grad_norm"].to_list() == pytest.approx(np.linalg.norm(array, axis=1).tolist(), rel=1e-6)
    assert frame["loss"].is_nan().all()
    assert frame.select("n_tokens", "n_loss_tokens").unique().rows() == [(0, 0)]
    recipe = json.loads(store.sql("SELECT recipe FROM ingest_runs").item())
    digest = subprocess.run(["sha256sum", tmp_path / "songs.npy"], capture_output=True, text=True, check=True)  # noqa: S607
    assert (recipe["imported"], recipe["kind"], recipe["dimensions"]) == ("songs.npy", "numpy", 6)
    assert recipe["sha256"] == digest.stdout.split()[0]


@pytest.mark.parametrize(
    "array", [np.asfortranarray(random_vectors("songs", 4)), random_vectors("songs", 4).astype(">f8")]
)
def test_any_array_layout_is_accepted(store, tmp_path, array):
    import_numpy(store, tmp_path, "songs", array, dtype="float32")
    store.export("sketches", tmp_path / "out.parquet", vectors=True, sketcher="trak")
    frame = pl.read_parquet(tmp_path / "out.parquet").sort("sample_id")
    unit = random_vectors("songs", 4) / np.linalg.norm(random_vectors("songs", 4), axis=1)[:, None]
    np.testing.assert_allclose(frame["vector"].to_numpy() / 2, unit, rtol=1e-6)


# --- refused arguments and files ------------------------------------------------------------------------------------


def test_name_has_one_dimension(store, tmp_path):
    import_numpy(store, tmp_path, "songs", random_vectors("songs", 8))
    with pytest.raises(NameTakenError, match="with k `8`, not `9`"):
        import_numpy(store, tmp_path, "test", random_vectors("test", 9))
    with pytest.raises(NameTakenError, match="dtype `float16`, not `float32`"):
        import_numpy(store, tmp_path, "test", random_vectors("test", 8), dtype="float32")
    with pytest.raises(NameTakenError, match="correction `none`, not `imported`"):
        import_numpy(store, tmp_path, "test", random_vectors("test", 1024), name="small")
    import_numpy(store, tmp_path, "test", random_vectors("test", 8, "float64"))  # stored as the first were
    assert store.top("q100", checkpoint="base", sketcher="trak").n_searched == 5


def test_imported_sketcher_can_not_ingest(store, tmp_path):
    import_numpy(store, tmp_path, "songs", random_vectors("songs", 1024))
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
        with pytest.raises(InputError, match="sketches of `trak` were imported") as caught:
            attempt()
        assert "`store.sketcher_import(" in caught.value.hint
    with pytest.raises(NameTakenError, match="correction `imported`, not `none`"):
        store.sketcher_add("trak", k=1024)
    with pytest.raises(NothingToScoreError) as caught:
        store.top("q100", checkpoint="epoch-1", sketcher="trak")
    assert '`store.sketcher_import("trak", FILE, checkpoint="epoch-1", ...)`' in caught.value.hint


# --- failures, existing rows, interruptions --------------------------------------------------------------------------


def test_vectors_without_direction_are_recorded_as_failures(store, tmp_path):
    rows = [[1.0, 2.0], [0.0, 0.0], [np.nan, 1.0], [np.inf, 1.0], None]
    pq.write_table(pa.table({"sample_id": SONGS, "vector": rows}), tmp_path / "songs.parquet")
    more = [[3.0, 4.0], [1.0], [1.0, None], [1e200, 1e200], [1e-200, 0.0], [1.0, 1.0]]
    pq.write_table(
        pa.table({"sample_id": IDS["finetune"], "vector": more, "grad_norm": [1.0] * 3 + [None] * 2 + [np.nan]}),
        tmp_path / "finetune.parquet",
    )
    reasons = {}
    for source, n in (("songs", 1), ("finetune", 1)):
        report = store.sketcher_import("pq", tmp_path / f"{source}.parquet", source=source, **BASE_RAW)
        assert report.units.select("n_sketched", "n_failed").row(0) == (n, len(IDS[source]) - n)
        reasons |= dict(report.failures.select("sample_id", "reason").iter_rows())
    assert reasons == {
        "sea-1": "its vector is zero",
        "sea-2": "its vector holds NaN or infinite numbers",
        "sea-3": "its vector holds NaN or infinite numbers",
        "sea-4": "it has no vector",
        "q1": "its vector has 1 numbers, not 2",
        "q2": "its vector holds NaN or infinite numbers",
        "q3": "its norm 1.41421e+200 is outside the range of float32",
        "q4": "its norm 1e-200 is outside the range of float32",
        "q5": "its norm nan is outside the range of float32",
    }
    assert imported_sketches(store, "pq").select("sample_id", "grad_norm").rows() == [
        ("q0", 1.0),
        ("sea-0", pytest.approx(5**0.5)),
    ]
    assert dict(store.sql("SELECT sample_id, reason FROM failures").iter_rows()) == reasons


def test_very_large_and_small_numbers_keep_their_direction(store, tmp_path):
    for source, scale in (("songs", 1e30), ("test", 1e-30)):
        import_numpy(store, tmp_path, source, random_vectors(source, 4, "float64") * scale)
    hits = store.top("q100", checkpoint="base", sketcher="trak")
    expected = cosine_matrix(random_vectors("test", 4, "float64"), random_vectors("songs", 4, "float64"))[0]
    assert scores_by_sample(hits) == pytest.approx(
        dict(zip([f"songs/{n}" for n in SONGS], expected, strict=True)), abs=1e-6
    )


def test_repeated_import_writes_only_missing_rows(store, tmp_path):
    array = random_vectors("songs", 5)
    array[3] = 0
    assert import_numpy(store, tmp_path, "songs", array).units["n_failed"].item() == 1
    first = imported_sketches(store)
    again = import_numpy(store, tmp_path, "songs", array)
    assert again.units.select("n_existing", "n_sketched", "n_failed").row(0) == (4, 0, 1)
    assert again.notes == []
    other = import_numpy(store, tmp_path / "..", "songs", random_vectors("songs", 5, seed=1))
    assert other.units.select("n_existing", "n_sketched", "n_failed").row(0) == (4, 1, 0)
    assert other.notes == ["kept the sketches of 4 samples, already imported from `songs.npy`"]
    assert imported_sketches(store).filter(pl.col("sample_id") != "sea-3").equals(first)


def test_landed_write_is_not_repeated(store, tmp_path, monkeypatch):
    append = store._db.vectors.append

    def land_and_break(table, data):
        append(table, data)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store._db.vectors, "append", land_and_break)
        with pytest.raises(KeyboardInterrupt):
            import_numpy(store, tmp_path, "songs", random_vectors("songs", 5))
    assert imported_sketches(store).is_empty()
    report = import_numpy(store, tmp_path, "songs", random_vectors("songs", 5))
    assert report.units.select("n_existing", "n_sketched").row(0) == (5, 0)
    assert len(imported_sketches(store)) == 5


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


def test_killed_import_loses_one_batch_at_most_and_resumes(store, tmp_path):
    n = 300
    store.source_add("many", write_jsonl(tmp_path / "many.jsonl", text_rows(n, "many")), stage="pretrain")
    array = np.random.default_rng(0).normal(size=(n, 6)).astype(np.float32)
    np.save(tmp_path / "many.npy", array)
    ids = write_lines(tmp_path / "many.txt", [f"many-{i}" for i in range(n)])
    assert run_forked(KILLED, store_label(store.path), tmp_path) == -signal.SIGKILL
    assert imported_sketches(store).is_empty()
    assert store.sql("SELECT status, n_sketched FROM ingest_runs").rows() == [("running", 128)]
    report = store.sketcher_import("trak", tmp_path / "many.npy", source="many", ids=ids, **BASE_RAW)
    assert report.units.select("n_samples", "n_existing", "n_sketched").row(0) == (300, 128, 172)
    assert store.sql("SELECT status, n_sketched FROM ingest_runs").rows() == [("done", 300)]
    norms = dict(imported_sketches(store).select("sample_id", "grad_norm").iter_rows())
    assert norms == pytest.approx(dict(zip(ids.read_text().split(), np.linalg.norm(array, axis=1), strict=True)), 1e-6)


def test_command_equals_the_method(store, tmp_path):
    array = random_vectors("songs", 5)
    array[0] = 0
    np.save(tmp_path / "songs.npy", array)
    ids = write_lines(tmp_path / "ids.txt", SONGS)
    line = f"sketcher import trak {tmp_path}/songs.npy --ids {ids} -c base -s songs --variant raw -f json"
    result = lark(line, store=store.path)
    assert result.code == 1
    assert result.columns("n_samples", "n_sketched", "n_failed") == [(5, 4, 1)]
    assert "songs sea-0: its vector is zero" in result.err
    unknown = lark(line.replace("-s songs", "-s medical"), store=store.path)
    assert (unknown.code, unknown.out) == (1, "")
    assert "5 of 5 ids are not samples of source `medical`: `sea-0`, `sea-1`, `sea-2`, …" in unknown.err


@pytest.mark.parametrize(
    ("ids", "fact"),
    [
        (["a", "x"], "1 of 2 ids are not samples of source `songs`: `x`"),
        (["x", "y", "z"], "3 of 3 ids are not samples of source `songs`: `x`, `y`, `z`"),
        (["x", "a", "y", "z", "w"], "4 of 5 ids are not samples of source `songs`: `x`, `y`, `z`, …"),
        (["a", "b", "b", "a"], "sample `b` appears twice"),
    ],
)
def test_wrong_ids_are_listed_up_to_three(ids, fact):
    known = SimpleNamespace(vectors=SimpleNamespace(read=lambda *_: pl.DataFrame({"sample_id": ["a", "b"]})))
    with pytest.raises(InputError) as caught:
        _check_ids(known, "songs", ids)
    assert caught.value.fact == fact
    _check_ids(known, "songs", ["b", "a"])
