"""Export: files equal the answers of `sql` and the stored data, written atomically; other tools read them."""

from __future__ import annotations

import json

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow.parquet as pq
import pytest
from helpers.program import lark
from helpers.sql_statements import CHANGES, READS, split_statements
from helpers.stores import set_run_status
from helpers.texts import qa_rows, write_jsonl
from polars.testing import assert_frame_equal

from lark_store.errors import InputError, LarkStoreError, NameUnknownError, NothingToScoreError, QueryError
from lark_store.query.sql.views import VIEWS

ENDINGS = (".parquet", ".csv", ".json", ".jsonl")


def read(path, **kinds):
    if path.suffix == ".parquet":
        return pl.read_parquet(path)
    if path.suffix == ".csv":
        return pl.read_csv(path, schema=kinds or None)
    text = path.read_text(encoding="utf-8")
    rows = json.loads(text) if path.suffix == ".json" else map(json.loads, text.split("\n")[:-1])
    return pl.DataFrame(list(rows), schema=kinds or None)


@pytest.mark.parametrize("view", VIEWS)
def test_parquet_view_has_the_rows_and_types_of_sql(scored, tmp_path, view):
    expected = scored.sql(f"FROM {view}")
    assert scored.export(view, tmp_path / "out.parquet") == len(expected)
    assert_frame_equal(pl.read_parquet(tmp_path / "out.parquet"), expected, check_row_order=False)


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_format_holds_equal_rows(scored, tmp_path, ending):
    query = "SELECT checkpoint, source, rank, score, sample_id FROM influence ORDER BY ALL"
    expected = scored.sql(query)
    assert scored.export(query, tmp_path / f"out{ending}") == len(expected)
    actual = read(tmp_path / f"out{ending}", **expected.schema)
    assert_frame_equal(actual, expected, check_exact=ending == ".parquet", rel_tol=1e-6)
    assert [path.name for path in tmp_path.iterdir()] == [f"out{ending}"]


VALUES = """SELECT * FROM (VALUES ('a "quote", ' || chr(10) || 'ä', 1234567, 0.1::DOUBLE, 'nan'::DOUBLE, [1, 2],
{'b': 'c'::BLOB}, '\\x00\\xFF'::BLOB), (NULL, -1, NULL, NULL, NULL, NULL, NULL)) t(x, n, f, g, l, s, b)"""


@pytest.mark.parametrize(
    ("ending", "row"),
    [
        (".json", ['a "quote", \nä', 1234567, 0.1, None, [1, 2], '{"b": "63"}', "00ff"]),
        (".jsonl", ['a "quote", \nä', 1234567, 0.1, None, [1, 2], '{"b": "63"}', "00ff"]),
        (".csv", ['a "quote", \nä', 1234567, 0.1, None, "[1, 2]", '{"b": "63"}', "00ff"]),
        (".parquet", ['a "quote", \nä', 1234567, 0.1, None, [1, 2], {"b": b"c"}, b"\0\xff"]),
    ],
)
def test_unusual_values_round_trip(scored, tmp_path, ending, row):
    path = tmp_path / f"out{ending}"
    scored.export(VALUES, path)
    result = read(path).with_columns(pl.col("g").cast(pl.Float64).fill_nan(None))
    assert list(result.row(0)) == row
    assert result.row(1) == (None, -1, *[None] * 5)


@pytest.mark.parametrize(("ending", "text"), [(".csv", "a,b\n"), (".json", "[]\n"), (".jsonl", "")])
def test_empty_result_writes_a_file(scored, tmp_path, ending, text):
    assert scored.export("SELECT 1 AS a, [2] AS b WHERE false", tmp_path / f"out{ending}") == 0
    assert (tmp_path / f"out{ending}").read_text() == text


