"""Candidates first: what is nearest to the queries is sketched, and the store knows what was never looked at."""

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
from conftest import named, save_tokenizer, write_jsonl
from test_cli import lark
from test_ingest import PROGRAM
from test_ranks import launch
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

from lark_store import Store
from lark_store.errors import CheckpointError, InputError, NameUnknownError
from lark_store.ingest.encoders import Encoder
from lark_store.query.lexical import open_lexical, texts_of

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
    asked = [{"id": f"a{i}", "prompt": f"what of the {thing}?", "response": "no"} for i, thing in enumerate(THINGS[:3])]
    store.source_add("asked", write_jsonl(tmp_path / "asked.jsonl", asked), stage="query")
    return store


def sketched(store, source="large", checkpoint="base"):
    found = store.sql("select sample_id from sketches where source = ? and checkpoint = ?", [source, checkpoint])
    return sorted(found["sample_id"])


def ids_of(store, source):
    return store.sql("select sample_id from samples where source = ? order by all", [source])["sample_id"].to_list()


def best_by_words(store, source, queries, n):
    """The union of each query's n best of a source by BM25, of equal ones the first ids, and none that scores 0."""
    lexical = open_lexical(store._db, "bm25")
    found = set()
    for text in texts_of(store._db, queries, ids_of(store, queries)):
        frame = lexical.documents.with_columns(score=pl.Series(lexical.scores([text])[0]))
        of = frame.filter(pl.col("source") == source, pl.col("score") > 0)
        found |= set(of.sort(["score", "sample_id"], descending=[True, False]).head(n)["sample_id"])
    return sorted(found)


def mean_pooled(folder, texts):
    """Each text's vector, one text at a time: the mean of its tokens' last hidden states, of norm 1."""
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    made = []
    for text in texts:
        with torch.no_grad():
            hidden = model(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0]
        made.append(torch.nn.functional.normalize(hidden.mean(dim=0), dim=0).numpy())
    return np.stack(made)


def best_by_meaning(store, folder, source, queries, n):
    ids = ids_of(store, source)
    samples = mean_pooled(folder, texts_of(store._db, source, ids))
    asked = mean_pooled(folder, texts_of(store._db, queries, ids_of(store, queries)))
    return sorted({ids[i] for row in asked @ samples.T for i in np.argsort(-row)[:n]})


# --- what is chosen ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 4, 100])
def test_the_nearest_by_words_are_sketched_and_nothing_else(large, n):
    report = large.ingest(["base"], ["large", "asked"], ["raw"], sketcher="small", candidates=n, queries="asked")
    wanted = best_by_words(large, "large", "asked", n)
    assert 0 < len(wanted) < 40
    assert sketched(large) == wanted
    assert sketched(large, "asked") == ids_of(large, "asked")  # queries are never cut
    assert report.units["n_samples"].to_list() == [len(wanted), 3]


@pytest.mark.parametrize("n", [1, 5])
def test_the_nearest_by_meaning_are_those_of_plain_numpy(large, by_meaning, encoder, n):
    large.ingest(["base"], ["large", "songs"], ["raw"], **by_meaning | {"candidates": n, "queries": "asked"})
    assert sketched(large) == best_by_meaning(large, encoder, "large", "asked", n)
    assert sketched(large, "songs") == best_by_meaning(large, encoder, "songs", "asked", n)
    assert len(sketched(large)) < 40


def test_the_nearest_do_not_depend_on_how_vectors_come_in_blocks(large, by_meaning, encoder, monkeypatch):
    monkeypatch.setattr("lark_store.ingest.embeddings._ROWS_PER_BLOCK", 3)
    monkeypatch.setattr("lark_store.ingest.embeddings._ROWS_PER_COMMIT", 7)
    large.ingest(["base"], ["large"], ["raw"], **by_meaning | {"candidates": 4, "queries": "asked"})
    assert sketched(large) == best_by_meaning(large, encoder, "large", "asked", 4)


def test_the_only_queries_need_not_be_named(store):
    store.ingest(["base"], ["finetune"], ["raw"], sketcher="small", candidates=1)
    assert sketched(store, "finetune") == best_by_words(store, "finetune", "test", 1)


