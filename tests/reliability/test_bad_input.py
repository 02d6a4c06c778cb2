"""Bad input, a full disk, no permission, a wrong clock, signals: docs/reliability.md has it line by line."""

from __future__ import annotations

import bz2
import contextlib
import datetime as dt
import gzip
import io
import json
import lzma
import os
import shutil
import signal
import sqlite3
import subprocess
import time
import zipfile

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers.checkpoints import save_tokenizer, sharded
from helpers.program import PROGRAM, lark
from helpers.stores import store_label
from helpers.texts import qa_rows, text_rows, write_jsonl
from helpers.users import run_as_nobody

from lark_store import Store
from lark_store.errors import CheckpointError, InputError, LarkStoreError, StoreError
from lark_store.modeling.sample import Sample
from lark_store.schema.faults import fault_of


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """A store of no sources, at the command line's door."""
    with Store.create(tmp_path_factory.mktemp("shelf") / "lark.store") as store:
        yield store


# --- files ---------------------------------------------------------------------------------------------------------

GOOD = b'{"id": "a", "text": "good"}\n'


def zipped():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("../../evil.jsonl", GOOD)
    return file.getvalue()


def table(**columns):
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    return file.getvalue()


FAR = pa.array([2**62], pa.timestamp("us"))
FILES = {
    "truncated": ("a.jsonl", GOOD + b'{"id": "b", "te', "line 2, is not JSON"),
    "UTF-16": ("a.jsonl", GOOD.decode().encode("utf-16"), "is not UTF-8: line 1, byte 1"),
    "UTF-16 without a mark": ("a.jsonl", GOOD.decode().encode("utf-16-le"), "line 1, is not JSON"),
    "UTF-16 CSV": ("a.csv", "id,text\n1,a\n".encode("utf-16-le"), "a row needs"),
    "Latin-1": ("a.jsonl", '{"text": "é"}'.encode("latin-1"), "is not UTF-8"),
    "gzip": ("a.jsonl", gzip.compress(GOOD), "is compressed with gzip"),
    "gzip as CSV": ("a.csv", gzip.compress(GOOD), "is compressed with gzip"),
    "UTF-32": ("a.jsonl", GOOD.decode().encode("utf-32"), "is not UTF-8: line 1, byte 1"),
    "bzip2": ("a.jsonl", bz2.compress(GOOD), "is compressed with bzip2"),
    "xz": ("a.csv", lzma.compress(GOOD), "is compressed with xz"),
    "zstd": ("a.jsonl", b"\x28\xb5\x2f\xfd" + bytes(50), "is compressed with zstd"),
    "zip": ("a.jsonl", zipped(), "is a zip archive"),
    "zip as Parquet": ("a.parquet", zipped(), "is a zip archive"),
    "null bytes": ("a.jsonl", b'{"id": "a\0b", "text": "x"}\n', "Invalid control character"),
    "binary": ("a.jsonl", b"SQLite format 3\0" + bytes(100), "is not JSON"),
    "quote without end": ("a.csv", b'id,text\n1,"never closed\n2,b\n3,c\n', "unexpected end of data"),
    "a column twice": ("a.csv", b"id,text,text\n1,a,b\n", "two columns named `text`"),
    "a column twice, Parquet": (
        "a.parquet",
        lambda path: pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 2, ["text", "text"]), path),
        "two columns named `text`",
    ),
    "a year of 140,000": ("a.parquet", table(text=["a"], at=FAR), "can't be read: date value out of range"),
    "nested in place of text": ("a.jsonl", b'{"text": {"a": "b"}}\n', "column `text` holds a dict"),
    "a list as id": ("a.jsonl", b'{"id": [1, 2], "text": "x"}\n', "column `id` holds list `[1, 2]`, not an id"),
    "a column missing later": ("a.jsonl", GOOD + b'{"id": "b"}\n', "row 2: a row needs"),
    "Parquet cut off": ("a.parquet", table(text=["x" * 99] * 99)[:-9], "can't be read"),
    "Parquet without columns": ("a.parquet", lambda path: pq.write_table(pa.table({}), path), "holds no samples"),
    "empty": ("a.jsonl", b"", "holds no samples"),
    "a link to itself": ("a.jsonl", lambda path: path.symlink_to(path), "there is no file"),
    "a link to a file of the system": ("a.jsonl", lambda path: path.symlink_to("/etc/passwd"), "is not JSON"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_bad_file_adds_nothing_and_says_why(shelf, tmp_path, name):
    file, content, fact = FILES[name]
    path = tmp_path / file
    content(path) if callable(content) else path.write_bytes(content)
    result = lark(f"source add bad {path} --stage pretrain", store=shelf.path)
    assert (result.code, result.out) == (1, "")
    assert fact in result.err
    assert "hint: " in result.err
    assert shelf.sql("SELECT count(*) FROM samples").item() == shelf.sql("SELECT count(*) FROM sources").item() == 0


def test_a_damaged_dataset_folder_is_an_input_error(shelf, tmp_path):
    datasets.Dataset.from_dict({"text": ["a" * 100, "b" * 100] * 100}).save_to_disk(tmp_path / "d")
    [file] = (tmp_path / "d").glob("*.arrow")
    data = bytearray(file.read_bytes())
    data[600:700] = b"\xff" * 100
    file.write_bytes(data)
    with pytest.raises(InputError, match="can't be read as a dataset"):
        shelf.source_add("bad", tmp_path / "d", stage="pretrain")


IDS = [
    "it's",
    'a"b',
    "new\nline",
    "sla/sh",
    "../../etc/passwd",
    "é漢🙂",
    "a\\b",
    "a\\'b",
    "%s",
    "x" * 5000,
    "--",
    "NULL",
]
IDS += ["'; DROP TABLE samples; --", "$1", "{x}", "\u202e", "a\0b", "a;b"]


def test_any_id_is_stored_sketched_found_and_removed(store, tmp_path):
    rows = [{"id": name, "text": f"a song {i} of the sea"} for i, name in enumerate(IDS)]
    assert store.source_add("odd", write_jsonl(tmp_path / "odd.jsonl", rows), stage="pretrain").n_added == len(IDS)
    assert store.ingest(["base"], ["odd", "test"], ["raw"], sketcher="small").n_failed == 0
    store.attribute(["base"], queries="test", sources=["odd"], sketcher="small")
    assert set(store.top("q100", checkpoint="base", sketcher="small", k=99, sources=["odd"]).frame["sample_id"]) == set(
        IDS
    )
    for name in IDS:
        assert store.variant_show("raw", sample=name, source="odd").sample_id == name
        assert store.sql("SELECT count(*) FROM influence WHERE sample_id = ?", [name]).item() == 4
    for name in IDS:
        assert store.sample_remove("odd", [name])["rows"].sum() > 0
    assert store.sql("SELECT count(*) FROM samples WHERE source = 'odd'").item() == 0
    assert store.sql("SELECT count(*) FROM sketches WHERE source = 'odd'").item() == 0


def test_numbers_become_text_and_a_row_of_one_token_is_a_failure(store, tmp_path):
    rows = [{"id": 1, "text": 55555}, {"id": "1.5", "text": True}, {"id": "x", "text": "a"}]
    store.source_add("odd", write_jsonl(tmp_path / "odd.jsonl", rows), stage="pretrain")
    report = store.ingest(["base"], ["odd"], ["raw"], sketcher="small")
    assert set(store.sql("SELECT sample_id FROM samples WHERE source = 'odd'")["sample_id"]) == {"1", "1.5", "x"}
    assert report.failures.select("sample_id", "reason").rows() == [("x", "no target token under the rule `auto`")]
    result = lark("ingest -c base -s odd --variant raw --sketcher small", store=store.path)
    assert (result.code, "x: no target token" in result.err) == (1, True)


def test_a_row_of_ten_million_characters_is_added_and_cut_to_the_models_context(store, tmp_path):
    rows = [{"id": "big", "text": "the sea " * 1_250_000}, {"id": "next", "text": "the train"}]
    store.source_add("big", write_jsonl(tmp_path / "big.jsonl", rows), stage="pretrain")
    [row] = store.sql("SELECT length(text) AS n FROM samples WHERE sample_id = 'big'")["n"]
    assert row == 10_000_000  # with the space at its end
    store.sample_remove("big", ["big"])
    write_jsonl(tmp_path / "big.jsonl", [{"id": "big", "text": "the sea " * 125_000}])
    store.source_add("big", tmp_path / "big.jsonl", stage="pretrain")
    assert store.ingest(["base"], ["big"], ["raw"], sketcher="small").n_failed == 0
    assert store.sql("SELECT n_tokens FROM sketches WHERE sample_id = 'big'").item() == 256


def test_long_rows_are_written_in_small_batches(monkeypatch):
    from lark_store.ingest import sources

    monkeypatch.setattr(sources, "_CHUNK_CHARACTERS", 100)
    samples = (Sample(str(i), text="x" * 60) for i in range(5))
    assert [len(chunk) for chunk in sources._chunks(samples)] == [2, 2, 1]


# --- checkpoints ---------------------------------------------------------------------------------------------------


def config(**changes):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def content(name, data):
    def change(folder):
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(data)

    return change


def other(kind, **shape):
    def change(folder):
        import transformers

        (folder / "model.safetensors").unlink()
        config = getattr(transformers, f"{kind}Config")(**shape)
        torch.manual_seed(0)
        model = {"Bert": "BertForMaskedLM", "T5": "T5ForConditionalGeneration", "ViT": "ViTModel"}[kind]
        getattr(transformers, model)(config).save_pretrained(folder)

    return change


def loop(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("model.safetensors")


def pickled(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def only(name):
    return lambda folder: [path.unlink() for path in folder.iterdir() if path.name != name]


def slow_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}))