@pytest.mark.parametrize("ending", ENDINGS)
def test_many_rows_are_written_in_several_chunks(scored, tmp_path, ending):
    path = tmp_path / f"out{ending}"
    assert scored.export("SELECT i, repeat('x', 1000) AS x FROM range(70000) t(i) ORDER BY i", path) == 70_000
    assert read(path)["i"].to_list() == list(range(70_000))
    if ending == ".parquet":
        assert pq.ParquetFile(path).num_row_groups in range(2, 5)


def test_wide_numbers_become_portable_types(scored, tmp_path):
    query = "SELECT sum(n) AS whole, 1.5::DECIMAL(9, 2) AS part, 1 AS x, 2 AS x FROM source_influence"
    scored.export(query, tmp_path / "out.parquet")
    frame = pl.read_parquet(tmp_path / "out.parquet")
    assert frame.schema == {"whole": pl.Int64, "part": pl.Float64, "x": pl.Int32, "x_1": pl.Int32}
    assert_frame_equal(frame, scored.sql(query))
    with pytest.raises(QueryError, match="column `n` has a number that doesn't fit in 64 bits"):
        scored.export("SELECT 170141183460469231731687303715884105727 AS n", tmp_path / "wide.csv")


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("query", ["INTERVAL 1 DAY", "union_value(a := 1)", "[{'b': INTERVAL 1 DAY}]"])
def test_type_unsupported_by_the_format_is_refused(scored, tmp_path, ending, query):
    with pytest.raises(QueryError, match="cast it, as in `x::VARCHAR`"):
        scored.export(f"SELECT {query} AS a", tmp_path / f"out{ending}")
    assert list(tmp_path.iterdir()) == []


# --- refusals and interruptions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("statement", split_statements(READS)[::4] + split_statements(CHANGES)[::4])
def test_statements_refused_by_sql_are_not_exported(scored, scored_path, tmp_path, statement):
    secret = tmp_path / "secret.csv"
    secret.write_text("word\nabracadabra\n", encoding="utf-8")
    names = {"secret": secret, "folder": tmp_path, "folder_name": tmp_path.name, "store": scored_path}
    with pytest.raises(LarkStoreError):
        scored.export(statement.format(**names, catalog=scored_path / "catalog.sqlite"), tmp_path / "out.csv")
    assert list(tmp_path.iterdir()) == [secret]


@pytest.mark.parametrize(
    ("kind", "name", "error", "message"),
    [
        ("samples", "out.txt", InputError, "use one of .parquet, .csv, .json, .jsonl"),
        ("samples", "out", InputError, "unsupported file extension"),
        ("samples", "no/out.csv", InputError, "there is no folder"),
        ("samples", "there.csv", InputError, "there is a file at .* already\n\nhint: .*`overwrite=True`"),
        ("samples", "folder.csv", InputError, "something other than a file"),
        ("sample", "out.csv", NameUnknownError, "no view `sample`\n\nhint: did you mean `samples`?"),
        ("SELECT nothing FROM samples", "out.csv", QueryError, "nothing"),
        ("SELECT 1; SELECT 2", "out.csv", QueryError, "one SELECT is allowed"),
        ("samples", "x" * 300 + ".csv", InputError, "."),
    ],
)
def test_impossible_export_gives_the_reason_and_leaves_nothing(scored, tmp_path, kind, name, error, message):
    (tmp_path / "there.csv").write_text("mine")
    (tmp_path / "folder.csv").mkdir()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(error, match=message):
        scored.export(kind, tmp_path / name)
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "there.csv").read_text() == "mine"


BROKEN = "SELECT repeat('x', 1000) AS x, (CASE WHEN i = 99999 THEN 'a' ELSE '1' END)::INT AS n FROM range(100000) t(i)"


@pytest.mark.parametrize("ending", ENDINGS)
def test_failed_export_keeps_the_old_file(scored, tmp_path, ending):
    path = tmp_path / f"out{ending}"
    path.write_text("mine")
    with pytest.raises(QueryError, match="Could not convert string 'a' to INT32"):
        scored.export(BROKEN, path, overwrite=True)
    assert [(item.name, item.read_text()) for item in tmp_path.iterdir()] == [(path.name, "mine")]
    scored.export("SELECT 1 AS a", path, overwrite=True)
    assert read(path).rows() == [(1,)]