def test_a_pooling_is_what_the_encoders_own_files_say(large, by_meaning, encoder, tmp_path):
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


def test_the_same_again_does_nothing_and_more_adds_what_is_missing(large, by_meaning, monkeypatch):
    job = (["base"], ["large"], ["raw"])
    large.ingest(*job, sketcher="small", candidates=1, queries="asked")
    first = sketched(large)
    again = large.ingest(*job, sketcher="small", candidates=1, queries="asked")
    assert (again.units["n_sketched"].item(), again.units["n_existing"].item()) == (0, len(first))
    more = large.ingest(*job, sketcher="small", candidates=4, queries="asked")
    assert more.units["n_existing"].item() == len(first)
    assert sketched(large) == best_by_words(large, "large", "asked", 4)
    large.ingest(*job, **by_meaning | {"queries": "asked"})
    monkeypatch.setattr(Encoder, "encode", None)  # what is embedded is never embedded again
    assert large.ingest(*job, **by_meaning | {"queries": "asked"}).units["n_sketched"].item() == 0
    assert large.ingest(*job, sketcher="small").units["n_samples"].item() == 40
    assert sketched(large) == ids_of(large, "large")
    assert large.coverage()["note"].drop_nulls().is_empty()


def test_only_new_samples_are_embedded(large, by_meaning, tmp_path, monkeypatch):
    large.ingest(["base"], ["large"], ["raw"], **by_meaning | {"queries": "asked"})
    large.source_add("large", write_jsonl(tmp_path / "n.jsonl", [{"id": "new", "text": "a new one"}]), stage="pretrain")
    encoded, encode = [], Encoder.encode
    monkeypatch.setattr(Encoder, "encode", lambda self, texts: (encoded.extend(texts), encode(self, texts))[1])
    large.ingest(["base"], ["large"], ["raw"], **by_meaning | {"queries": "asked"})
    assert encoded == ["a new one"]


@pytest.mark.parametrize("by", ["bm25", "embedding"])
def test_an_ingest_killed_goes_on_where_it_was(large, encoder, by, tmp_path):
    rows = [{"id": f"m{i}", "text": f"text {i} of the sea and the kidney " + "night " * (i % 90)} for i in range(250)]
    large.source_add("many", write_jsonl(tmp_path / "many.jsonl", rows), stage="pretrain")
    command = [PROGRAM, "ingest", "-c", "base", "-s", "many", "--variant", "raw", "--sketcher", "small"]
    command += ["--candidates", "200", "--queries", "asked", "--by", by, "--store", named(large.path)]
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
    assert frame.rows() == [(str(len(sketched(large, "many"))), "done")]
    assert len(set(sketched(large, "many"))) == len(sketched(large, "many"))
    findings = large.db_check().filter(pl.col("severity") != "note")
    assert findings.is_empty(), findings.rows()


def test_what_a_removal_that_was_killed_left_takes_nobodys_place(large, by_meaning, encoder):
    how = by_meaning | {"candidates": 1, "queries": "asked"}
    large.ingest(["base"], ["large"], ["raw"], **how)
    first = sketched(large)
    large._db.vectors.table("samples").delete(f"sample_id = '{first[0]}'")  # its embedding is still there
    large.ingest(["epoch-1"], ["large"], ["raw"], **how)
    assert sketched(large, checkpoint="epoch-1") == best_by_meaning(large, encoder, "large", "asked", 1)


def test_two_processes_choose_once_and_share_the_work(large, encoder):
    line = f"-c base -s large --variant raw --sketcher small --candidates 2 -q asked --by embedding --encoder {encoder}"
    result = launch("--no-python", PROGRAM, "ingest", *line.split(), "--store", named(large.path))
    assert result.code == 0, result.err
    assert sketched(large) == best_by_meaning(large, encoder, "large", "asked", 2)
    assert len(embedded(large)) == 40 + 3


