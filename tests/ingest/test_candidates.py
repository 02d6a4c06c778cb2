"""Candidate selection: only samples nearest to the queries are sketched; the store records the coverage."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time

import numpy as np
import polars as pl
import pytest
import torch
from helpers.checkpoints import save_tokenizer
from helpers.program import PROGRAM, lark
from helpers.stores import store_label
from helpers.texts import write_jsonl
from helpers.torchrun import launch
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

from lark_store import Store
from lark_store.errors import CheckpointError, InputError, NameUnknownError
from lark_store.modeling.sentence_encoders import Encoder
from lark_store.query.scoring.bm25 import open_lexical, texts_of

BY_WORDS = {"candidates": 2, "queries": "test", "sketcher": "small"}
THINGS = ("kidney", "sea", "night", "train", "harbour", "song", "disease", "patient", "organ", "answer")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A random BERT: any two texts have vectors of their own."""
    folder = tmp_path_factory.mktemp("encoder") / "bert"
    torch.manual_seed(3)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=384, max_position_embeddings=128, initializer_range=0.5, **shape)).save_pretrained(
        folder
    )
    save_tokenizer(folder, chat_template=None)
    return folder


@pytest.fixture
def by_meaning(encoder):
    return {"candidates": 2, "by": "embedding", "encoder": encoder, "queries": "test", "sketcher": "small"}


@pytest.fixture
def large(store, tmp_path):
    """The store with a source of 40 texts, each about two things, and questions about some of them."""
    rng = np.random.default_rng(0)
    pairs = [rng.choice(THINGS, 2, replace=False) for _ in range(40)]
    rows = [{"id": f"t{i:02}", "text": f"number {i} of the {a} and the {b} {a}"} for i, (a, b) in enumerate(pairs)]
    store.source_add("large", write_jsonl(tmp_path / "large.jsonl", rows), stage="pretrain")
    queries = [
        {"id": f"a{i}", "prompt": f"what of the {thing}?", "response": "no"} for i, thing in enumerate(THINGS[:3])
    ]
    store.source_add("asked", write_jsonl(tmp_path / "asked.jsonl", queries), stage="query")
    return store


def sketched_ids(store, source="large", checkpoint="base"):
    rows = store.sql("select sample_id from sketches where source = ? and checkpoint = ?", [source, checkpoint])
    return sorted(rows["sample_id"])


def ids_of(store, source):
    return store.sql("select sample_id from samples where source = ? order by all", [source])["sample_id"].to_list()


def best_by_words(store, source, queries, n):
    """The union of each query's n best of a source by BM25, of equal ones the first ids, and none that scores 0."""
    lexical = open_lexical(store._db, "bm25")
    results = set()
    for text in texts_of(store._db, queries, ids_of(store, queries)):
        frame = lexical.documents.with_columns(score=pl.Series(lexical.scores([text])[0]))
        matches = frame.filter(pl.col("source") == source, pl.col("score") > 0)
        results |= set(matches.sort(["score", "sample_id"], descending=[True, False]).head(n)["sample_id"])
    return sorted(results)


def mean_pooled(folder, texts):
    """Each text's vector, one text at a time: the mean of its tokens' last hidden states, of norm 1."""
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    results = []
    for text in texts:
        with torch.no_grad():
            hidden = model(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0]
        results.append(torch.nn.functional.normalize(hidden.mean(dim=0), dim=0).numpy())
    return np.stack(results)


def best_by_meaning(store, folder, source, queries, n):
    ids = ids_of(store, source)
    samples = mean_pooled(folder, texts_of(store._db, source, ids))
    query = mean_pooled(folder, texts_of(store._db, queries, ids_of(store, queries)))
    return sorted({ids[i] for row in query @ samples.T for i in np.argsort(-row)[:n]})


# --- selection -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 4, 100])
def test_only_bm25_candidates_are_sketched(large, n):
    report = large.ingest(["base"], ["large", "asked"], ["raw"], sketcher="small", candidates=n, queries="asked")
    expected = best_by_words(large, "large", "asked", n)
    assert 0 < len(expected) < 40
    assert sketched_ids(large) == expected
    assert sketched_ids(large, "asked") == ids_of(large, "asked")  # queries are never cut
    assert report.units["n_samples"].to_list() == [len(expected), 3]


