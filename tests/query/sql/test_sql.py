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
from helpers.sql_statements import CHANGES, READS, split_statements
from helpers.stores import copy_store, set_run_status, store_label

from lark_store import Store
from lark_store.cli.sql import sql
from lark_store.errors import QueryError
from lark_store.query.sql.engine import connect
from lark_store.query.sql.views import VIEWS
from lark_store.schema.chats import CONTENT

NAMED = ["name", "created_at"]
RUN = ["status", "sketcher", "checkpoint", "source", "variant", "device", "fingerprint", "recipe", "versions"]
RUN += ["lance_version", "started_at", "finished_at", "error"]
SCORED = ["checkpoint", "queries", "query_id", "source", "variant", "method", "sketcher", "query_checkpoint"]
SCORED += ["query_variant", "score_run", "over_checkpoints"]
CHECKPOINT = ["model", "path", "revision", "weights_sha256", "tokenizer_sha256", "epoch", "step", "learning_rate"]
SKETCH = ["row_key", "sample_id", "ingest_run", "n_tokens", "n_loss_tokens", "loss", "grad_norm", "n_cut"]
SELF = ["self_influence", "learning_rate", "tracin"]
CORRECTED = ["correction", "positions", "damping", "min_ndim", "power"]
FITTED = ["samples_sha256", "recipe", "created_at"]
MEASURED = ["status", "checkpoint", "source", "variant", "device", "recipe", "versions", "lance_version"]
MEASURED += ["started_at", "finished_at", "error"]
EIF = ["eif_run", "checkpoint", "source", "mode", "optimizer", "learning_rate", "draw"]
EVALUATED = ["evaluation", "kind", "method", "measure", "query_id"]
COLUMNS = {
    "checkpoints": [*NAMED, *CHECKPOINT, "parts"],
    "checkpoint_metrics": ["checkpoint", "name", "value"],
    "sources": [*NAMED, "stage", "domain", "uri", "licence", "columns"],
    "variants": [*NAMED, "template", "template_text", "targets", "max_length", "sha256", "loss", "answers"],
    "sketchers": [*NAMED, "k", "seed", "map_version", "dtype", "parameters", "exclude", *CORRECTED, "is_default"],
    "corrections": ["checkpoint", "kind", "origin", "sha256", "n_bytes", "sources", "n_samples", *FITTED],
    "studies": [*NAMED, "recipe", "environment", "hashes", "finished_at"],
    "evaluations": [*EVALUATED, "trial", "value", "recipe", "environment", "finished_at"],
    "samples": ["source", "sample_id", *CONTENT, "label", "meta", "content_sha256"],
    "sketches": ["sketcher", "checkpoint", "source", "variant", *SKETCH],
    "predictions": [
        "sketcher",
        "checkpoint",
        "source",
        "variant",
        "sample_id",
        "answer",
        "log_probability",
        "n_tokens",
    ],
    "coverage": [
        "sketcher",
        "checkpoint",
        "source",
        "variant",
        "n_samples",
        "n_sketched",
        "n_truncated",
        "n_cut",
        "chosen",
    ],
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
    "probe_runs": [*MEASURED, "probe_run", "decoding", "temperature", "n_samples", "seed", "n_probed", "n_failed"],
    "probes": [
        *("probe_run", "checkpoint", "source", "variant", "sample_id", "is_correct", "n_correct", "n_samples"),
        *("answer_logprob", "p_any", "is_latent", "n_tokens", "output", "reason"),
    ],
    "eif_runs": [*MEASURED, *EIF[:1], *EIF[3:], "queries", "query_variant", "n_samples", "n_queries"],
    "eif": [
        *EIF,
        *("variant", "sample_id", "queries", "query_variant", "query_id", "loss_before", "loss_after", "value"),
    ],
    "eif_pairs": [*EIF, "a", "b", "a_on_b", "b_on_a"],
}
# The scored store holds: 2 checkpoints × (6 fine-tuning samples + 4 queries + 2 variants of 5 + 5 samples).
SIZES = {"checkpoints": 2, "sources": 4, "variants": 2, "sketchers": 3, "samples": 20, "sketches": 60}
SIZES |= {
    "self_influence": 60,
    "checkpoint_metrics": 2,
    "ingest_runs": 12,
    "failures": 0,
    "predictions": 0,
    "score_runs": 10,
}
SIZES |= dict.fromkeys(("probe_runs", "probes", "eif_runs", "eif", "eif_pairs"), 0)
SIZES |= {"coverage": 12, "studies": 0, "evaluations": 0, "corrections": 0}
SIZES |= {"influence": 2 * 4 * (6 + 20), "source_influence": 2 * 4 * 5}


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    with Store.create(tmp_path_factory.mktemp("empty") / "lark.store") as store:
        yield store


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
def test_views_have_their_columns_without_rows(empty, scored, view):
    frames = [store.sql(f"SELECT * FROM {view}") for store in (empty, scored)]
    assert [sorted(frame.columns) for frame in frames] == [sorted(COLUMNS[view])] * 2
    assert frames[0].schema == frames[1].schema
    assert len(frames[0]) == {"variants": 2, "sketchers": 2}.get(view, 0)
    assert len(frames[1]) == SIZES[view]