def test_a_plan_counts_what_the_ingest_takes_and_keeps_nothing(large, by_meaning):
    job = (["base"], ["large", "asked"], ["raw"])
    before = large._db.vectors.table_names()
    for how in ({"candidates": 3, "queries": "asked", "sketcher": "small"}, by_meaning | {"queries": "asked"}):
        planned = large.plan(*job, **how).units
        assert large._db.vectors.table_names() == before
        with Store.open(large.path) as reader:
            assert planned["n_samples"].to_list()[1] == len(ids_of(reader, "asked"))
    report = large.ingest(*job, **by_meaning | {"queries": "asked"})
    assert planned["n_samples"].to_list() == report.units["n_samples"].to_list()


# --- what the store knows ------------------------------------------------------------------------------------------


@pytest.fixture
def cut(large):
    large.ingest(["base"], ["finetune", "asked"], ["raw"], sketcher="small")
    large.ingest(["base"], ["large"], ["raw"], sketcher="small", candidates=3, queries="asked")
    return large


def test_every_answer_says_what_was_never_looked_at(cut):
    n = len(best_by_words(cut, "large", "asked", 3))
    why = "candidates by bm25 for `asked`; the rest was never looked at"
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
    how = {"n": 3, "by": "bm25", "queries": "asked", "n_chosen": n, "n_samples": 40}
    assert {key: recipe[key] for key in how} == how
    assert len(recipe["corpus_sha256"]) == 64


def test_the_commands_say_so_too_and_that_a_comparison_is_uneven(cut):
    cut.attribute(["base"], queries="asked", sketcher="small")
    at, place = "-c base --sketcher small", named(cut.path)
    n = len(best_by_words(cut, "large", "asked", 3))
    said = f"searched {n} of 40 samples of `large` as `raw` at `base`: candidates by bm25 for `asked`"
    uneven = "note: of `finetune` all was searched"
    assert said in lark(f"top a0 {at}", store=place).err
    for command in ("ft-pt", "metrics", "metrics --view dominance"):
        err = lark(f"{command} {at}", store=place).err
        assert said in err
        assert uneven in err
    assert said in lark(f"coverage {at}", store=place).err
    assert said in lark("db status", store=place).err
    cut.ingest(["base"], ["large"], ["raw"], sketcher="small")
    assert "searched" not in lark(f"ft-pt {at}", store=place).err
    assert said in lark(f"metrics {at}", store=place).err  # these scores are still over the candidates
    cut.attribute(["base"], queries="asked", sketcher="small")
    assert "searched" not in lark(f"metrics {at}", store=place).err


def test_a_limit_and_failed_samples_are_told_too(store, tmp_path):
    store.ingest(["base"], ["test"], ["raw"], sketcher="small")
    store.ingest(["base"], ["songs"], ["raw"], sketcher="small", limit=2)
    long = {"id": "long", "prompt": "why?", "response": "because " * 200}
    store.source_add("odd", write_jsonl(tmp_path / "o.jsonl", [long, {"id": "ok", "text": "it is"}]), stage="finetune")
    store.variant_add("short", template="raw", max_length=64)
    store.ingest(["base"], ["odd"], ["short"], sketcher="small")
    hits = store.top("q100", checkpoint="base", sketcher="small")
    assert hits.notes == (
        "searched 2 of 5 samples of `songs` as `raw` at `base`: the first 2; the rest was never looked at",
        "searched 1 of 2 samples of `odd` as `short` at `base`: the rest failed, or came later",
    )
    store.ingest(["base"], ["songs"], ["raw"], sketcher="small")
    assert len(store.top("q100", checkpoint="base", sketcher="small").notes) == 1


def test_several_choices_are_all_named(large, by_meaning):
    large.ingest(["base"], ["large"], ["raw"], sketcher="small", candidates=1, queries="asked")
    large.ingest(["base"], ["large"], ["raw"], **by_meaning)
    wanted = {"candidates by bm25 for `asked`", "candidates by embedding for `test`"}
    assert set(large.coverage()["chosen"].item().split(" and ")) == wanted
    assert set(large.sql("select chosen from coverage").item().split(" and ")) == wanted


def test_the_view_counts_what_the_method_counts(cut):
    method = cut.coverage().select("source", "n_samples", n_sketched="n_searched").sort("source")
    assert cut.sql("select source, n_samples, n_sketched from coverage order by source").equals(method)


# --- what becomes of embeddings ------------------------------------------------------------------------------------