@pytest.mark.parametrize("n", [1, 5])
def test_embedding_candidates_equal_numpy(large, by_meaning, encoder, n):
    large.ingest(["base"], ["large", "songs"], ["raw"], **by_meaning | {"candidates": n, "queries": "asked"})
    assert sketched_ids(large) == best_by_meaning(large, encoder, "large", "asked", n)
    assert sketched_ids(large, "songs") == best_by_meaning(large, encoder, "songs", "asked", n)
    assert len(sketched_ids(large)) < 40


def test_candidates_are_independent_of_block_size(large, by_meaning, encoder, monkeypatch):
    monkeypatch.setattr("lark_store.ingest.embeddings._ROWS_PER_BLOCK", 3)
    monkeypatch.setattr("lark_store.ingest.embeddings._ROWS_PER_COMMIT", 7)
    large.ingest(["base"], ["large"], ["raw"], **by_meaning | {"candidates": 4, "queries": "asked"})
    assert sketched_ids(large) == best_by_meaning(large, encoder, "large", "asked", 4)


def test_single_query_source_is_the_default(store):
    store.ingest(["base"], ["finetune"], ["raw"], sketcher="small", candidates=1)
    assert sketched_ids(store, "finetune") == best_by_words(store, "finetune", "test", 1)


def test_pooling_follows_the_encoders_files(large, by_meaning, encoder, tmp_path):
    folder = shutil.copytree(encoder, tmp_path / "cls")
    kinds = [{"type": f"sentence_transformers.models.{name}"} for name in ("Transformer", "Pooling", "Normalize")]
    (folder / "modules.json").write_text(json.dumps(kinds))
    (folder / "1_Pooling").mkdir()
    modes = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(modes))
    large.ingest(["base"], ["large"], ["raw"], **by_meaning | {"encoder": folder, "queries": "asked"})
    (table,) = large._db.vectors.embedding_tables()
    row = large._db.vectors.table(table).search().where("sample_id = 't00'").to_list()[0]
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        ids = tokenizer(texts_of(large._db, "large", ["t00"])[0], return_tensors="pt")["input_ids"]
        first = model(ids).last_hidden_state[0, 0]
    np.testing.assert_allclose(row["vector"], (first / first.norm()).numpy(), atol=1e-5)


# --- again, more, killed -------------------------------------------------------------------------------------------


def test_rerun_does_nothing_and_more_candidates_extend_it(large, by_meaning, monkeypatch):
    job = (["base"], ["large"], ["raw"])
    large.ingest(*job, sketcher="small", candidates=1, queries="asked")
    first = sketched_ids(large)
    again = large.ingest(*job, sketcher="small", candidates=1, queries="asked")
    assert (again.units["n_sketched"].item(), again.units["n_existing"].item()) == (0, len(first))
    more = large.ingest(*job, sketcher="small", candidates=4, queries="asked")
    assert more.units["n_existing"].item() == len(first)
    assert sketched_ids(large) == best_by_words(large, "large", "asked", 4)
    large.ingest(*job, **by_meaning | {"queries": "asked"})
    monkeypatch.setattr(Encoder, "encode", None)  # embeddings are reused
    assert large.ingest(*job, **by_meaning | {"queries": "asked"}).units["n_sketched"].item() == 0
    assert large.ingest(*job, sketcher="small").units["n_samples"].item() == 40
    assert sketched_ids(large) == ids_of(large, "large")
    assert large.coverage()["note"].drop_nulls().is_empty()


def test_only_new_samples_are_embedded(large, by_meaning, tmp_path, monkeypatch):
    large.ingest(["base"], ["large"], ["raw"], **by_meaning | {"queries": "asked"})
    large.source_add("large", write_jsonl(tmp_path / "n.jsonl", [{"id": "new", "text": "a new one"}]), stage="pretrain")
    encoded, encode = [], Encoder.encode
    monkeypatch.setattr(Encoder, "encode", lambda self, texts: (encoded.extend(texts), encode(self, texts))[1])
    large.ingest(["base"], ["large"], ["raw"], **by_meaning | {"queries": "asked"})
    assert encoded == ["a new one"]


