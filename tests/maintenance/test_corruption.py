"""Damage at rest: clear errors of queries, a finding of `db check` for each, and its repair."""

from __future__ import annotations

import re
from datetime import UTC, datetime

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from helpers.corruption import change_catalog, check_findings, lance_table, sketch_table_name, take_rows
from helpers.program import lark
from helpers.texts import write_jsonl

from lark_store import Store
from lark_store.errors import StoreError
from lark_store.schema.checksums import with_checksums, with_score_checksums
from lark_store.schema.table_schemas import embedding_schema

Q1 = "row_key = 'base/finetune/chatml/q1'"
TOP = {"checkpoint": "base", "queries": "test", "sketcher": "small", "k": 30}


def top(store, query="q100"):
    return store.top(query, **TOP).frame


def reopened(store):
    """Return a frame of `top` from a freshly opened store."""
    with Store.open(store.path) as other:
        return top(other)


def lance(store, name):
    return store.path / "vectors" / f"{name}.lance"


def newest_manifest(store, name):
    return min((lance(store, name) / "_versions").glob("*.manifest"))


def flip(path, offset, bit=0):
    content = bytearray(path.read_bytes())
    content[offset] ^= 1 << bit
    path.write_bytes(content)


def errors(store, **options):
    return store.db_check(**options).filter(severity="error")


# --- indices -------------------------------------------------------------------------------------------------------


@pytest.mark.folder
@pytest.mark.parametrize("column", ["ingest_run", "checkpoint", "row_key"])
def test_any_bit_of_an_index_page_is_checked_and_repaired(scored_copy, column):
    before, rows = top(scored_copy), scored_copy.sql("SELECT * FROM sketches ORDER BY ALL")
    name = sketch_table_name(scored_copy)
    index = {i.columns[0]: i for i in lance_table(scored_copy, name).list_indices()}[column]
    pages = sorted((lance(scored_copy, name) / "_indices" / index.index_uuid).glob("*.lance"))
    content = {path: path.read_bytes() for path in pages}
    rng = np.random.default_rng(0)
    n_found = 0
    for path in pages:
        for offset in rng.integers(0, len(content[path]), 6):
            flip(path, int(offset), int(rng.integers(8)))
            report = errors(scored_copy)
            try:
                same = reopened(scored_copy).equals(before)
            except StoreError as error:
                assert "`store.db_check(...)`" in error.hint  # noqa: PT017
                same = False
            assert same or set(report["what"]) == {"index"}
            n_found += len(report)
            path.write_bytes(content[path])
    flip(pages[0], len(content[pages[0]]) // 3)
    for path in pages:
        path.write_bytes(b"")
    assert set(errors(scored_copy)["what"]) == {"index"}
    assert scored_copy.db_repair().left.is_empty()
    assert reopened(scored_copy).equals(before)
    assert scored_copy.sql("SELECT * FROM sketches ORDER BY ALL").equals(rows)
    assert n_found


def test_index_with_swapped_rows_is_detected(scored_copy, monkeypatch):
    from lark_store.maintenance.check import indices

    swapped = {
        "base/finetune/chatml/q1": "base/finetune/chatml/q2",
        "base/finetune/chatml/q2": "base/finetune/chatml/q1",
    }
    whole = indices._ids

    def swap(offset, name, column, values):
        return whole(offset, name, column, [swapped.get(value, value) for value in values])

    monkeypatch.setattr(indices, "_ids", swap)
    (row,) = errors(scored_copy).rows(named=True)
    assert (row["what"], row["n"], row["where"]) == ("index", 2, sketch_table_name(scored_copy))
    assert row["detail"] == "the index of `row_key` lists wrong rows for a value: results may lack rows"


@pytest.mark.folder
@pytest.mark.parametrize("name", ["samples", "influence", "source_influence", "sketches"])
def test_a_folder_of_indices_missing_is_reported_and_rebuilt(scored_copy, name):
    import shutil

    name = sketch_table_name(scored_copy) if name == "sketches" else name
    before = top(scored_copy), scored_copy.metrics(sketcher="small")
    shutil.rmtree(lance(scored_copy, name) / "_indices")
    report = scored_copy.db_check()
    assert report.select("severity", "what", "where", "repair").rows() == [
        ("error", "index", name, "rebuild the indices")
    ]
    try:
        reopened(scored_copy)
    except StoreError as error:
        assert "`store.db_repair(...)`" in error.hint  # noqa: PT017
    assert scored_copy.db_repair().left.is_empty()
    assert (top(scored_copy), scored_copy.metrics(sketcher="small"))[0].equals(before[0])
    with Store.open(scored_copy.path) as other:
        assert other.metrics(sketcher="small").equals(before[1])


# --- versions ------------------------------------------------------------------------------------------------------


@pytest.mark.folder
@pytest.mark.parametrize("harm", ["emptied", "cut", "removed"])
def test_a_newest_manifest_damaged_is_skipped(scored_copy, harm):
    """The newest version of the samples is that of an index: nothing is lost but the index."""
    before = top(scored_copy)
    path = newest_manifest(scored_copy, "samples")
    version = lance_table(scored_copy, "samples").version
    if harm == "removed":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: 0 if harm == "emptied" else -1])
    (row,) = errors(scored_copy).rows(named=True)
    assert (row["where"], row["n"]) == ("samples", 1)
    assert f"roll back to version {version - 1}: " in row["repair"]
    if harm != "removed":
        with pytest.raises(StoreError) as error:
            reopened(scored_copy)
        assert "`store.db_check(...)`" in error.value.hint
    assert scored_copy.db_repair().mended.filter(severity="error")["what"].to_list() == [row["what"]]
    assert scored_copy.db_repair().left.is_empty()
    assert check_findings(scored_copy) == []
    assert reopened(scored_copy).equals(before)