def embedded(store):
    (name,) = store._db.vectors.embedding_tables()
    found = store._db.vectors.read(name, ["source", "sample_id"])
    return sorted(found.rows())


def test_embeddings_go_with_their_samples(large, by_meaning, tmp_path):
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


def test_embeddings_are_checked_mended_optimized_and_kept_like_other_tables(large, by_meaning, tmp_path):
    large.ingest(["base"], ["large"], ["raw"], **by_meaning | {"queries": "asked"})
    (name,) = large._db.vectors.embedding_tables()
    table = large._db.vectors.table(name)
    table.add(table.search().where("sample_id = 't03'").to_arrow().select(table.schema.names))  # twice
    large._db.vectors.table("samples").delete("sample_id = 't05'")  # its embedding is nobody's
    found = large.db_check().filter(where=name)
    assert set(found["what"]) == {"duplicate key", "orphan rows", "index"}
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
        ({"candidates": 0, "queries": "test"}, "0 candidates leave nothing to do"),
        ({"candidates": 2}, "candidates of which queries"),
        ({"candidates": 2, "queries": "songs"}, "has not the stage `query`"),
        ({"candidates": 2, "queries": "test", "by": "luck"}, "not chosen by `luck`"),
        ({"candidates": 2, "queries": "test", "by": "embedding"}, "need an encoder"),
        ({"candidates": 2, "queries": "test", "encoder": "x"}, "give `--by embedding`"),
        ({"candidates": 2, "queries": "test", "limit": 2}, "both say what is taken"),
        ({"by": "bm25"}, "`--by` says how candidates are chosen"),
        ({"queries": "test"}, "`--queries` says how candidates are chosen"),
        ({"encoder": "x"}, "`--encoder` says how candidates are chosen"),
    ],
)
@pytest.mark.parametrize("method", ["ingest", "plan"])
def test_options_that_make_no_sense_are_refused(large, method, options, fact):
    with pytest.raises(InputError) as error:
        getattr(large, method)(["base"], ["large"], ["raw"], sketcher="small", **options)
    assert fact in f"{error.value.fact} {error.value.hint}"
    assert large.sql("select count(*) from ingest_runs").item() == 0


def test_what_is_not_there_is_named(large, by_meaning, tmp_path):
    job = (["base"], ["large"], ["raw"])
    with pytest.raises(NameUnknownError, match="did you mean `asked`"):
        large.ingest(*job, **BY_WORDS | {"queries": "askd"})
    with pytest.raises(InputError, match="queries are always taken whole"):
        large.ingest(["base"], ["asked"], ["raw"], **BY_WORDS)
    with pytest.raises(CheckpointError, match="encoder can't be used: there is no checkpoint folder"):
        large.ingest(*job, **by_meaning | {"encoder": tmp_path / "none"})
    broken = shutil.copytree(by_meaning["encoder"], tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match=r"encoder `.*broken` can't be loaded"):
        large.ingest(*job, **by_meaning | {"encoder": broken})
    dense = shutil.copytree(by_meaning["encoder"], tmp_path / "dense")
    (dense / "modules.json").write_text(json.dumps([{"type": "sentence_transformers.models.Dense"}]))
    with pytest.raises(CheckpointError, match="has a module `Dense`"):
        large.ingest(*job, **by_meaning | {"encoder": dense})
    (tmp_path / "far.jsonl").write_text(json.dumps({"id": "f", "text": "xyzzy plugh"}) + "\n")
    large.source_add("far", tmp_path / "far.jsonl", stage="pretrain")
    with pytest.raises(InputError, match="no sample of `far` has a word in common"):
        large.ingest(["base"], ["far"], ["raw"], **BY_WORDS)
    assert large.sql("select count(*) from ingest_runs").item() == 0


def test_the_command_line_is_the_method(large):
    line = "ingest -c base -s large --variant raw --sketcher small -f json"
    result = lark(f"{line} --candidates 2 -q asked", store=named(large.path))
    assert result.rows[0]["n_sketched"] == len(best_by_words(large, "large", "asked", 2))
    refused = lark(f"{line} --by bm25", store=named(large.path))
    assert refused.code == 1
    assert "hint: say how many with `--candidates N`" in refused.err
