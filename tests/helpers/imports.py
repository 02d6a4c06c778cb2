"""Foreign vectors, written as files and imported."""

from __future__ import annotations

import numpy as np
import polars as pl

IDS = {
    "finetune": [f"q{i}" for i in range(6)],
    "songs": [f"sea-{i}" for i in range(5)],
    "test": [f"q{i}" for i in range(100, 104)],
}
SONGS = IDS["songs"]
BASE_RAW = {"checkpoint": "base", "variant": "raw"}


def random_vectors(source, dimensions, number="float32", seed=0):
    vectors = np.random.default_rng([seed, *source.encode()]).normal(size=(len(IDS[source]), dimensions))
    return (vectors * 10 + 1).astype(number)


def cosine_matrix(a, b):
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a @ b.T) / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)


def write_lines(path, ids):
    path.write_text("".join(f"{name}\n" for name in ids), encoding="utf-8")
    return path


def import_numpy(store, folder, source, array, name="trak", **options):
    np.save(folder / f"{source}.npy", array)
    ids = write_lines(folder / f"{source}.txt", IDS[source])
    return store.sketcher_import(name, folder / f"{source}.npy", source=source, ids=ids, **(BASE_RAW | options))


def imported_sketches(store, name="trak"):
    return store.sql(f"SELECT * EXCLUDE (row_key, ingest_run) FROM sketches WHERE sketcher = '{name}' ORDER BY ALL")


def scores_by_sample(hits):
    return dict(hits.frame.select(pl.concat_str("source", "sample_id", separator="/"), "score").iter_rows())