@pytest.mark.folder
def test_rows_that_only_a_lost_version_had_are_reported_before_repair(scored_copy, tmp_path):
    """The samples are lost, their sketches are not: the same `source add` brings all back."""
    more = write_jsonl(tmp_path / "more.jsonl", [{"id": "new", "text": "A song of a new harbour."}])
    scored_copy.source_add("songs", more, stage="pretrain")
    scored_copy.ingest(["base"], ["songs"], ["raw"], sketcher="small")
    before = top(scored_copy)
    folder = lance(scored_copy, "samples") / "_versions"
    lost = [path for path in sorted(folder.glob("*.manifest")) if rows_of(path) is None]
    assert lost == []
    versions = sorted(folder.glob("*.manifest"))
    n = next(i for i, path in enumerate(versions) if rows_of(path) == 20)
    for path in versions[:n]:
        path.write_bytes(b"")
    report = scored_copy.db_repair()
    assert "later commits are lost" in report.mended.filter(what="unreadable")["repair"].item()
    assert report.left.filter(what="sample")["n"].sum() == 1  # a sketch whose sample is lost
    scored_copy.source_add("songs", more, stage="pretrain")
    assert scored_copy.db_repair().left.is_empty()
    assert reopened(scored_copy).equals(before)


def rows_of(manifest):
    import lance as pylance

    version = (1 << 64) - 1 - int(manifest.stem)
    return pylance.dataset(str(manifest.parent.parent), version=version).count_rows()


@pytest.mark.folder
def test_damage_to_an_unneeded_version_is_ignored(scored_copy):
    folder = lance(scored_copy, sketch_table_name(scored_copy)) / "_versions"
    max(folder.glob("*.manifest")).write_bytes(b"")
    assert check_findings(scored_copy) == [("warning", "unreadable", 1)]
    assert scored_copy.db_repair().left.is_empty()
    assert check_findings(scored_copy) == []


# --- values of the catalog -----------------------------------------------------------------------------------------

VALUES = {
    "a recipe": ("ingest_run", "recipe", "1", "'{'", "instead of a JSON object"),
    "a list": ("score_run", "recipe", "1", "'[1]'", "instead of a JSON object"),
    "a time": ("checkpoint", "created_at", "`base`", "'2026-13-01T00:00:00+00:00'", "instead of a time"),
    "a time of no zone": (
        "ingest_run",
        "started_at",
        "1",
        "'2026-01-01T00:00:00'",
        "instead of a time with a time zone",
    ),
}


