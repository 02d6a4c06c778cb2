"""SQL statements which the sandbox must refuse."""

from __future__ import annotations

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


def split_statements(block):
    return [statement.strip() for line in block.strip("\n").splitlines() for statement in line.split(" | ")]
