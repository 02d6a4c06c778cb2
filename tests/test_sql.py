"""SQL: the views and their columns, committed rows only, and nothing else of the machine in reach."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys

import numpy as np
import polars as pl
import pytest
from conftest import copy_store, named

from lark_store import Store
from lark_store.cli.sql import sql
from lark_store.errors import QueryError
from lark_store.query.sql.views import VIEWS

NAMED = ["name", "created_at"]
RUN = ["status", "sketcher", "checkpoint", "source", "variant", "device", "fingerprint", "recipe", "versions"]
RUN += ["lance_version", "started_at", "finished_at", "error"]
SCORED = ["checkpoint", "queries", "query_id", "source", "variant", "method", "sketcher", "query_checkpoint"]
SCORED += ["query_variant", "score_run", "over_checkpoints"]
CHECKPOINT = ["model", "path", "revision", "weights_sha256", "tokenizer_sha256", "epoch", "step", "learning_rate"]
SKETCH = ["row_key", "sample_id", "ingest_run", "n_tokens", "n_loss_tokens", "loss", "grad_norm"]
SELF = ["self_influence", "learning_rate", "tracin"]
CORRECTED = ["correction", "positions", "damping", "min_ndim", "power"]
FITTED = ["samples_sha256", "recipe", "created_at"]
EVALUATED = ["evaluation", "kind", "method", "measure", "query_id"]
COLUMNS = {
    "checkpoints": [*NAMED, *CHECKPOINT],
    "checkpoint_metrics": ["checkpoint", "name", "value"],
    "sources": [*NAMED, "stage", "domain", "uri", "licence", "columns"],
    "variants": [*NAMED, "template", "template_text", "targets", "max_length", "sha256"],
    "sketchers": [*NAMED, "k", "seed", "map_version", "dtype", "parameters", "exclude", *CORRECTED, "is_default"],
    "corrections": ["checkpoint", "kind", "origin", "sha256", "n_bytes", "sources", "n_samples", *FITTED],
    "studies": [*NAMED, "recipe", "environment", "hashes", "finished_at"],
    "evaluations": [*EVALUATED, "trial", "value", "recipe", "environment", "finished_at"],
    "samples": ["source", "sample_id", "prompt", "response", "text", "label", "meta", "content_sha256"],
    "sketches": ["sketcher", "checkpoint", "source", "variant", *SKETCH],
    "coverage": ["sketcher", "checkpoint", "source", "variant", "n_samples", "n_sketched", "chosen"],
    "ingest_runs": [*RUN, "ingest_run", "n_existing", "n_sketched", "n_failed", "seconds"],
    "failures": ["ingest_run", "checkpoint", "source", "variant", "sample_id", "reason"],
    "score_runs": [
        *RUN,
        "score_run",
        "method",
        "over_checkpoints",
        "query_checkpoint",
        "queries",
        "query_variant",
        "n_queries",
        "n_samples",
    ],
    "self_influence": ["sketcher", "checkpoint", "source", "variant", "sample_id", *SELF],
    "influence": [*SCORED, "rank", "score", "sample_id"],
    "source_influence": [*SCORED, "max", "argmax", "mean", "std", "n"],
}
# What the scored store holds: 2 checkpoints × (6 fine-tuning samples + 4 queries + 2 variants of 5 + 5 samples).
SIZES = {"checkpoints": 2, "sources": 4, "variants": 2, "sketchers": 3, "samples": 20, "sketches": 60}
SIZES |= {"self_influence": 60, "checkpoint_metrics": 2, "ingest_runs": 12, "failures": 0, "score_runs": 10}
SIZES |= {"coverage": 12, "studies": 0, "evaluations": 0, "corrections": 0}
SIZES |= {"influence": 2 * 4 * (6 + 20), "source_influence": 2 * 4 * 5}


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    with Store.create(tmp_path_factory.mktemp("empty") / "lark.store") as made:
        yield made


@pytest.fixture(scope="module")
def reader(scored_path):
    with Store.open(scored_path) as opened:
        yield opened


@pytest.fixture
def copy(scored_path, tmp_path):
    with Store.open(copy_store(scored_path, tmp_path / "lark.store")) as opened:
        yield opened


def count(store, query):
    return store.sql(f"SELECT count(*) FROM {query}").item()


@pytest.mark.parametrize("view", COLUMNS)
def test_a_view_has_its_columns_with_or_without_rows(empty, scored, view):
    frames = [store.sql(f"SELECT * FROM {view}") for store in (empty, scored)]
    assert [sorted(frame.columns) for frame in frames] == [sorted(COLUMNS[view])] * 2
    assert frames[0].schema == frames[1].schema
    assert len(frames[0]) == {"variants": 2, "sketchers": 2}.get(view, 0)
    assert len(frames[1]) == SIZES[view]


@pytest.mark.parametrize("place", [Store.sql, sql])
def test_the_views_are_those_of_the_documentation(place):
    listed = place.__doc__.split("Views: ")[1].split(".\n")[0].split(". ")[0].replace("(without vectors)", "")
    assert {name.strip() for name in listed.split(",")} == set(COLUMNS) == set(VIEWS)


@pytest.mark.parametrize("view", VIEWS)
def test_the_documented_columns_and_types_are_duckdbs(empty, view):
    columns = {name: column.type for name, column in VIEWS[view].columns.items()}
    assert empty.sql(f"DESCRIBE {view}").select("column_name", "column_type").rows() == list(columns.items())
    meanings = [VIEWS[view].meaning, *(column.meaning for column in VIEWS[view].columns.values())]
    assert [text for text in meanings if not 3 < len(text) <= 60] == []  # a table cuts longer cells


def test_self_influence_is_the_squared_norm_and_tracin_weighs_it_by_the_learning_rate(scored_copy):
    with scored_copy._db.engine.begin() as db:
        db.exec_driver_sql("UPDATE checkpoint SET learning_rate = 0.5 WHERE name = 'base'")
        db.exec_driver_sql("UPDATE checkpoint SET learning_rate = NULL WHERE name = 'epoch-1'")
    key = "checkpoint, source, variant, sample_id"
    made = scored_copy.sql(f"SELECT {key}, self_influence, learning_rate, tracin FROM self_influence ORDER BY ALL")
    norms = scored_copy.sql(f"SELECT {key}, grad_norm FROM sketches ORDER BY ALL")
    assert made.select(norms.columns[:4]).equals(norms[:, :4])
    squared = norms["grad_norm"].to_numpy().astype(np.float64) ** 2
    np.testing.assert_allclose(made["self_influence"].to_numpy(), squared, rtol=1e-12)
    rates = np.where(made["checkpoint"] == "base", 0.5, np.nan)
    np.testing.assert_allclose(made["tracin"].to_numpy(), rates * squared, rtol=1e-12)
    assert made["learning_rate"].null_count() == made["tracin"].null_count() == 30


def test_sketches_join_with_samples_and_checkpoints_by_name(scored):
    joined = scored.sql("""
        SELECT s.stage, c.epoch, k.loss, x.text
        FROM sketches k JOIN samples x USING (source, sample_id) JOIN sources s ON s.name = k.source
        JOIN checkpoints c ON c.name = k.checkpoint WHERE k.variant = 'raw'""")
    assert len(joined) == 20
    assert set(joined["stage"]) == {"pretrain"}
    assert joined["loss"].min() > 0


def test_sketches_can_be_read_several_times_in_one_query(scored):
    pairs = "sketches a JOIN sketches b USING (checkpoint, source, sample_id) WHERE a.variant < b.variant"
    assert count(scored, pairs) == 20
    assert count(scored, "(FROM sketches UNION ALL FROM sketches UNION ALL FROM sketches)") == 3 * SIZES["sketches"]
    assert count(scored, "sketches WHERE loss > (SELECT avg(loss) FROM sketches)") in range(1, SIZES["sketches"])


def test_influence_ranks_agree_with_its_scores_and_with_source_influence(scored):
    disorder = "influence a JOIN influence b USING (score_run, query_id) WHERE a.rank < b.rank AND a.score < b.score"
    assert count(scored, disorder) == 0
    best = "influence i JOIN source_influence s USING (score_run, query_id) WHERE i.rank = 1"
    assert count(scored, best) == count(scored, f"{best} AND i.score = s.max AND i.sample_id = s.argmax") == 40


def test_times_are_times_and_recipes_are_json(scored):
    frame = scored.sql("SELECT DISTINCT recipe->>'$.k' AS k, started_at <= finished_at AS ordered FROM ingest_runs")
    assert frame.rows() == [("1024", True)]


def set_status(store, table, status, number):
    with store._db.engine.begin() as db:
        db.exec_driver_sql(f"UPDATE {table} SET status = '{status}' WHERE id = {number}")


@pytest.mark.parametrize("status", ["running", "interrupted", "failed", "superseded"])
def test_rows_of_a_run_that_is_not_done_are_not_seen(copy, status):
    set_status(copy, "ingest_run", status, 1)
    assert count(copy, "sketches") == SIZES["sketches"] - 6
    assert count(copy, "sketches WHERE ingest_run = 1") == 0
    set_status(copy, "score_run", status, 1)
    for view, rows in (("influence", 4 * 6), ("source_influence", 4)):
        assert count(copy, view) == SIZES[view] - rows
        assert count(copy, f"{view} WHERE score_run = 1") == 0
    assert copy.sql("SELECT status FROM score_runs WHERE score_run = 1").item() == status


READS = """
FROM read_csv('{secret}') | FROM read_csv_auto('{secret}') | FROM '{secret}' | FROM "{secret}"
FROM read_text('{secret}') | FROM read_blob('{secret}') | FROM read_json('{secret}') | FROM read_ndjson('{secret}')
FROM read_json_auto('{secret}') | FROM sniff_csv('{secret}') | FROM glob('{folder}/*') | FROM read_text('{folder}/*')
FROM parquet_scan('{secret}') | FROM read_parquet('{secret}') | FROM parquet_metadata('{secret}')
FROM parquet_schema('{secret}') | FROM read_duckdb('{secret}') | FROM sqlite_scan('{catalog}', 'source')
FROM '{catalog}' | FROM lance_scan('{store}/vectors/samples.lance') | FROM '{store}/vectors/samples.lance'
FROM st_read('{secret}') | FROM read_xlsx('{secret}') | FROM delta_scan('{folder}') | FROM iceberg_scan('{folder}')
FROM query('FROM read_text(''{secret}'')') | FROM query_table('{secret}') | SELECT getenv('HOME')
FROM json_execute_serialized_sql(json_serialize_sql('FROM read_text(''{secret}'')'))
SELECT (SELECT content FROM read_text('{secret}')) | WITH t AS (FROM read_text('{secret}')) FROM t
EXPLAIN ANALYZE FROM read_text('{secret}') | FROM duckdb_secrets() | FROM duckdb_extensions()
SELECT * FROM samples UNION ALL FROM read_csv('{secret}') | FROM 'http://127.0.0.1:9/a.csv'
FROM read_text('file://{secret}') | FROM read_csv('{folder}/../{folder_name}/secret.csv') | FROM arrow_scan(1, 2, 3)
SELECT list_transform([1], lambda x: getenv('HOME')) | FROM query_table(['samples', '{secret}'])
SELECT list_transform(['{secret}'], lambda x: (SELECT content FROM read_text(x))) | FROM read_text(getvariable('p'))
FROM (VALUES ('{secret}')) t(p), LATERAL (FROM read_text(t.p))
SELECT set_config('enable_external_access', 'true', false)
FROM query('FROM query(''FROM read_text(''''{secret}'''')'')') | FROM which_secret('s3://a/b', 's3')
FROM duckdb_secrets(redact := false) | FROM read_csv('/dev/fd/0') | FROM read_text('/proc/self/environ')
FROM summary((FROM read_text('{secret}'))) | SELECT try((SELECT content FROM read_text('{secret}')))
SUMMARIZE '{secret}' | DESCRIBE '{secret}' | FROM samples WHERE text IN (SELECT content FROM read_text('{secret}'))
FROM read_json_objects('{secret}') | FROM parquet_kv_metadata('{secret}') | FROM read_avro('{secret}')
FROM postgres_scan('host=127.0.0.1', 'public', 'a') | SELECT load_extension('{secret}')
FROM pragma_table_info('{secret}')
FROM pandas_scan(1) | FROM python_map_function((SELECT 1)) | FROM seq_scan('x') | FROM pragma_storage_info('samples')
"""
CHANGES = """
COPY samples TO '{folder}/out.csv' | COPY (SELECT 1) TO '{folder}/out.parquet' | COPY samples FROM '{secret}'
EXPLAIN COPY samples TO '{folder}/out.csv' | EXPLAIN ANALYZE COPY (SELECT 1 AS a) TO '{folder}/out.csv'
EXPORT DATABASE '{folder}/out' | IMPORT DATABASE '{folder}' | ATTACH '{catalog}' AS c (TYPE sqlite)
ATTACH '{folder}/out.db' AS m | ATTACH ':memory:' AS m | DETACH memory | USE memory | INSTALL httpfs
FORCE INSTALL httpfs | LOAD httpfs | LOAD '{secret}' | SET enable_external_access = true | SET threads = 1
RESET threads | SET VARIABLE x = 1 | PRAGMA database_list | PRAGMA enable_profiling | CREATE TABLE t AS SELECT 1
CREATE TEMP TABLE t AS SELECT 1 | CREATE VIEW v AS SELECT 1 | CREATE OR REPLACE TEMP VIEW samples AS SELECT 1
CREATE MACRO f(x) AS x | CREATE SCHEMA z | CREATE SEQUENCE q | CREATE TYPE mood AS ENUM ('a')
CREATE SECRET s (TYPE s3, KEY_ID 'a', SECRET 'b')
CREATE INDEX i ON samples(source) | INSERT INTO samples VALUES (1) | UPDATE samples SET text = 'x' | DELETE FROM samples
WITH x AS (INSERT INTO samples VALUES (1) RETURNING *) FROM x | WITH x AS (DELETE FROM samples RETURNING *) FROM x
TRUNCATE samples | MERGE INTO samples USING sources ON true WHEN MATCHED THEN DELETE | DROP VIEW samples
ALTER VIEW samples RENAME TO others | COMMENT ON VIEW samples IS 'x' | CALL pragma_version() | CALL duckdb_settings()
CHECKPOINT | VACUUM | ANALYZE | BEGIN | COMMIT | ROLLBACK | PREPARE p AS SELECT 1 | EXECUTE p | DEALLOCATE p
FROM enable_logging() | FROM enable_profiling() | FROM force_checkpoint()
WITH x AS (COPY samples TO '{folder}/out.csv' RETURNING *) FROM x | FROM (COPY samples TO '{folder}/out.csv')
PIVOT samples ON source USING count(*) | PIVOT (FROM read_csv('{secret}')) ON word USING count(*)
PIVOT samples ON source IN (SELECT content FROM read_text('{secret}')) USING count(*) | SET memory_limit = '1TB'
PREPARE p AS FROM read_text('{secret}') | EXECUTE p('{secret}') | SET lock_configuration = false
SET VARIABLE p = (SELECT content FROM read_text('{secret}')) | CREATE TEMP MACRO m(p) AS TABLE FROM read_text(p)
SELECT 1; SELECT 2 | SELECT 1; DROP VIEW samples |  | ; | -- a comment alone
"""
HARMLESS = """
FROM duckdb_settings() | FROM duckdb_views() | FROM duckdb_tables() | FROM information_schema.tables
FROM sqlite_master | FROM duckdb_logs | FROM duckdb_external_file_cache() | FROM duckdb_temporary_files()
FROM pragma_database_list | SELECT current_setting('home_directory') | SELECT getvariable('x') | FROM query('SELECT 1')
FROM query_table('samples') | SHOW TABLES | DESCRIBE samples | SUMMARIZE samples | EXPLAIN FROM samples
EXPLAIN ANALYZE CREATE TABLE t AS SELECT 1 | FROM checkpoint('memory') | SELECT write_log('x')
SELECT parse_path('{secret}') | FROM pg_catalog.pg_settings | FROM pg_catalog.pg_class | FROM duckdb_variables()
FROM duckdb_prepared_statements() | SELECT current_setting('enable_external_access') | SELECT current_query()
SELECT json_serialize_plan('FROM read_text(''{secret}'')') | FROM query_table('_checkpoint')
PIVOT (SELECT stage FROM sources) ON stage IN ('finetune', 'query') USING count(*)
"""


def statements(block):
    return [statement.strip() for line in block.strip("\n").splitlines() for statement in line.split(" | ")]


@pytest.fixture(scope="module")
def places(scored_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("outside")
    secret = folder / "secret.csv"
    secret.write_text("word\nabracadabra\n", encoding="utf-8")
    names = {"secret": secret, "folder": folder, "folder_name": folder.name, "store": scored_path}
    return names | {"catalog": scored_path / "catalog.sqlite"}


@pytest.fixture
def unchanged(places):
    def look():
        files = [p for root in (places["folder"], places["store"]) for p in root.rglob("*") if p.is_file()]
        kept = {path: path.stat() for path in files if not path.name.endswith(("-wal", "-shm"))}
        return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in kept.items()}

    before = look()
    yield
    assert look() == before


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("statement", statements(READS) + statements(CHANGES))
def test_a_statement_that_reaches_out_or_changes_something_is_refused(reader, places, statement):
    with pytest.raises(QueryError) as caught:
        reader.sql(statement.format(**places))
    assert "abracadabra" not in str(caught.value)


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("statement", statements(HARMLESS))
def test_a_statement_that_duckdb_answers_by_itself_shows_no_file(reader, places, statement):
    assert "abracadabra" not in str(reader.sql(statement.format(**places)).rows())


@pytest.mark.parametrize("statement", ["UPDATE EXTENSIONS", "CONNECT 'a'"])
def test_a_statement_of_a_kind_without_a_name_is_refused(scored, statement):
    with pytest.raises(QueryError):
        scored.sql(statement)


def test_variables_of_the_program_are_no_tables(scored):
    hidden = pl.DataFrame({"word": ["abracadabra"]})
    with pytest.raises(QueryError, match="hidden does not exist"):
        scored.sql("FROM hidden")
    assert hidden.item() == "abracadabra"


def test_one_query_leaves_nothing_for_the_next(scored):
    scored.sql("EXPLAIN ANALYZE CREATE TABLE kept AS SELECT 1")
    with pytest.raises(QueryError, match="kept does not exist"):
        scored.sql("FROM kept")


@pytest.mark.parametrize(
    ("query", "fact", "hint"),
    [
        ("SELEC 1", 'Parser Error: syntax error at or near "SELEC"', None),
        ("SELECT nothing FROM samples", 'Referenced column "nothing" not found', "the views are checkpoints, "),
        ("FROM sample", "Table with name sample does not exist", "the views are checkpoints, "),
        ("SELECT 'a'::INT", "Conversion Error", None),
        ("SELECT $1", "Values were not provided", None),
        ("FROM 'a.csv'", "Permission Error", "SQL here reads the store's views and nothing else"),
        ("SELECT 1; SELECT 2", "one SELECT is allowed, this is SELECT, SELECT", "the store is changed by its commands"),
        ("PIVOT samples ON source USING count(*)", "a PIVOT has to name its values", "for example `PIVOT"),
        ("", "one SELECT is allowed, this is nothing", "the store is changed by its commands"),
    ],
)
def test_an_error_has_duckdbs_message_and_a_hint_where_there_is_one(empty, query, fact, hint):
    with pytest.raises(QueryError) as caught:
        empty.sql(query)
    assert fact in caught.value.fact
    assert caught.value.hint is None if hint is None else caught.value.hint.startswith(hint)


@pytest.mark.parametrize("query", ["SELECT finished_at - started_at FROM ingest_runs", "SELECT union_value(a := 1)"])
def test_a_type_that_polars_lacks_is_converted_or_refused(scored, query):
    with contextlib.suppress(QueryError):
        scored.sql(query)


def test_a_join_with_equal_column_names_is_answered(scored):
    frame = scored.sql("SELECT a.variant, b.variant FROM sketches a JOIN sketches b USING (checkpoint, sample_id)")
    assert len(frame.columns) == 2


def test_times_are_utc_wherever_the_machine_stands(scored_path):
    query = (
        "SELECT right(started_at::VARCHAR, 3) AS zone, ('2026-01-01 02:00Z'::TIMESTAMPTZ)::DATE AS day FROM score_runs"
    )
    code = f"import lark_store; print(lark_store.Store.open({named(scored_path)!r}).sql({query!r}).write_json())"
    environment = os.environ | {"TZ": "America/New_York"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)[0] == {"zone": "+00", "day": "2026-01-01"}