@pytest.mark.parametrize(("kind", "column", "row", "value", "why"), VALUES.values(), ids=VALUES)
def test_a_value_that_can_not_be_read_is_named_by_queries_and_check(scored_copy, kind, column, row, value, why):
    key = "name = 'base'" if kind == "checkpoint" else "id = 1"
    change_catalog(scored_copy, f"UPDATE {kind} SET {column} = {value} WHERE {key}", checksums=False)
    with pytest.raises(StoreError, match=re.escape(f"the catalog is damaged: `{column}` of {kind} {row}: ")) as error:
        scored_copy.sql(f"SELECT * FROM {kind}s")
    assert error.value.fact.endswith(why)
    assert error.value.hint.startswith("`store.db_check(...)` lists the damage")
    report = scored_copy.db_check()
    assert set(report["what"]) == {"catalog"}
    assert f"`{column}` of {kind} {row}: the catalog holds {value.replace(chr(39), '`')} {why}" in report["detail"][0]
    assert report["detail"].str.ends_with("restore it from a backup").all()
    assert report["repair"].null_count() == len(report)
    assert scored_copy.db_repair().mended.is_empty()


RANGES = {
    "ingest_run SET n_sketched = -3": "`n_sketched` of ingest_run 1: -3 is negative",
    "ingest_run SET seconds = -0.5": "`seconds` of ingest_run 1: -0.5 is negative",
}


@pytest.mark.parametrize(("change", "message"), RANGES.items(), ids=list(RANGES))
def test_a_value_out_of_its_range_is_found(scored_copy, change, message):
    change_catalog(scored_copy, f"UPDATE {change} WHERE id = 1")
    report = scored_copy.db_check().filter(what="catalog", severity="error")
    assert any(detail.startswith(message) for detail in report["detail"])


def test_run_ending_before_its_start_is_a_note(scored_copy):
    change_catalog(scored_copy, "UPDATE score_run SET finished_at = '1999-01-01T00:00:00+00:00' WHERE id = 1")
    (row,) = scored_copy.db_check().rows(named=True)
    assert (row["severity"], row["what"]) == ("note", "clock")
    assert row["detail"] == "`finished_at` of score_run 1: the run finished before it started: was the clock set back?"


@pytest.mark.parametrize(
    "change",
    [
        "checkpoint SET learning_rate = 3e-4 WHERE name = 'base'",
        "checkpoint_metric SET value = 0.75 WHERE checkpoint_id = 1",
        "source SET domain = 'medicaL' WHERE name = 'finetune'",
        "ingest_run SET n_failed = 1 WHERE id = 1",
        "store_meta SET sketcher = 'adam'",
    ],
)
def test_a_changed_value_of_the_catalog_is_found(scored_copy, change):
    assert check_findings(scored_copy) == []
    change_catalog(scored_copy, f"UPDATE {change}", checksums=False)
    (row,) = scored_copy.db_check().rows(named=True)
    assert (row["severity"], row["what"], row["repair"]) == ("error", "catalog", None)
    assert re.fullmatch(r"row .* of \w+ changed after it was written; restore it from a backup", row["detail"])


def test_missing_checksums_are_a_note_and_repaired(scored_copy):
    change_catalog(scored_copy, "UPDATE checkpoint SET checksum = NULL", checksums=False)
    for name in ("samples", sketch_table_name(scored_copy), "source_influence"):
        condition = "sample_id = 'q1'" if name != "source_influence" else "query_id = 'q100'"
        rows = take_rows(scored_copy, name, condition)
        rows = rows.set_column(rows.schema.get_field_index("checksum"), "checksum", pa.nulls(len(rows), pa.int64()))
        lance_table(scored_copy, name).delete(condition)
        lance_table(scored_copy, name).add(rows)
        scored_copy._db.vectors.refresh_indices(lance_table(scored_copy, name))
    assert check_findings(scored_copy) == [("note", "checksum", n) for n in (2, 1, 2, 10)] or {
        (severity, kind) for severity, kind, _ in check_findings(scored_copy)
    } == {("note", "checksum")}
    before = top(scored_copy)
    assert scored_copy.db_repair().left.is_empty()
    assert check_findings(scored_copy) == []
    assert reopened(scored_copy).drop("rank").equals(before.drop("rank"))


# --- rows ----------------------------------------------------------------------------------------------------------


def put(store, name, condition, **columns):
    """Change rows and leave their checksum as it was."""
    rows = take_rows(store, name, condition)
    for column, value in columns.items():
        field = rows.schema.field(column)
        rows = rows.set_column(rows.schema.get_field_index(column), field, pa.array([value] * len(rows), field.type))
    lance_table(store, name).delete(condition)
    lance_table(store, name).add(rows)
    store._db.vectors.refresh_indices(lance_table(store, name))