LITTLE = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
CHECKPOINTS = {
    "an empty folder": (only(""), "has no config.json"),
    "a config that is no JSON": (content("config.json", b"{"), "config.json` is not JSON"),
    "a config that is a list": (content("config.json", b"[]"), "config.json` is not a JSON object"),
    "a config that is no UTF-8": (content("config.json", b'{"a": "\xff"}'), "config.json` is not JSON"),
    "a config in 100,000 brackets": (content("config.json", b"[" * 100_000), "config.json` is not JSON"),
    "a config with a huge number": (content("config.json", b'{"a": %s}' % (b"9" * 5000)), "config.json` is not JSON"),
    "an impossible config": (config(hidden_size=-4), "does not describe a usable model"),
    "an encoder": (other("Bert", **LITTLE, max_position_embeddings=128), "is not causal"),
    "an encoder and decoder": (
        other("T5", vocab_size=384, d_model=64, d_kv=16, d_ff=64),
        "does not describe a usable model",
    ),
    "a vision model": (
        other("ViT", hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64),
        "does not describe a usable model",
    ),
    "weights cut off": (lambda f: os.truncate(f / "model.safetensors", 1000), "can't be loaded"),
    "empty weights": (content("model.safetensors", b""), "can't be loaded"),
    "a header of 2^63 bytes": (
        content("model.safetensors", (1 << 63).to_bytes(8, "little") + b"{}"),
        "can't be loaded",
    ),
    "weights that are a link to themselves": (loop, "Too many levels of symbolic links"),
    "pickled weights alone": (pickled, "has no .safetensors file"),
    "a shard missing": (sharded(lambda f: min(f.glob("model-*")).unlink()), "lacks the shard `model-00001-of-"),
    "an index that is no JSON": (sharded(content("model.safetensors.index.json", b"{")), "index.json` is not JSON"),
    "an index without a map": (sharded(content("model.safetensors.index.json", b"{}")), "without a `weight_map`"),
    "a tokenizer that is no JSON": (content("tokenizer.json", b"{"), "tokenizer in"),
    "a tokenizer cut off": (lambda f: os.truncate(f / "tokenizer.json", 500), "tokenizer in"),
    "a slow tokenizer": (slow_tokenizer, "does not map tokens to characters"),
}