@pytest.mark.parametrize("by", ["bm25", "embedding"])
def test_killed_ingest_resumes(large, encoder, by, tmp_path):
    rows = [{"id": f"m{i}", "text": f"text {i} of the sea and the kidney " + "night " * (i % 90)} for i in range(250)]
    large.source_add("many", write_jsonl(tmp_path / "many.jsonl", rows), stage="pretrain")
    command = [PROGRAM, "ingest", "-c", "base", "-s", "many", "--variant", "raw", "--sketcher", "small"]
    command += ["--candidates", "200", "--queries", "asked", "--by", by, "--store", store_label(large.path)]
    command += ["--encoder", encoder] if by == "embedding" else []
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < until:
        names = large._db.vectors.sketch_tables()
        if names and large._db.vectors.table(names[0]).count_rows():
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    options = {"by": by, "encoder": encoder if by == "embedding" else None}
    report = large.ingest(["base"], ["many"], ["raw"], sketcher="small", candidates=200, queries="asked", **options)
    assert report.units["n_existing"].item() > 0
    assert report.units["n_sketched"].item() > 0
    frame = large.sql("select recipe->'candidates'->>'n_chosen' as n, status from ingest_runs")
    assert frame.rows() == [(str(len(sketched_ids(large, "many"))), "done")]
    assert len(set(sketched_ids(large, "many"))) == len(sketched_ids(large, "many"))
    findings = large.db_check().filter(pl.col("severity") != "note")
    assert findings.is_empty(), findings.rows()


def test_remains_of_a_killed_removal_take_no_slot(large, by_meaning, encoder):
    options = by_meaning | {"candidates": 1, "queries": "asked"}
    large.ingest(["base"], ["large"], ["raw"], **options)
    first = sketched_ids(large)
    large._db.vectors.table("samples").delete(f"sample_id = '{first[0]}'")  # its embedding is still there
    large.ingest(["epoch-1"], ["large"], ["raw"], **options)
    assert sketched_ids(large, checkpoint="epoch-1") == best_by_meaning(large, encoder, "large", "asked", 1)


def test_two_processes_select_once_and_share_the_work(large, encoder):
    line = f"-c base -s large --variant raw --sketcher small --candidates 2 -q asked --by embedding --encoder {encoder}"
    result = launch("--no-python", PROGRAM, "ingest", *line.split(), "--store", store_label(large.path))
    assert result.code == 0, result.err
    assert sketched_ids(large) == best_by_meaning(large, encoder, "large", "asked", 2)
    assert len(embedded(large)) == 40 + 3


def test_plan_counts_candidates_and_stores_nothing(large, by_meaning):
    job = (["base"], ["large", "asked"], ["raw"])
    before = large._db.vectors.table_names()
    for options in ({"candidates": 3, "queries": "asked", "sketcher": "small"}, by_meaning | {"queries": "asked"}):
        planned = large.plan(*job, **options).units
        assert large._db.vectors.table_names() == before
        with Store.open(large.path) as reader:
            assert planned["n_samples"].to_list()[1] == len(ids_of(reader, "asked"))
    report = large.ingest(*job, **by_meaning | {"queries": "asked"})
    assert planned["n_samples"].to_list() == report.units["n_samples"].to_list()


# --- coverage ------------------------------------------------------------------------------------------------------


@pytest.fixture
def cut(large):
    large.ingest(["base"], ["finetune", "asked"], ["raw"], sketcher="small")
    large.ingest(["base"], ["large"], ["raw"], sketcher="small", candidates=3, queries="asked")
    return large


def test_answers_report_unsearched_samples(cut):
    n = len(best_by_words(cut, "large", "asked", 3))
    why = "candidates by bm25 for `asked`; the rest was not searched"
    note = f"searched {n} of 40 samples of `large` as `raw` at `base`: {why}"
    hits = cut.top("a0", checkpoint="base", sketcher="small")
    assert hits.notes == (note,)
    assert hits.how.endswith(f"\nnote: {note}")
    assert cut.top("a0", checkpoint="base", sketcher="small", sources=["finetune"]).notes == ()
    assert cut.top("a0", checkpoint="base", sketcher="small", method="bm25").notes == (note,)
    row = cut.coverage(checkpoint="base", sketcher="small").row(by_predicate=pl.col("source") == "large", named=True)
    assert (row["n_samples"], row["n_searched"], row["note"]) == (40, n, note)
    assert row["chosen"] == "candidates by bm25 for `asked`"
    assert cut.sql("select n_samples, n_sketched, chosen from coverage where chosen is not null").rows() == [
        (40, n, row["chosen"])
    ]
    shown = cut.show().sketches.filter(pl.col("source") == "large").row(0, named=True)
    assert (shown["sketches"], shown["samples"], shown["chosen"]) == (n, 40, row["chosen"])
    recipe = json.loads(cut.sql("select recipe from ingest_runs where source = 'large'").item())["candidates"]
    options = {"n": 3, "by": "bm25", "queries": "asked", "n_chosen": n, "n_samples": 40}
    assert {key: recipe[key] for key in options} == options
    assert len(recipe["corpus_sha256"]) == 64