def flip_a_bit(store, name, condition, column):
    """Flip the lowest bit of one value of a list."""
    (row,) = take_rows(store, name, condition).to_pylist()
    field = lance_table(store, name).schema.field(column)
    bits = np.asarray(row[column], field.type.value_type.to_pandas_dtype())
    view = bits.view({1: np.uint8, 2: np.uint16}[bits.itemsize])
    view[17] ^= 1
    put(store, name, condition, **{column: pa.scalar(bits, field.type)})


def halve(store):
    """Halve all scores of a run, in both tables."""
    for name, columns in (("influence", ["score"]), ("source_influence", ["max", "mean", "std"])):
        rows = take_rows(store, name, "score_run = 1")
        for column in columns:
            half = (pl.from_arrow(rows)[column] / 2).cast(pl.Float32).to_arrow()
            rows = rows.set_column(rows.schema.get_field_index(column), rows.schema.field(column), half)
        lance_table(store, name).delete("score_run = 1")
        lance_table(store, name).add(rows)
        store._db.vectors.refresh_indices(lance_table(store, name))


CHANGES = {
    "a loss": (lambda s: put(s, sketch_table_name(s), Q1, loss=1.25), ("error", "checksum", 1)),
    "tokens": (lambda s: put(s, sketch_table_name(s), Q1, n_tokens=7), ("error", "checksum", 1)),
    "target tokens": (lambda s: put(s, sketch_table_name(s), Q1, n_loss_tokens=3), ("error", "checksum", 1)),
    "a norm": (lambda s: put(s, sketch_table_name(s), Q1, grad_norm=1.5), ("error", "checksum", 1)),
    "metadata": (lambda s: put(s, "samples", "sample_id = 'q1'", meta='{"a": 1}'), ("error", "checksum", 1)),
    "a label": (lambda s: put(s, "samples", "sample_id = 'q1'", label="perhaps"), ("error", "checksum", 1)),
    "a bit of a vector": (lambda s: flip_a_bit(s, sketch_table_name(s), Q1, "vector"), ("error", "checksum", 1)),
    "a bit of a code": (lambda s: flip_a_bit(s, sketch_table_name(s), Q1, "code"), ("error", "checksum", 1)),
    "halved scores": (halve, ("error", "scores", 1)),
    "a hit's score": (
        lambda s: put(s, "influence", "score_run = 1 AND query_id = 'q101' AND rank = 6", score=-1.0),
        ("error", "scores", 1),
    ),
}


@pytest.mark.parametrize(("change", "expected"), CHANGES.values(), ids=CHANGES)
def test_a_changed_value_is_found_even_if_plausible(scored_copy, change, expected):
    change(scored_copy)
    assert expected in check_findings(scored_copy)
    if expected[1] == "checksum" and "samples" not in scored_copy.db_check()["where"].to_list():
        assert scored_copy.db_repair().left.is_empty()
        scored_copy.ingest(["base"], ["finetune"], ["chatml"], sketcher="small")
        scored_copy.attribute(["base"], queries="test", sketcher="small")
        assert check_findings(scored_copy) == []


# --- a deep check --------------------------------------------------------------------------------------------------


def test_scores_that_were_made_wrong_are_found_by_computing_them_again(scored_copy):
    """Their checksums agree, as with scores that a faulty program wrote."""
    scored_copy.attribute(["base", "epoch-1"], queries="test", sketcher="small", method="tracin")
    scored_copy.attribute(["base"], queries="test", sketcher="small", method="hybrid")
    assert errors(scored_copy, deep=1000).is_empty()
    run = scored_copy.sql("SELECT max(score_run) FROM score_runs WHERE method = 'tracin'").item()
    for number in (1, run):
        condition = f"score_run = {number}"
        hits, sums = (take_rows(scored_copy, name, condition) for name in ("influence", "source_influence"))
        half = {n: (pl.from_arrow(sums)[n] / 2).cast(pl.Float32).to_arrow() for n in ("max", "mean", "std")}
        for name, column in half.items():
            sums = sums.set_column(sums.schema.get_field_index(name), sums.schema.field(name), column)
        score = (pl.from_arrow(hits)["score"] / 2).cast(pl.Float32).to_arrow()
        hits = hits.set_column(hits.schema.get_field_index("score"), hits.schema.field("score"), score)
        for name, rows in (("influence", hits), ("source_influence", with_score_checksums(sums, hits))):
            lance_table(scored_copy, name).delete(condition)
            lance_table(scored_copy, name).add(rows)
            scored_copy._db.vectors.refresh_indices(lance_table(scored_copy, name))
    assert errors(scored_copy).is_empty()
    report = errors(scored_copy, deep=1000)
    assert {where.split(":")[0] for where in report["where"]} == {"score run 1", f"score run {run}"}
    assert "recomputed" in report["detail"][0]