@pytest.fixture
def folder(tmp_path, checkpoints):
    shutil.copytree(checkpoints["base"], tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_bad_checkpoint_is_refused_when_added_or_ingested(store, folder, name):
    change, fact = CHECKPOINTS[name]
    change(folder)
    result = lark(f"checkpoint add bad {folder}", store=store.path)
    if result.code == 0:
        result = lark("ingest -c bad -s songs --variant raw --sketcher small", store=store.path)
    assert (result.code, result.out) == (1, "")
    assert fact in result.err
    assert "hint: " in result.err
    assert store.sql("SELECT count(*) FROM ingest_runs").item() == 0


def test_a_refused_checkpoint_spoils_no_ingest_of_another(store, folder):
    CHECKPOINTS["weights cut off"][0](folder)
    store.checkpoint_add("bad", folder)
    with pytest.raises(CheckpointError):
        store.ingest(["bad"], ["songs"], ["raw"], sketcher="small")
    assert store.ingest(["base"], ["songs"], ["raw"], sketcher="small").n_failed == 0


@pytest.mark.parametrize("path", ["x" * 300, "no/such", "a\0b", "", "../no"])
def test_invalid_checkpoint_path_is_an_error(store, path):
    with pytest.raises(CheckpointError):
        store.checkpoint_add("bad", path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_fail_every_sample(store, folder, value):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 3] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    store.checkpoint_add("bad", folder)
    report = store.ingest(["bad"], ["songs"], ["raw"], sketcher="small")
    assert (report.n_failed, report.units["n_sketched"].item()) == (5, 0)
    assert set(report.failures["reason"]) == {"the gradient is not finite (loss nan, norm nan)"}


def without_pad(folder):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "pad_token"}))