@pytest.mark.parametrize("place", [Store.sql, sql])
def test_views_match_the_documentation(place):
    listed = place.__doc__.split("Views: ")[1].split(".\n")[0].split(". ")[0].replace("(without vectors)", "")
    assert {name.strip() for name in listed.split(",")} == set(COLUMNS) == set(VIEWS)


@pytest.mark.parametrize("view", VIEWS)
def test_documented_columns_and_types_match_duckdb(empty, view):
    columns = {name: column.type for name, column in VIEWS[view].columns.items()}
    assert empty.sql(f"DESCRIBE {view}").select("column_name", "column_type").rows() == list(columns.items())
    meanings = [VIEWS[view].meaning, *(column.meaning for column in VIEWS[view].columns.values())]
    assert [text for text in meanings if not 3 < len(text) <= 60] == []  # a table cuts longer cells


def test_only_the_relations_of_a_query_are_created(scored):
    def created(query=None):
        with contextlib.closing(connect(scored._db, query=query)) as connection:
            rows = connection.sql("SELECT view_name FROM duckdb_views() WHERE temporary").fetchall()
        names = {name for (name,) in rows}
        return names & set(VIEWS), {name for name in names if name.startswith("_")}

    assert created("SELECT 1") == (set(), set())
    assert created('FROM "Samples"') == ({"samples"}, {"_samples"})
    views, tables = created("SELECT count(*) FROM self_influence")
    assert views == {"self_influence", "sketches", "ingest_runs"}
    assert "_samples" not in tables
    whole = created()
    assert whole[0] == set(VIEWS)
    assert created("SHOW TABLES") == created("FROM duckdb_views()") == whole


def test_a_computed_name_is_found(scored):
    assert scored.sql("SELECT count(*) FROM query_table('sam' || 'ples')").item() == SIZES["samples"]
    assert scored.sql("SELECT count(*) FROM query('FROM ' || 'check' || 'points')").item() == SIZES["checkpoints"]


def test_a_misspelt_name_is_corrected(scored, tmp_path):
    for query, name in (("FROM sampels", "samples"), ("FROM top_influense('q100')", "top_influence")):
        for ask in (scored.sql, lambda query: scored.export(query, tmp_path / "rows.csv")):
            with pytest.raises(QueryError, match=f'Did you mean "{name}'):
                ask(query)


def test_self_influence_is_the_squared_norm_and_tracin_weights_it(scored_copy):
    with scored_copy._db.engine.begin() as db:
        db.exec_driver_sql("UPDATE checkpoint SET learning_rate = 0.5 WHERE name = 'base'")
        db.exec_driver_sql("UPDATE checkpoint SET learning_rate = NULL WHERE name = 'epoch-1'")
    key = "checkpoint, source, variant, sample_id"
    rows = scored_copy.sql(f"SELECT {key}, self_influence, learning_rate, tracin FROM self_influence ORDER BY ALL")
    norms = scored_copy.sql(f"SELECT {key}, grad_norm FROM sketches ORDER BY ALL")
    assert rows.select(norms.columns[:4]).equals(norms[:, :4])
    squared = norms["grad_norm"].to_numpy().astype(np.float64) ** 2
    np.testing.assert_allclose(rows["self_influence"].to_numpy(), squared, rtol=1e-12)
    rates = np.where(rows["checkpoint"] == "base", 0.5, np.nan)
    np.testing.assert_allclose(rows["tracin"].to_numpy(), rates * squared, rtol=1e-12)
    assert rows["learning_rate"].null_count() == rows["tracin"].null_count() == 30


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