def test_commands_report_coverage_and_uneven_comparisons(cut):
    cut.attribute(["base"], queries="asked", sketcher="small")
    arguments, place = "-c base --sketcher small", store_label(cut.path)
    n = len(best_by_words(cut, "large", "asked", 3))
    message = f"searched {n} of 40 samples of `large` as `raw` at `base`: candidates by bm25 for `asked`"
    uneven = "note: `finetune` was searched in full"
    assert message in lark(f"top a0 {arguments}", store=place).err
    for command in ("ft-pt", "metrics", "metrics --view dominance"):
        err = lark(f"{command} {arguments}", store=place).err
        assert message in err
        assert uneven in err
    assert message in lark(f"coverage {arguments}", store=place).err
    assert message in lark("db status", store=place).err
    cut.ingest(["base"], ["large"], ["raw"], sketcher="small")
    assert "searched" not in lark(f"ft-pt {arguments}", store=place).err
    assert message in lark(f"metrics {arguments}", store=place).err  # these scores are still over the candidates
    cut.attribute(["base"], queries="asked", sketcher="small")
    assert "searched" not in lark(f"metrics {arguments}", store=place).err


def test_limit_and_failed_samples_are_reported(store, tmp_path):
    store.ingest(["base"], ["test"], ["raw"], sketcher="small")
    store.ingest(["base"], ["songs"], ["raw"], sketcher="small", limit=2)
    long = {"id": "long", "prompt": "why?", "response": "because " * 200}
    store.source_add("odd", write_jsonl(tmp_path / "o.jsonl", [long, {"id": "ok", "text": "it is"}]), stage="finetune")
    store.variant_add("short", template="raw", max_length=64)
    store.ingest(["base"], ["odd"], ["short"], sketcher="small")
    hits = store.top("q100", checkpoint="base", sketcher="small")
    assert hits.notes == (
        "searched 2 of 5 samples of `songs` as `raw` at `base`: the first 2; the rest was not searched",
        "searched 1 of 2 samples of `odd` as `short` at `base`: the rest failed or was added later",
    )
    store.ingest(["base"], ["songs"], ["raw"], sketcher="small")
    assert len(store.top("q100", checkpoint="base", sketcher="small").notes) == 1


def test_all_selections_are_named(large, by_meaning):
    large.ingest(["base"], ["large"], ["raw"], sketcher="small", candidates=1, queries="asked")
    large.ingest(["base"], ["large"], ["raw"], **by_meaning)
    expected = {"candidates by bm25 for `asked`", "candidates by embedding for `test`"}
    assert set(large.coverage()["chosen"].item().split(" and ")) == expected
    assert set(large.sql("select chosen from coverage").item().split(" and ")) == expected


def test_view_equals_the_coverage_method(cut):
    method = cut.coverage().select("source", "n_samples", n_sketched="n_searched").sort("source")
    assert cut.sql("select source, n_samples, n_sketched from coverage order by source").equals(method)


# --- life of embeddings --------------------------------------------------------------------------------------------


def embedded(store):
    (name,) = store._db.vectors.embedding_tables()
    result = store._db.vectors.read(name, ["source", "sample_id"])
    return sorted(result.rows())


def test_embeddings_are_removed_with_their_samples(large, by_meaning, tmp_path):
    large.ingest(["base"], ["large", "songs"], ["raw"], **by_meaning | {"queries": "asked"})
    assert len(embedded(large)) == 40 + 5 + 3
    planned = large.sample_remove("large", ["t00", "t07"], dry_run=True)
    assert planned.filter(pl.col("kind") == "embedding")["rows"].item() == 2
    large.sample_remove("large", ["t00", "t07"])
    assert {sample for _, sample in embedded(large)}.isdisjoint({"t00", "t07"})
    large.source_remove("songs")
    assert {source for source, _ in embedded(large)} == {"large", "asked"}
    changed = write_jsonl(tmp_path / "changed.jsonl", [{"id": "t01", "text": "the kidney, the kidney, the kidney"}])
    large.source_add("large", changed, stage="pretrain", replace=True)
    assert ("large", "t01") not in embedded(large)
    large.ingest(["base"], ["large"], ["raw"], **by_meaning | {"queries": "asked"})
    assert len(embedded(large)) == 38 + 3
    assert large.db_check().is_empty()


