"""Security: no code of a checkpoint runs, no path escapes, no secret is printed or stored."""

from __future__ import annotations

import json
import pickle
import re
import resource
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from helpers.checkpoints import save_checkpoint, sharded, shards_at
from helpers.program import lark
from helpers.texts import write_jsonl

from lark_store import Store
from lark_store.errors import CheckpointError, InputError, LarkStoreError, NameInvalidError, NameUnknownError, masked
from lark_store.modeling import template_limits
from lark_store.modeling.encoded import UnusableSampleError
from lark_store.modeling.rendering import Renderer, make_variant
from lark_store.modeling.sample import Sample
from lark_store.study.recipe import read as read_recipe

BREAK_IN = "import pathlib\npathlib.Path({mark!r}).touch()\nclass C: pass\nM = T = C\n"


@pytest.fixture
def folder(tmp_path, checkpoints):
    shutil.copytree(checkpoints["base"], tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


CODE = {
    "a class of its own for a model that is known": (
        "config.json",
        {"auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}},
    ),
    "a model that nobody knows": (
        "config.json",
        {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}},
    ),
    "a tokenizer of its own": (
        "tokenizer_config.json",
        {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.T", None]}},
    ),
    "a kernel from the hub": ("config.json", {"attn_implementation": "evil/kernel"}),
    "a kernel in a part": ("config.json", {"text_config": {"_attn_implementation": "evil/kernel"}}),
    "a kernel by its part": ("config.json", {"attn_implementation": {"": "evil/kernel:f"}}),
}


@pytest.mark.parametrize("name", CODE)
def test_no_code_of_a_checkpoint_is_run(store, folder, tmp_path, name):
    file, values = CODE[name]
    (folder / "evil.py").write_text(BREAK_IN.format(mark=str(tmp_path / "broken-in")))
    change(folder / file, **values)
    try:
        store.checkpoint_add("evil", folder)
        store.ingest(["evil"], ["songs"], ["raw"], sketcher="small")
    except CheckpointError:
        assert name != "a class of its own for a model that is known"  # that one is transformers' own class
    assert not (tmp_path / "broken-in").exists()
    assert not [module for module in sys.modules if module.endswith("evil")]


class Evil:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (Path(self.mark),)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "adapter_model.bin", "training_args.bin"])
def test_nothing_is_unpickled(store, folder, tmp_path, name):
    (folder / name).write_bytes(pickle.dumps(Evil(str(tmp_path / "broken-in"))))
    try:
        store.checkpoint_add("evil", folder)
        store.ingest(["evil"], ["songs"], ["raw"], sketcher="small")
    except CheckpointError:
        assert name == "model.safetensors"
    (tmp_path / "v.npy").write_bytes(pickle.dumps(Evil(str(tmp_path / "broken-in"))))
    (tmp_path / "ids.txt").write_text("sea-0\n")
    with pytest.raises(InputError, match="pickled"):
        store.sketcher_import(
            "evil", tmp_path / "v.npy", checkpoint="base", source="songs", variant="raw", ids=tmp_path / "ids.txt"
        )
    assert not (tmp_path / "broken-in").exists()


@pytest.mark.parametrize("target", ["../base/model.safetensors", "/etc/passwd", "../../../../etc/passwd", "x.bin", ""])
def test_shards_outside_of_a_checkpoint_are_refused(store, folder, target):
    sharded(shards_at(target))(folder)
    with pytest.raises(CheckpointError, match=r"not a \.safetensors file beside it"):
        store.checkpoint_add("evil", folder)


# --- templates -----------------------------------------------------------------------------------------------------

REACHING = [
    "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ ''.format.__globals__ }}",
    "{{ '{0.__class__}'.format(messages) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os }}",
    "{{ lipsum.__globals__ }}",
    "{{ messages.append(1) }}",
    "{{ raise_exception('no') }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ range(10000000) | list }}",
    "{{ 'x' * 10000000000000 }}",
    "{{ 'x' * 2000000 }}",
]
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
DOUBLING = "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
GROWING = (  # to 300 MB, held for half a second
    "{% set n = namespace(x=[]) %}{% for i in range(300) %}{% set n.x = n.x + ['x' * 1000000 ~ i] %}{% endfor %}"
    "{% for i in range(50) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
)
QA = Sample("a", "Is it?", "yes")