@pytest.mark.parametrize("change", [sharded(), without_pad, lambda f: save_tokenizer(f, chat_template=None)])
def test_shards_and_tokenizers_without_pad_token_or_template_give_the_same_sketches(store, folder, change):
    change(folder)
    store.checkpoint_add("other", folder)
    store.ingest(["base", "other"], ["finetune"], ["chatml"], sketcher="small")
    losses = store.sql("SELECT sample_id, list(DISTINCT round(loss, 5)) AS losses FROM sketches GROUP BY ALL")
    assert [len(values) for values in losses["losses"]] == [1] * 6


# --- a full disk ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """A disk of 40 MB."""
    folder = tmp_path_factory.mktemp("disk")
    command = ["mount", "-t", "tmpfs", "-o", "size=40m", "none", folder]
    completed = subprocess.run(command, capture_output=True, check=False)
    if completed.returncode:
        pytest.skip("this machine lets nobody mount a small disk")
    yield folder
    subprocess.run(["umount", folder], check=True)  # noqa: S607


@pytest.fixture(scope="module")
def small_disk(disk, scored_path, tmp_path_factory):
    """A scored store on the small disk, with a wide sketcher, and files too large for the disk."""
    texts = tmp_path_factory.mktemp("texts")
    shutil.copytree(scored_path, disk / "lark.store")
    big = write_jsonl(
        texts / "big.jsonl", [{"id": f"{i}", "text": f"{i} {os.urandom(2000).hex()}"} for i in range(12_000)]
    )
    with Store.open(disk / "lark.store") as store:
        store.sketcher_add("wide", k=65_536)
        store.source_add("more", write_jsonl(texts / "more.jsonl", text_rows(20, "harbour")), stage="pretrain")
        store.source_add("asked", write_jsonl(texts / "asked.jsonl", qa_rows(3, 300)), stage="query")
        store.ingest(["base"], ["asked"], ["chatml"], sketcher="small")
        yield store, big


COUNTS = "SELECT (SELECT count(*) FROM samples), (SELECT count(*) FROM sketches), (SELECT count(*) FROM influence)"
FIRST = "SELECT min(sample_id) FROM samples WHERE source = 'songs'"
FULL = {
    "source add": lambda store, big: store.source_add("big", big, stage="pretrain"),
    "ingest": lambda store, _: store.ingest(["base"], ["more"], ["raw"], sketcher="wide"),
    "attribute": lambda store, _: store.attribute(["base"], queries="asked", sketcher="small"),
    "db optimize": lambda store, _: store.db_optimize(keep_versions_days=0),
    "snapshot create": lambda store, _: store.snapshot_create("full"),
    "index build": lambda store, _: store.index_build("small"),
    "sample remove": lambda store, _: store.sample_remove("songs", [store.sql(FIRST).item()]),
    "variant add": lambda store, _: store.variant_add("full", template="raw"),
    "export parquet": lambda store, _: store.export("samples", store.path.parent / "out.parquet"),
    "export csv": lambda store, _: store.export("samples", store.path.parent / "out.csv"),
    "export jsonl": lambda store, _: store.export("samples", store.path.parent / "out.jsonl"),
    "init": lambda store, _: Store.create(store.path.parent / "new.store"),
}


IN_STEPS = {"attribute", "sample remove"}  # commits in steps