def test_an_interrupted_export_leaves_nothing(scored, tmp_path, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pl.DataFrame, "write_ndjson", interrupt)
    with pytest.raises(KeyboardInterrupt):
        scored.export("samples", tmp_path / "out.jsonl")
    assert list(tmp_path.iterdir()) == []


# --- vectors -------------------------------------------------------------------------------------------------------


def in_store(store):
    """Return row_key → vector as the store has them."""
    (name,) = [n for n in store._db.vectors.table_names() if n.startswith("sketches_")]
    table = store._db.vectors.table(name).to_lance().to_table(columns=["row_key", "vector"])
    return dict(zip(table["row_key"].to_pylist(), np.array(table["vector"].to_pylist()), strict=True))


def by_polars(path):
    frame = pl.read_parquet(path)
    return dict(zip(frame["row_key"], frame["vector"].to_numpy(), strict=True))


def by_pandas(path):
    frame = pd.read_parquet(path)
    return dict(zip(frame["row_key"], frame["vector"], strict=True))


def by_duckdb(path):
    return {key: np.array(vector) for key, vector in duckdb.sql(f"SELECT row_key, vector FROM '{path}'").fetchall()}


@pytest.mark.parametrize("reader", [by_polars, by_pandas, by_duckdb])
def test_exported_vectors_equal_the_stores_in_any_reader(scored, tmp_path, reader):
    assert scored.export("sketches", tmp_path / "all.parquet", vectors=True, sketcher="small") == 60
    actual, expected = reader(tmp_path / "all.parquet"), in_store(scored)
    assert actual.keys() == expected.keys()
    assert all(np.array_equal(actual[key], expected[key]) for key in expected)
    norms = [np.linalg.norm(vector.astype(np.float64)) for vector in actual.values()]
    assert norms == pytest.approx([32] * 60, rel=1e-3)  # √1024


def test_vectors_keep_their_type_and_metadata(store, tmp_path):
    store.sketcher_add("exact", k=256, dtype="float32")
    for name, kind in (("small", "halffloat"), ("exact", "float")):
        store.ingest(["base"], ["songs"], ["raw"], sketcher=name)
        store.export("sketches", tmp_path / f"{name}.parquet", vectors=True, sketcher=name)
        schema = pq.read_schema(tmp_path / f"{name}.parquet")
        assert str(schema.field("vector").type.value_type) == kind
        facts = json.loads(schema.metadata[b"lark_store"])
        assert (facts["sketcher"], facts["k"]) == (name, schema.field("vector").type.list_size)
        assert "square root of k" in facts["vector"]


def test_only_named_and_committed_vectors_are_exported(scored_copy, tmp_path):
    chosen = {"checkpoints": ["base"], "sources": ["songs", "medical"], "variants": ["raw"]}

    def keys(name, **options):
        scored_copy.export("sketches", tmp_path / name, vectors=True, sketcher="small", **options)
        return set(pl.read_parquet(tmp_path / name)["row_key"])

    query = "checkpoint = 'base' AND variant = 'raw' AND source IN ('songs', 'medical')"
    assert keys("a.parquet", **chosen) == set(scored_copy.sql(f"SELECT row_key FROM sketches WHERE {query}")["row_key"])
    run = scored_copy.sql(f"SELECT ingest_run FROM sketches WHERE {query} AND source = 'songs' LIMIT 1").item()
    set_run_status(scored_copy, "ingest_run", "running", run)
    assert keys("b.parquet", **chosen) == {f"base/medical/raw/kidney-{i}" for i in range(5)}
    assert len(keys("c.parquet")) == 55
    with pytest.raises(NothingToScoreError):
        keys("d.parquet", sources=["songs"], variants=["raw"], checkpoints=["base"])