def renderer(where, text, folder):
    """Make a renderer of a template that is the tokenizer's own, or a file."""
    from transformers import AutoTokenizer

    (folder / "chat_template.jinja").write_text(text if where == "tokenizer" else "{{ messages }}")
    (folder / "own.jinja").write_text(text)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return Renderer(
        make_variant("v", "chatml" if where == "tokenizer" else str(folder / "own.jinja"), "auto", 64), tokenizer
    )


@pytest.mark.parametrize("where", ["tokenizer", "file"])
@pytest.mark.parametrize("text", REACHING)
def test_a_template_that_reaches_out_fails_its_sample(folder, where, text):
    with pytest.raises(UnusableSampleError, match=r"the template (fails: .|alone makes)|no target|omits") as caught:
        renderer(where, text, folder).render(QA)
    assert "root:" not in str(caught.value)


@pytest.mark.parametrize("where", ["tokenizer", "file"])
def test_a_template_without_end_is_ended(folder, monkeypatch, where):
    monkeypatch.setattr(template_limits, "SECONDS", 0.3)
    with pytest.raises(InputError, match="the template ran longer than"):
        renderer(where, ENDLESS, folder).render(QA)


def test_template_exhausting_memory_is_stopped(folder, monkeypatch):
    monkeypatch.setattr(template_limits, "BYTES", 64 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match="the template used more than 64 MiB"):
        renderer("tokenizer", DOUBLING, folder).render(QA)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 6 << 20  # KiB


def test_template_memory_is_counted_from_memory_in_use(folder, monkeypatch):
    monkeypatch.setattr(template_limits, "BYTES", 64 << 20)
    high = b"x" * (600 << 20)  # a peak far above what the template needs
    del high
    with pytest.raises(InputError, match="the template used more than 64 MiB"):
        renderer("tokenizer", GROWING, folder).render(QA)


def test_ingest_with_an_endless_template_ends_with_the_reason(store, tmp_path, monkeypatch):
    monkeypatch.setattr(template_limits, "SECONDS", 0.3)
    store.checkpoint_add("evil", save_checkpoint(tmp_path / "evil", chat_template=ENDLESS))
    result = lark("ingest -c evil -s songs --variant chatml --sketcher small", store=store.path)
    assert (result.code, "the template ran longer than" in result.err) == (1, True)
    assert store.sql("SELECT status FROM ingest_runs").item() == "failed"


# --- names, paths, archives ----------------------------------------------------------------------------------------

CLIMBING = ["..", "../x", "/etc/passwd", "a/b", ".hidden", "a\\b", "a\0b", "%2e%2e", "~", "x" * 101, "-rf", ""]


@pytest.mark.parametrize("name", CLIMBING)
def test_a_name_is_never_a_path(scored_copy, tmp_path, checkpoints, name):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a b"}])
    before = {p for p in tmp_path.rglob("*") if "locks" not in p.parts}
    for work in (
        lambda: scored_copy.source_add(name, path, stage="pretrain"),
        lambda: scored_copy.source_add(name, path, stage="pretrain", replace=True),
        lambda: scored_copy.checkpoint_add(name, checkpoints["base"]),
        lambda: scored_copy.variant_add(name, template="raw"),
        lambda: scored_copy.sketcher_add(name),
        lambda: scored_copy.snapshot_create(name),
        lambda: scored_copy.snapshot_remove(name),
    ):
        with pytest.raises(NameInvalidError, match=re.escape(f"`{name}` is not a valid name")):
            work()
    for work in (lambda: Store.open(scored_copy.path, snapshot=name), lambda: scored_copy.source_remove(name)):
        with pytest.raises(NameUnknownError, match=f"no (snapshot|source) `{re.escape(name)}`"):
            work()
    after = {p for p in tmp_path.rglob("*") if "locks" not in p.parts and not p.name.endswith(("-wal", "-shm"))}
    assert after <= before