@pytest.mark.parametrize("left", [0, 60_000])
@pytest.mark.parametrize("work", FULL)
@pytest.mark.folder
def test_a_full_disk_is_a_clear_error_and_a_rerun_resumes(small_disk, work, left):
    store, big = small_disk
    before = store.sql(COUNTS).row(0)
    ballast = store.path.parent / "ballast"
    room = os.statvfs(store.path)
    ballast.write_bytes(bytes(room.f_bavail * room.f_frsize - left))
    fact = None
    try:
        FULL[work](store, big)
    except LarkStoreError as error:
        fact = str(error)
    finally:
        ballast.unlink()
    assert (fact is None and left > 0) or ("o space left on" in fact and "hint: " in fact)
    assert [path for path in store.path.parent.iterdir() if path.name.startswith(".")] == []
    if fact is not None:
        with Store.open(store.path) as again:
            assert work in IN_STEPS or again.sql(COUNTS).row(0) == before
            if work not in {"source add", "ingest"}:
                FULL[work](again, big)
    for path in store.path.parent.glob("[on]*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if "full" in store.snapshot_list()["name"]:
        store.snapshot_remove("full")


@pytest.mark.folder
def test_ingest_resumes_after_a_full_disk(small_disk):
    store, _ = small_disk
    with contextlib.suppress(StoreError):
        FULL["ingest"](store, None)
    report = store.ingest(["base"], ["more"], ["raw"], sketcher="wide")
    assert report.units["n_existing"].item() + report.units["n_sketched"].item() == 20
    assert store.sql("SELECT count(*), count(DISTINCT sample_id) FROM sketches WHERE sketcher = 'wide'").row(0) == (
        20,
        20,
    )
    runs = store.sql("SELECT status, error FROM ingest_runs WHERE sketcher = 'wide'").rows()
    assert [status for status, _ in runs] == ["done"] * len(runs)


# --- no permission -------------------------------------------------------------------------------------------------


@pytest.mark.folder
def test_a_store_of_somebody_else_is_refused_with_the_reason(open_to_all):
    code, out, err = run_as_nobody("show", open_to_all / "lark.store", open_to_all)
    assert (code, out) == (1, "")
    assert "can't be opened: permission denied" in err
    assert "backup" not in err
    (open_to_all / "lark.store").chmod(0o700)
    assert run_as_nobody("show", open_to_all / "lark.store", open_to_all)[2] == err


@pytest.mark.folder
def test_parts_of_a_store_without_permission_are_one_error(open_to_all):
    for path in [open_to_all / "lark.store", *(open_to_all / "lark.store").rglob("*")]:
        os.chown(path, 65534, 65534)
    (open_to_all / "lark.store" / "vectors" / "samples.lance" / "data").chmod(0)
    code, out, err = run_as_nobody("show", open_to_all / "lark.store", open_to_all)
    assert (code, out) == (1, "")
    assert "can't be read or written: permission denied" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("error", "fact"),
    [
        (OSError(28, "No space left on device"), "no space left on the disk"),
        (RuntimeError("lance error: LanceError(IO): No space left on device (os error 28), x.rs:1"), "no space left"),
        (PermissionError(13, "Permission denied", "/x"), "`/x` can't be read or written: permission denied"),
        (sqlite3.OperationalError("attempt to write a readonly database"), "permission denied"),
        (sqlite3.OperationalError("database is locked"), "the catalog is locked by other processes"),
        (sqlite3.DatabaseError("database disk image is malformed"), "the catalog is damaged"),
        (OSError(24, "Too many open files"), "too many open files"),
    ],
)
def test_system_errors_become_own_errors(error, fact):
    result = fault_of(error)
    assert fact in result.fact
    assert result.hint
    assert fault_of(ValueError("a bug of ours")) is None


# --- the clock -----------------------------------------------------------------------------------------------------


def test_a_clock_that_goes_back_changes_no_answer(tmp_path, checkpoints, texts, monkeypatch):
    """Two stores, one made while the clock went back: the order of runs, and the last one, are the same."""
    from helpers.stores import fill_store

    results = {}
    for name, step in (("forward", 1), ("back", -1)):
        times = iter(dt.datetime(2026, 1, 1, tzinfo=dt.UTC) + step * dt.timedelta(hours=i) for i in range(10_000))
        for module in ("schema.catalog", "ingest.writer", "ingest.ingest_runs", "query.answers.score_runs"):
            monkeypatch.setattr(f"lark_store.{module}.now", lambda times=times: next(times))
        for column in ("checkpoint", "source", "format_variant", "sketcher"):
            from lark_store.schema.catalog import METADATA

            default = METADATA.tables[column].c.created_at.default
            monkeypatch.setattr(default, "arg", lambda _context, times=times: next(times))
        with Store.create(tmp_path / name) as store:
            fill_store(store, {}, texts)
            for epoch in checkpoints:
                store.checkpoint_add(epoch, checkpoints[epoch])  # no epoch: their order is all there is
            for _ in range(2):
                store.ingest(list(checkpoints), ["finetune", "test", "songs"], ["chatml"], sketcher="small")
                store.attribute(list(checkpoints), queries="test", sketcher="small")
            row = store.show()
            results[name] = (
                [frame["name"].to_list() for frame in (row.checkpoints, row.sources, row.variants, row.sketchers)],
                store.metrics(sketcher="small", view="comparisons").rows(),
                store.top("q100", checkpoint="base", sketcher="small").frame.rows(),
                store.variant_show("chatml", sample="q0").marked,
            )
    assert results["back"] == results["forward"]