def test_deep_check_draws_a_new_sample_unless_seeded(scored_copy, monkeypatch):
    from lark_store.ingest import verify
    from lark_store.query.answers import recheck

    drawn = {"sketches": [], "scores": []}
    of_sketches, of_scores = verify._draw, recheck._draw

    def sketches(*arguments):
        drawn["sketches"].append([(run.id, sample) for run, sample in of_sketches(*arguments)])
        return []

    def scores(*arguments):
        drawn["scores"].append([(run.id, ids) for run, ids in of_scores(*arguments)])
        return []

    monkeypatch.setattr(verify, "_draw", sketches)
    monkeypatch.setattr(recheck, "_draw", scores)
    for seed in (None, None, 5, 5):
        scored_copy.db_check(deep=8, seed=seed)
    assert all(len(rows) for rows in drawn["sketches"] + drawn["scores"])
    first, second, third, fourth = zip(drawn["sketches"][::2], drawn["sketches"][1::2], drawn["scores"], strict=True)
    assert first != second
    assert third == fourth
    assert first[0] != second[0]
    assert first[2] != second[2]


def test_command_prints_the_seed(scored_copy):
    plain = lark("db check --deep 2", store=scored_copy.path)
    (seed,) = re.findall(r"the sample was drawn with `--seed (\d+)`", plain.err)
    again = lark(f"db check --deep 2 --seed {seed}", store=scored_copy.path)
    assert f"`--seed {seed}`" in again.err
    assert "--seed" not in lark("db check", store=scored_copy.path).err


# --- inconclusive checks -------------------------------------------------------------------------------------------


@pytest.mark.folder
def test_of_samples_that_can_not_be_read_nothing_is_concluded(scored_copy):
    """Else every embedding would be one of a sample that is not there, and `db repair` would delete it."""
    vectors = scored_copy._db.vectors
    rows = vectors.read("samples", ["source", "sample_id", "content_sha256"]).to_dicts()
    unit = [1.0, 0.0, 0.0, 0.0]
    kind = embedding_schema(4)
    result = vectors.embeddings("embeddings_0123456789abcdef", 4)
    result.add(with_checksums(pa.Table.from_pylist([row | {"vector": unit} for row in rows], schema=kind)))
    vectors.refresh_indices(result)
    assert check_findings(scored_copy) == []
    for path in (lance(scored_copy, "samples") / "data").iterdir():
        path.write_bytes(path.read_bytes()[:60])
    n = lance_table(scored_copy, sketch_table_name(scored_copy)).count_rows()
    report = scored_copy.db_repair()
    assert report.mended.is_empty()
    assert set(report.left["what"]) == {"unreadable"}
    assert report.left["detail"].str.contains("backup").all()
    assert vectors.table("embeddings_0123456789abcdef").count_rows() == len(rows) == 20
    assert lance_table(scored_copy, sketch_table_name(scored_copy)).count_rows() == n


def test_ingest_records_its_duration(store):
    """The duration is positive, at most the time on the clock, and the run ends after it started."""
    began = datetime.now(UTC)
    store.ingest(["base"], ["finetune", "songs"], ["raw"], sketcher="small")
    passed = (datetime.now(UTC) - began).total_seconds()
    runs = store.sql("SELECT seconds, started_at, finished_at FROM ingest_runs")
    assert len(runs) == 2
    assert (runs["seconds"] > 0).all()
    assert runs["seconds"].sum() <= passed
    assert (runs["finished_at"] > runs["started_at"]).all()
    assert runs["started_at"].min() >= began


def test_resumed_run_adds_to_its_duration(store, monkeypatch):
    from lark_store.ingest.writer import SketchWriter

    whole, calls = SketchWriter.add, []

    def stop(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(SketchWriter, "add", stop)
    with pytest.raises(KeyboardInterrupt):
        store.ingest(["base"], ["finetune"], ["raw"], sketcher="small")
    before = store.sql("SELECT seconds FROM ingest_runs").item()
    assert before > 0
    store.ingest(["base"], ["finetune"], ["raw"], sketcher="small")
    assert store.sql("SELECT seconds FROM ingest_runs").item() > before
