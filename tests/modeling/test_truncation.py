"""Truncation is counted before, during and after an ingest."""

from __future__ import annotations

import json

import polars as pl
import pytest
from helpers.imports import import_numpy, random_vectors
from helpers.program import lark
from helpers.texts import write_jsonl
from transformers import AutoTokenizer

from lark_store import Store
from lark_store.results import NewText
from lark_store.schema.checksums import CHECKSUM
from lark_store.schema.table_schemas import SKETCH_PREFIX

LENGTH = 40
ROWS = [
    {"id": "short", "text": "A song about the sea."},
    {"id": "long", "text": "A song about the night train. " * 12},
    {"id": "longer", "text": "\n  A song about the old harbour. " * 20},
    {"id": "qa", "prompt": "Is it?", "response": "yes"},
    {"id": "long-qa", "prompt": "Is the kidney affected by this disease? " * 9, "response": " maybe\n"},
    {"id": "too-long", "prompt": "Is it?", "response": "often " * 90},
]
AT = {"sketcher": "small"}


@pytest.fixture(scope="module")
def lengths(checkpoints):
    """The tokens of each whole sample as `raw` text, by the tokenizer alone."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoints["base"])
    whole = {row["id"]: row.get("text") or f"{row['prompt']}\n{row['response']}" for row in ROWS}
    return {name: len(tokenizer(text)["input_ids"]) for name, text in whole.items()}


@pytest.fixture
def mixed(store, tmp_path):
    """A store with samples of many lengths, and variants which cut none or some of them."""
    store.source_add("mixed", write_jsonl(tmp_path / "mixed.jsonl", ROWS), stage="pretrain")
    store.variant_add("cut_short", template="raw", max_length=LENGTH)
    return store


def cuts(lengths):
    return {name: max(0, n - LENGTH) for name, n in lengths.items() if name != "too-long"}


@pytest.mark.parametrize("batch_tokens", [1, 4096])
def test_ingest_counts_truncated_samples_and_tokens(mixed, lengths, batch_tokens):
    expected = cuts(lengths)
    assert [name for name, n in expected.items() if n] == ["long", "longer", "long-qa"]
    report = mixed.ingest(["base"], ["mixed", "songs"], ["cut_short", "raw"], batch_tokens=batch_tokens, **AT)
    n_cut = sum(expected.values())
    counts = ["source", "variant", "n_sketched", "n_failed", "n_truncated", "n_cut"]
    assert report.units.select(counts).rows() == [
        ("mixed", "cut_short", 5, 1, 3, n_cut),
        ("mixed", "raw", 6, 0, *over(lengths, 256)),  # the model's context
        ("songs", "cut_short", 5, 0, 0, 0),
        ("songs", "raw", 5, 0, 0, 0),
    ]
    assert (report.n_truncated, report.n_cut) == (3 + over(lengths, 256)[0], n_cut + over(lengths, 256)[1])
    stored = dict(
        mixed.sql("select sample_id, n_cut from sketches where variant = 'cut_short' and source = 'mixed'").rows()
    )
    assert stored == expected
    again = mixed.ingest(["base"], ["mixed"], ["raw"], **AT)
    assert again.units.select("n_existing", "n_sketched", "n_truncated", "n_cut").row(0) == (6, 0, 0, 0)


def over(lengths, length):
    """How many samples are longer than `length` tokens, and by how many tokens."""
    more = [n - length for n in lengths.values() if n > length]
    return len(more), sum(more)


def test_coverage_counts_truncation_over_all_runs(mixed, lengths):
    expected = cuts(lengths)
    mixed.ingest(["base"], ["mixed"], ["cut_short"], limit=2, **AT)
    mixed.ingest(["base"], ["mixed"], ["cut_short", "chatml"], **AT)
    mixed.ingest(["base"], ["songs"], ["cut_short"], **AT)
    columns = ["source", "variant", "n_truncated", "n_cut"]
    query = f"select {', '.join(columns)} from coverage where variant = 'cut_short' order by source"
    known = [("mixed", "cut_short", 3, sum(expected.values())), ("songs", "cut_short", 0, 0)]
    of_short = pl.col("variant") == "cut_short"
    assert mixed.coverage().filter(of_short).select(columns).sort("source").rows() == known
    assert mixed.sql(query).rows() == known
    mixed.sample_remove("mixed", ["long"])
    known[0] = ("mixed", "cut_short", 2, sum(expected.values()) - expected["long"])
    assert mixed.coverage().filter(of_short).select(columns).sort("source").rows() == known
    assert mixed.sql(query).rows() == known


def test_coverage_of_a_method_counts_its_scored_samples(mixed, lengths):
    mixed.ingest(["base"], ["mixed", "test"], ["cut_short"], **AT)
    mixed.attribute(["base"], queries="test", query_variant="cut_short", **AT)
    row = mixed.coverage(method="cosine").filter(source="mixed").row(0, named=True)
    assert (row["n_searched"], row["n_truncated"], row["n_cut"]) == (5, 3, sum(cuts(lengths).values()))


def forget_cuts(store):
    """Turn some sketches into sketches of an older version, without counts."""
    [name] = [table for table in store._db.vectors.table_names() if table.startswith(SKETCH_PREFIX)]
    nulls = {"n_cut": "CAST(NULL AS INT)", CHECKSUM: "CAST(NULL AS BIGINT)"}
    store._db.vectors.table(name).update(where="sample_id = 'short'", values_sql=nulls)


def test_coverage_is_null_without_counts(mixed):
    mixed.ingest(["base"], ["mixed", "songs"], ["cut_short"], **AT)
    forget_cuts(mixed)
    for frame in (mixed.coverage(), mixed.sql("from coverage")):
        result = frame.filter(variant="cut_short").select("source", "n_truncated", "n_cut").sort("source")
        assert result.rows() == [("mixed", None, None), ("songs", 0, 0)]


def test_plan_predicts_truncation_and_failures(mixed, lengths):
    expected = cuts(lengths)
    plan = mixed.plan(["base"], ["mixed", "songs"], ["cut_short"], **AT)
    assert plan.units.select("source", "n_truncated", "n_cut").rows() == [
        ("mixed", 3, sum(expected.values())),
        ("songs", 0, 0),
    ]
    [note] = plan.notes
    assert note.startswith("1 of 6 samples rendered from `base · mixed · cut_short` will fail; `too-long`: ")
    assert note.endswith(f" of its {lengths['too-long']} tokens can't be cut, but the maximum length is {LENGTH}")


def test_plan_of_many_samples_extrapolates(store, tmp_path):
    rows = [
        {"id": f"{i}", "text": "A song about the sea and the night train. " * (9 if i % 4 == 0 else 1)}
        for i in range(1024)
    ]
    store.source_add("many", write_jsonl(tmp_path / "many.jsonl", rows), stage="pretrain")
    store.variant_add("cut_short", template="raw", max_length=LENGTH)
    row = store.plan(["base"], ["many"], ["cut_short"], **AT).units.row(0, named=True)
    tokenizer = AutoTokenizer.from_pretrained(store.sql("select path from checkpoints where name = 'base'").item())
    n_cut = len(tokenizer(rows[0]["text"])["input_ids"]) - LENGTH
    # every eighth is rendered, and each of these is long
    assert (row["n_truncated"], row["n_cut"]) == (1024, 1024 * n_cut)


def test_program_reports_truncation_in_plan_and_ingest_only_if_any(mixed, lengths):
    n_cut = sum(cuts(lengths).values())
    words = "longer than the variant's `--max-length` or the model's context"
    job = "-c base -s mixed --variant cut_short --sketcher small"
    planned = lark(f"plan {job}", store=mixed.path)
    assert f"about 3 samples will be truncated by about {n_cut} tokens: {words}\n" in planned.err
    result = lark(f"ingest {job} --format json", store=mixed.path)
    assert result.code == 1  # one failed
    assert f"3 samples truncated by {n_cut} tokens: {words}; see `n_cut` in the SQL view" in result.err
    [row] = json.loads(result.out)
    assert (row["n_truncated"], row["n_cut"]) == (3, n_cut)
    for command in ("plan", "ingest"):
        quiet = lark(f"{command} -c base -s songs --variant raw --sketcher small", store=mixed.path)
        assert (quiet.code, "truncated" in quiet.err) == (0, False)
    coverage = lark("coverage --format json", store=mixed.path)
    assert {(r["source"], r["n_truncated"], r["n_cut"]) for r in json.loads(coverage.out)} == {
        ("mixed", 3, n_cut),
        ("songs", 0, 0),
    }


def test_sample_truncated_to_nothing_fails(store, tmp_path):
    store.variant_add("cut_short", template="raw", max_length=8)
    rows = [{"id": "a", "prompt": "Is the kidney affected? " * 9, "response": "x y z w v u t"}]
    store.source_add("hard", write_jsonl(tmp_path / "hard.jsonl", rows), stage="finetune")
    report = store.ingest(["base"], ["hard"], ["cut_short"], **AT)
    assert (report.n_failed, report.n_truncated) == (1, 0)
    assert report.failures["reason"].item()


def test_template_losing_its_samples_fails_them_everywhere(store, tmp_path):
    (tmp_path / "alpaca.jinja").write_text("### Instruction: {{ prompt }} ### Response: {{ response }}")
    store.variant_add("alpaca", template=tmp_path / "alpaca.jinja")
    reason = (
        "the template fails: it prints `prompt`, which this sample lacks; write "
        "`{% if prompt %}{{ prompt }}{% endif %}`"
    )
    plan = store.plan(["base"], ["songs", "finetune"], ["alpaca"], **AT)
    assert plan.notes == [f"5 of 5 samples rendered from `base · songs · alpaca` will fail; `sea-0`: {reason}"]
    report = store.ingest(["base"], ["songs", "finetune"], ["alpaca"], **AT)
    assert report.units.select("source", "n_sketched", "n_failed").rows() == [("songs", 0, 5), ("finetune", 6, 0)]
    assert set(report.failures["reason"]) == {reason}
    assert set(store.sql("select reason from failures")["reason"]) == {reason}
    for line in (
        "variant show alpaca --sample sea-0",
        "top -c base --text Sea! --query-variant alpaca --sketcher small --source finetune",
        "correction fit -c base --kind adam --source songs --variant alpaca",
    ):
        result = lark(line, store=store.path)
        assert (result.code, "Traceback" in result.err) == (1, False)
        assert reason in result.err, line


def test_imports_have_unknown_truncation(store, tmp_path):
    report = import_numpy(store, tmp_path, "songs", random_vectors("songs", 8))
    assert report.units.select("n_sketched", "n_truncated", "n_cut").row(0) == (5, None, None)
    assert (report.n_truncated, report.n_cut) == (0, 0)
    assert store.coverage().select("n_truncated", "n_cut").row(0) == (None, None)
    assert set(store.sql("select n_cut from sketches")["n_cut"]) == {None}


def test_new_query_reports_its_truncation(mixed, lengths):
    mixed.ingest(["base"], ["songs"], ["raw"], **AT)
    text = next(row["text"] for row in ROWS if row["id"] == "long")
    options = "-c base -s songs --variant raw --sketcher small"
    long = lark(f"top {options} --query-variant cut_short", "--text", text, store=mixed.path)
    n = lengths["long"]
    assert f"note: the query was truncated: {n - LENGTH} of {n} tokens were cut\n" in long.err
    whole = lark(f"top {options} --query-variant raw", "--text", text, store=mixed.path)
    assert (whole.code, "truncated" in whole.err) == (0, False)


def test_new_query_is_used_byte_for_byte(store, tmp_path):
    text = "\n  if the sea:\r\n    song()\n"
    file = write_jsonl(tmp_path / "query.jsonl", [{"id": "w", "text": text}])
    store.source_add("white", file, stage="query")
    store.ingest(["base"], ["white", "songs"], ["raw"], **AT)
    (tmp_path / "query.txt").write_bytes(text.encode())

    def scores(query=None, **given):
        options = {"checkpoint": "base", "sources": ["songs"], "variants": ["raw"], "query_variant": "raw"}
        return dict(
            store.top(query, new=NewText(**given) if given else None, **options, **AT)
            .frame.select("sample_id", "score")
            .iter_rows()
        )

    stored = scores("w")
    for given in ({"text": text}, {"file": file}, {"file": tmp_path / "query.txt"}):
        assert scores(**given) == pytest.approx(stored, abs=2e-3), given  # the stored sketch is in float16
    stripped = scores(text=text.strip())
    assert max(abs(stripped[name] - stored[name]) for name in stored) > 0.02


def test_counts_survive_closing_and_opening(mixed, lengths):
    mixed.ingest(["base"], ["mixed"], ["cut_short"], **AT)
    with Store.open(mixed.path) as again:
        assert again.coverage()["n_cut"].item() == sum(cuts(lengths).values())