# --- signals -------------------------------------------------------------------------------------------------------


class InterruptedAt:
    """Raise KeyboardInterrupt at the n-th progress report."""

    def __init__(self, n):
        self.n = n

    def __call__(self, _progress):
        self.n -= 1
        if self.n == 0:
            raise KeyboardInterrupt


WORK = {
    "ingest": lambda store, bar: store.ingest(["base"], ["songs", "test"], ["raw"], sketcher="small", on_progress=bar),
    "attribute": lambda store, bar: store.attribute(["base"], queries="asked", sketcher="small", on_progress=bar),
    "db optimize": lambda store, bar: store.db_optimize(keep_versions_days=0, on_progress=bar),
    "index build": lambda store, bar: store.index_build("small", on_progress=bar),
}


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("work", WORK)
def test_work_that_was_interrupted_is_done_by_the_same_command(scored_copy, tmp_path, work, step):
    scored_copy.source_add("asked", write_jsonl(tmp_path / "asked.jsonl", qa_rows(3, 300)), stage="query")
    scored_copy.ingest(["base"], ["asked"], ["chatml"], sketcher="small")
    before = scored_copy.sql(COUNTS).row(0)
    with contextlib.suppress(KeyboardInterrupt):
        WORK[work](scored_copy, InterruptedAt(step))
    assert scored_copy.sql(COUNTS).row(0) >= before
    WORK[work](scored_copy, None)
    statuses = scored_copy.sql("SELECT status FROM ingest_runs UNION ALL SELECT status FROM score_runs")["status"]
    assert set(statuses) <= {"done", "interrupted", "superseded"}
    assert scored_copy.sql(
        "SELECT count(*) = count(DISTINCT (checkpoint, source, variant, sample_id)) FROM sketches"
    ).item()


def started(*words, store):
    before = [signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT,)]
    process = subprocess.Popen(
        [PROGRAM, *words],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"LARK_STORE": store_label(store)},
    )
    signal.signal(signal.SIGINT, *before)
    return process


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]
)
def test_a_signal_while_a_source_is_read_ends_with_its_status_and_the_next_add_completes_it(
    store, tmp_path, number, code, word
):
    os.mkfifo(tmp_path / "slow.jsonl")
    process = started("source", "add", "slow", str(tmp_path / "slow.jsonl"), "--stage", "pretrain", store=store.path)
    with (tmp_path / "slow.jsonl").open("w", encoding="utf-8") as pipe:  # opens once the program reads
        pipe.writelines(json.dumps(row) + "\n" for row in text_rows(5000))
        pipe.flush()
        time.sleep(1)
        process.send_signal(number)
        time.sleep(1)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (code, "")
    assert err.endswith(f"{word}\n\nhint: finished work is saved; run the command again to resume\n")
    assert "Traceback" not in err
    rows = write_jsonl(tmp_path / "rows.jsonl", text_rows(5000))
    assert store.source_add("slow", rows, stage="pretrain").n_read == 5000
    assert store.sql("SELECT count(*), count(DISTINCT sample_id) FROM samples WHERE source = 'slow'").row(0) == (
        5000,
        5000,
    )


def test_an_ingest_that_is_terminated_commits_its_rows_and_resumes(store, tmp_path):
    rows = [{"id": f"{i}", "text": f"A song about the sea and the night train, number {i}. " * 4} for i in range(200)]
    store.source_add("many", write_jsonl(tmp_path / "many.jsonl", rows), stage="pretrain")
    process = started("ingest", "-c", "base", "-s", "many", "--variant", "raw", "--sketcher", "small", store=store.path)
    until = time.monotonic() + 120
    while time.monotonic() < until:
        if store.sql("SELECT max(n_sketched) FROM ingest_runs").item():
            break
        time.sleep(0.2)
    process.terminate()
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err.split("\n\nhint")[0].endswith("terminated")) == (143, True)
    [(status, n)] = store.sql("SELECT status, n_sketched FROM ingest_runs").rows()
    assert (status, 64 <= n < 200) == ("interrupted", True)
    store.ingest(["base"], ["many"], ["raw"], sketcher="small")
    assert store.sql("SELECT count(*), count(DISTINCT sample_id) FROM sketches").row(0) == (200, 200)