def test_times_and_recipes_have_their_types(scored):
    frame = scored.sql("SELECT DISTINCT recipe->>'$.k' AS k, started_at <= finished_at AS ordered FROM ingest_runs")
    assert frame.rows() == [("1024", True)]


@pytest.mark.parametrize("status", ["running", "interrupted", "failed", "superseded"])
def test_rows_of_unfinished_runs_are_invisible(copy, status):
    set_run_status(copy, "ingest_run", status, 1)
    assert count(copy, "sketches") == SIZES["sketches"] - 6
    assert count(copy, "sketches WHERE ingest_run = 1") == 0
    set_run_status(copy, "score_run", status, 1)
    for view, rows in (("influence", 4 * 6), ("source_influence", 4)):
        assert count(copy, view) == SIZES[view] - rows
        assert count(copy, f"{view} WHERE score_run = 1") == 0
    assert copy.sql("SELECT status FROM score_runs WHERE score_run = 1").item() == status


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
@pytest.mark.parametrize("statement", split_statements(READS) + split_statements(CHANGES))
def test_reads_and_changes_outside_the_store_are_refused(reader, places, statement):
    with pytest.raises(QueryError) as caught:
        reader.sql(statement.format(**places))
    assert "abracadabra" not in str(caught.value)


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("statement", split_statements(HARMLESS))
def test_duckdbs_own_statements_show_no_file(reader, places, statement):
    assert "abracadabra" not in str(reader.sql(statement.format(**places)).rows())


@pytest.mark.parametrize("statement", ["UPDATE EXTENSIONS", "CONNECT 'a'"])
def test_unknown_statement_kind_is_refused(scored, statement):
    with pytest.raises(QueryError):
        scored.sql(statement)


def test_python_variables_are_not_tables(scored):
    hidden = pl.DataFrame({"word": ["abracadabra"]})
    with pytest.raises(QueryError, match="hidden does not exist"):
        scored.sql("FROM hidden")
    assert hidden.item() == "abracadabra"


def test_queries_leave_no_state(scored):
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
        ("FROM 'a.csv'", "Permission Error", "SQL can only read the store's views"),
        ("SELECT 1; SELECT 2", "only one SELECT is allowed, not SELECT, SELECT", "change the store with its commands"),
        ("PIVOT samples ON source USING count(*)", "a PIVOT must list its values", "for example `PIVOT"),
        ("", "only one SELECT is allowed, not an empty query", "change the store with its commands"),
    ],
)
def test_errors_have_duckdbs_message_and_hint(empty, query, fact, hint):
    with pytest.raises(QueryError) as caught:
        empty.sql(query)
    assert fact in caught.value.fact
    assert caught.value.hint is None if hint is None else caught.value.hint.startswith(hint)


@pytest.mark.parametrize("query", ["SELECT finished_at - started_at FROM ingest_runs", "SELECT union_value(a := 1)"])
def test_type_unknown_to_polars_is_converted_or_refused(scored, query):
    with contextlib.suppress(QueryError):
        scored.sql(query)


def test_join_with_duplicate_column_names_works(scored):
    frame = scored.sql("SELECT a.variant, b.variant FROM sketches a JOIN sketches b USING (checkpoint, sample_id)")
    assert len(frame.columns) == 2


def test_times_are_utc_in_any_time_zone(scored_path):
    query = (
        "SELECT right(started_at::VARCHAR, 3) AS zone, ('2026-01-01 02:00Z'::TIMESTAMPTZ)::DATE AS day FROM score_runs"
    )
    code = f"import lark_store; print(lark_store.Store.open({store_label(scored_path)!r}).sql({query!r}).write_json())"
    environment = os.environ | {"TZ": "America/New_York"}
    completed = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert json.loads(completed.stdout)[0] == {"zone": "+00", "day": "2026-01-01"}