def test_embeddings_are_checked_repaired_optimized_and_backed_up(large, by_meaning, tmp_path):
    large.ingest(["base"], ["large"], ["raw"], **by_meaning | {"queries": "asked"})
    (name,) = large._db.vectors.embedding_tables()
    table = large._db.vectors.table(name)
    table.add(table.search().where("sample_id = 't03'").to_arrow().select(table.schema.names))  # twice
    large._db.vectors.table("samples").delete("sample_id = 't05'")  # its embedding is nobody's
    findings = large.db_check().filter(where=name)
    assert set(findings["what"]) == {"duplicate key", "orphan rows", "index"}
    large.db_repair()
    assert len(embedded(large)) == len(set(embedded(large))) == 42 == 40 - 1 + 3
    assert large.db_check().filter(where=name).is_empty()
    assert name in large.db_optimize()["table"].to_list()
    assert name in Store.db_status(large.path).tables["table"].to_list()
    large.db_backup(tmp_path / "backup")
    with Store.open(tmp_path / "backup") as restored:
        assert embedded(restored) == embedded(large)


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        ({"candidates": 0, "queries": "test"}, "`candidates` must be at least 1, not 0"),
        ({"candidates": 2}, "several sources have queries"),
        ({"candidates": 2, "queries": "songs"}, "is not of stage `query`"),
        ({"candidates": 2, "queries": "test", "by": "luck"}, "can't be chosen by `luck`"),
        ({"candidates": 2, "queries": "test", "by": "embedding"}, "needs an encoder"),
        ({"candidates": 2, "queries": "test", "encoder": "x"}, 'add `by="embedding"`'),
        ({"candidates": 2, "queries": "test", "limit": 2}, "can't be combined"),
        ({"by": "bm25"}, "`by` needs `candidates`"),
        ({"queries": "test"}, "`queries` needs `candidates`"),
        ({"encoder": "x"}, "`encoder` needs `candidates`"),
    ],
)
@pytest.mark.parametrize("method", ["ingest", "plan"])
def test_conflicting_options_are_refused(large, method, options, fact):
    with pytest.raises(InputError) as error:
        getattr(large, method)(["base"], ["large"], ["raw"], sketcher="small", **options)
    assert fact in f"{error.value.fact} {error.value.hint}"
    assert large.sql("select count(*) from ingest_runs").item() == 0


def test_missing_names_are_reported(large, by_meaning, tmp_path):
    job = (["base"], ["large"], ["raw"])
    with pytest.raises(NameUnknownError, match="did you mean `asked`"):
        large.ingest(*job, **BY_WORDS | {"queries": "askd"})
    with pytest.raises(InputError, match="does not apply to query sources"):
        large.ingest(["base"], ["asked"], ["raw"], **BY_WORDS)
    with pytest.raises(CheckpointError, match="encoder can't be used: there is no checkpoint folder"):
        large.ingest(*job, **by_meaning | {"encoder": tmp_path / "none"})
    broken = shutil.copytree(by_meaning["encoder"], tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match=r"encoder `.*broken` can't be loaded"):
        large.ingest(*job, **by_meaning | {"encoder": broken})
    dense = shutil.copytree(by_meaning["encoder"], tmp_path / "dense")
    (dense / "modules.json").write_text(json.dumps([{"type": "sentence_transformers.models.Dense"}]))
    with pytest.raises(CheckpointError, match="has the unsupported module `Dense`"):
        large.ingest(*job, **by_meaning | {"encoder": dense})
    (tmp_path / "far.jsonl").write_text(json.dumps({"id": "f", "text": "xyzzy plugh"}) + "\n")
    large.source_add("far", tmp_path / "far.jsonl", stage="pretrain")
    with pytest.raises(InputError, match="no sample of `far` has a word in common"):
        large.ingest(["base"], ["far"], ["raw"], **BY_WORDS)
    assert large.sql("select count(*) from ingest_runs").item() == 0


def test_command_equals_the_method(large):
    line = "ingest -c base -s large --variant raw --sketcher small -f json"
    result = lark(f"{line} --candidates 2 -q asked", store=store_label(large.path))
    assert result.rows[0]["n_sketched"] == len(best_by_words(large, "large", "asked", 2))
    refused = lark(f"{line} --by bm25", store=store_label(large.path))
    assert refused.code == 1
    assert "hint: give the number of candidates with `--candidates N`" in refused.err