@pytest.mark.parametrize(
    ("kind", "name", "options", "message"),
    [
        ("sketches", "a.csv", {"vectors": True}, "vectors can only be written as Parquet"),
        ("samples", "a.parquet", {"vectors": True}, "`samples` has no vectors"),
        ("sketches", "a.parquet", {"sources": ["songs"]}, "apply to vectors only"),
        ("sketches", "a.parquet", {"vectors": True, "sources": ["song"]}, "did you mean `songs`"),
        ("sketches", "a.parquet", {"vectors": True, "sketcher": "smal"}, "did you mean `small`"),
        ("sketches", "a.parquet", {"vectors": True, "sketcher": "lark"}, "no committed `lark` sketches"),
    ],
)
def test_unwritable_vectors_are_refused(scored, tmp_path, kind, name, options, message):
    with pytest.raises(LarkStoreError, match=message):
        scored.export(kind, tmp_path / name, **options)
    assert list(tmp_path.iterdir()) == []


def test_exported_vectors_can_be_imported(scored_copy, tmp_path):
    selection = {"checkpoint": "base", "variant": "chatml"}
    for source in ("finetune", "test"):
        path = tmp_path / f"{source}.parquet"
        options = {"checkpoints": ["base"], "variants": ["chatml"], "sources": [source]}
        scored_copy.export("sketches", path, vectors=True, sketcher="small", **options)
        scored_copy.sketcher_import("copy", path, source=source, **selection)
    facts = "SELECT sample_id, n_tokens, n_loss_tokens, loss, grad_norm FROM sketches"
    rows = [
        scored_copy.sql(
            f"{facts} WHERE sketcher = '{name}' AND row_key LIKE 'base/%' AND source = 'finetune' ORDER BY 1"
        )
        for name in ("small", "copy")
    ]
    assert_frame_equal(*rows)
    hits = [
        scored_copy.top("q101", checkpoint="base", sources=["finetune"], method="dot", sketcher=name).frame
        for name in ("small", "copy")
    ]
    assert_frame_equal(*hits, rel_tol=1e-3, abs_tol=1e-3)


# --- other tools ---------------------------------------------------------------------------------------------------


def test_pandas_duckdb_and_polars_read_hits_and_reports(store, tmp_path):
    store.source_add("more", write_jsonl(tmp_path / "more.jsonl", qa_rows(3, start=50)), stage="finetune")
    job = (["base"], ["test", "more"], ["chatml"])
    results = {
        "plan": store.plan(*job, sketcher="small"),
        "ingest": store.ingest(*job, sketcher="small"),
        "top": store.top("q100", checkpoint="base", sketcher="small"),
        "sql": store.sql("SELECT name, k FROM sketchers"),
    }
    frames = {"plan": results["plan"].units, "ingest": results["ingest"].units, "top": results["top"].frame}
    for name, result in results.items():
        expected = frames.get(name, result)
        assert len(expected) in (2, 3)
        assert_frame_equal(pl.DataFrame(result), expected)
        assert duckdb.sql("SELECT * FROM result").fetchall() == expected.rows()
        assert pd.DataFrame.from_arrow(result).to_dict("list").keys() == dict.fromkeys(expected.columns).keys()
        assert pd.DataFrame.from_arrow(result).iloc[:, 0].to_list() == expected.to_series(0).to_list()
        assert "<table" in result._repr_html_()


def test_command_equals_the_method(scored, tmp_path):
    out = tmp_path / "best.csv"
    line = f"export 'SELECT sample_id FROM influence WHERE rank = 1' {out}"
    result = lark(line, store=scored.path)
    assert (result.code, result.out, result.err) == (0, "", f"40 rows in `{out}`\n")
    assert lark(line, store=scored.path).code == 1
    assert lark(f"{line} --overwrite", store=scored.path).code == 0
    command = f"export sketches {tmp_path}/v.parquet --vectors -c base -s songs --variant raw --sketcher small"
    assert lark(command, store=scored.path).code == 0
    expected = [f"base/songs/raw/sea-{i}" for i in range(5)]
    assert sorted(pl.read_parquet(tmp_path / "v.parquet")["row_key"]) == expected