def test_archives_in_a_dataset_folder_write_nothing_outside(store, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    (tmp_path / "evil.jsonl").write_text('{"text": "a"}\n')
    with zipfile.ZipFile(tmp_path / "data" / "train.zip", "w") as archive:
        archive.write(tmp_path / "evil.jsonl", "../../broken-in.jsonl")
        archive.write(tmp_path / "evil.jsonl", str(tmp_path / "broken-in.jsonl"))
    with tarfile.open(tmp_path / "data" / "train.tar", "w") as archive:
        archive.add(tmp_path / "evil.jsonl", "../../broken-in.jsonl")
    (tmp_path / "data" / "data.py").write_text(BREAK_IN.format(mark=str(tmp_path / "broken-in.jsonl")))
    with pytest.raises(InputError, match="Dataset scripts are no longer supported"):
        store.source_add("evil", tmp_path / "data", stage="pretrain", split="train")
    assert list(tmp_path.rglob("broken-in*")) == []


def test_export_replaces_a_link_not_its_target(scored, tmp_path):
    (tmp_path / "kept.csv").write_text("mine")
    (tmp_path / "out.csv").symlink_to(tmp_path / "kept.csv")
    scored.export("sources", tmp_path / "out.csv", overwrite=True)
    assert (tmp_path / "kept.csv").read_text() == "mine"


# --- secrets -------------------------------------------------------------------------------------------------------

SECRETS = [
    "hf://user:s3cret@datasets/x",
    "s3://AKIA:s3cret@bucket/x.jsonl",
    "https://user:s3cret@host/x.jsonl",
    "https://s3cret@host/x",
    "https://host/x.csv?token=s3cret",
    "https://host/x.csv?a=1&X-Amz-Signature=s3cret&b=2",
    "postgresql://user:p@s3cret@host/db",
    "https:/user:s3cret@h",
]


@pytest.mark.parametrize("uri", SECRETS)
def test_a_secret_in_a_url_is_never_printed_or_kept(scored_copy, uri):
    commands = [
        f"source add leak '{uri}' --stage pretrain",
        f"source add leak '{uri}' --stage pretrain --split train",
        f"checkpoint add leak '{uri}'",
        f"variant add leak --template '{uri}'",
        f"export sources '{uri}'",
        f"sketcher import leak '{uri}' -c base -s songs --variant raw",
        f"sql --file '{uri}'",
        f"top --file '{uri}' -c base --sketcher small",
        f"show --store '{uri}'",
        f"db status --store '{uri}'",
        f"study run '{uri}'",
    ]
    for command in commands:
        result = lark(command, store=scored_copy.path)
        assert result.code in {1, 2}, command
        assert "s3cret" not in result.out, command
        assert "s3cret" not in result.err, command
    kept = b"".join(p.read_bytes() for p in scored_copy.path.rglob("*") if p.is_file())
    assert b"s3cret" not in kept


@pytest.mark.parametrize("uri", SECRETS)
def test_a_recipe_with_a_secret_is_refused_before_it_is_kept(tmp_path, uri):
    sources = "".join(
        f'[[source]]\nname = "{stage}"\nstage = "{stage}"\nuri = "a.jsonl"\n'
        for stage in ("finetune", "pretrain", "query")
    )
    recipe = tmp_path / "study.toml"
    recipe.write_text(f'[model]\npath = "{uri}"\n[finetune]\nlearning_rates = [1e-4]\n{sources}')
    with pytest.raises(InputError, match="a password or token") as caught:
        read_recipe(recipe)
    assert "s3cret" not in str(caught.value)


def test_a_failed_runs_reason_has_no_secret(scored_copy, monkeypatch):
    def broken(*_args, **_options):
        raise RuntimeError("can't reach https://user:s3cret@host/x with hf_abcdefghijklmnopqrstuvwxyz")

    monkeypatch.setattr("lark_store.ingest.worker.UnitRun._sketch", broken)
    scored_copy.sketcher_add("other", k=256)
    with pytest.raises(RuntimeError, match="can't reach"):
        scored_copy.ingest(["base"], ["songs"], ["raw"], sketcher="other")
    [reason] = scored_copy.sql("SELECT error FROM ingest_runs WHERE sketcher = 'other'")["error"]
    assert reason == "RuntimeError: can't reach https://***@host/x with hf_***"


@pytest.mark.parametrize(
    "text", ["a@b.c", "row 3: x@y", "s3://bucket/x@2", "https://host/a?page=2", "`C:/x/y@z`", "q: a/b@c"]
)
def test_nonsecrets_are_shown_unchanged(text):
    assert masked(text) == text
    assert str(LarkStoreError(text)) == text
