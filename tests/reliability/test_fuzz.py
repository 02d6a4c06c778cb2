"""Any bytes end in a result or in an error of ours: readers, checkpoints, adapters, imports, recipes, SQL.

`LARK_FUZZ=N` tries N times as many examples as the suite does.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import itertools
import json
import os

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.texts import text_rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lark_store import Store
from lark_store.errors import InputError, LarkStoreError
from lark_store.ingest.vector_formats import open_vectors
from lark_store.modeling.checkpoints import examine
from lark_store.modeling.encoded import UnusableSampleError
from lark_store.modeling.forms.rows import make_sample
from lark_store.modeling.lora import find_adapters
from lark_store.modeling.rendering import Renderer, make_variant
from lark_store.modeling.sample import Sample
from lark_store.readers import read_rows
from lark_store.study.recipe import read as read_recipe

TIMES = int(os.environ.get("LARK_FUZZ", "1"))
NUMBERS = itertools.count()


def tried(n):
    return settings(
        max_examples=n * TIMES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=TIMES == 1
    )


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def damaged(draw, whole):
    """Bytes of a whole file with some of them changed, put in or taken out."""
    data = bytearray(draw(st.sampled_from(whole)))
    for _ in range(draw(st.integers(1, 4))):
        position = draw(st.integers(0, max(0, len(data) - 1)))
        change = draw(st.sampled_from(["change", "cut", "insert", "remove"]))
        if change == "cut":
            del data[position:]
        elif change == "insert":
            data[position:position] = draw(
                st.binary(max_size=6) | st.sampled_from([b"[" * 2000, b"9" * 5000, b"\0", b'"', b"\xff\xfe"])
            )
        else:
            data[position : position + draw(st.integers(1, 8))] = (
                b"" if change == "remove" else draw(st.binary(min_size=1, max_size=8))
            )
    return bytes(data)


def parquet(rows):
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file, compression="none")
    return file.getvalue()


def ipc(rows, writer):
    file = io.BytesIO()
    table = pa.Table.from_pylist(rows)
    with writer(file, table.schema) as batches:
        batches.write_table(table)
    return file.getvalue()


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


TEXTS = [*text_rows(3), {"id": "x", "text": 'quoted "é" 漢', "year": 2020, "nested": [{"a": None}]}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in TEXTS).encode()
TABLE = b'id,text\n1,"a, b"\n2,"c\nd"\n3,e\n'
VECTORS = [{"sample_id": f"sea-{i}", "vector": [1.0, 2.0, 3.0], "loss": 0.5} for i in range(5)]
WHOLE = {
    ".jsonl": [LINES],
    ".csv": [TABLE],
    ".tsv": [TABLE.replace(b",", b"\t")],
    ".parquet": [parquet(TEXTS), parquet(VECTORS)],
    ".json": [json.dumps(TEXTS, ensure_ascii=False).encode(), json.dumps({"data": TEXTS}).encode()],
    ".arrow": [ipc(TEXTS, pa.ipc.new_file), ipc(TEXTS, pa.ipc.new_stream)],
    ".jsonl.gz": [gzip.compress(LINES)],
    ".jsonl.zst": [pa.compress(LINES, codec="zstd", asbytes=True)],
}


@pytest.mark.parametrize("suffix", WHOLE)
@tried(40)
@given(st.data())
def test_any_file_is_rows_or_an_input_error(tmp_path_factory, suffix, data):
    path = tmp_path_factory.getbasetemp() / f"fuzz{suffix}"
    path.write_bytes(data.draw(st.binary(max_size=200) | damaged(WHOLE[suffix])))
    with contextlib.suppress(InputError):
        for row in read_rows(str(path)):
            make_sample(row, {})


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # numpy leaves a broken file open
@tried(60)
@given(st.binary(max_size=100) | damaged([npy(np.ones((5, 3), np.float32)), npy(np.ones((2, 2)).T)]))
def test_any_array_imports_or_is_an_input_error(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    (folder / "ids.txt").write_text("a\nb\nc\nd\ne\n")
    (folder / "fuzz.npy").write_bytes(data)
    with contextlib.suppress(InputError):
        opened = open_vectors(folder / "fuzz.npy", "auto", folder / "ids.txt")
        assert sum(len(block.vectors) for block in opened.read(np.ones(len(opened.ids), bool))) == 5


@tried(60)
@given(damaged([parquet(VECTORS)]))
def test_any_parquet_imports_or_is_an_input_error(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "vectors.parquet"
    path.write_bytes(data)
    with contextlib.suppress(InputError):
        opened = open_vectors(path, "auto", None)
        list(opened.read(np.ones(len(opened.ids), bool)))


INFO = {"num_grads": 5, "grad_sizes": {"a": 2, "b": 1}, "base_dtype": "float32"}


@tried(40)
@given(
    st.fixed_dictionaries({key: st.just(value) | json_values for key, value in INFO.items()}).map(json.dumps)
    | st.text()
)
def test_bergson_index_without_rows_is_an_input_error(tmp_path_factory, text):
    folder = tmp_path_factory.getbasetemp() / "bergson"
    folder.mkdir(exist_ok=True)
    (folder / "info.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    (folder / "gradients.bin").write_bytes(bytes(7))
    with pytest.raises(
        InputError, match=r"info\.json` is not in the format of bergson|does not have the \d+ rows in info\.json"
    ):
        open_vectors(folder, "bergson", None)


@pytest.fixture(scope="module")
def bent(checkpoints, tmp_path_factory):
    """A checkpoint's folder that `Renderer` and `examine` see with one file changed."""
    folder = tmp_path_factory.mktemp("bent")
    for file in checkpoints["base"].iterdir():
        (folder / file.name).symlink_to(file)
    return folder


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "adapter_config.json"])
@tried(40)
@given(st.data())
def test_any_config_is_a_checkpoint_or_an_error_of_ours(bent, checkpoints, name, data):
    known = {
        "config.json": {"model_type": "llama", "attn_implementation": "sdpa", "text_config": {}},
        "model.safetensors.index.json": {"weight_map": {"a": "model.safetensors", "b": "../model.safetensors"}},
        "adapter_config.json": {
            "peft_type": "LORA",
            "base_model_name_or_path": "x",
            "target_modules": ["a", 1],
            "revision": 3,
        },
    }[name]
    objects = st.fixed_dictionaries({key: st.just(value) | json_values for key, value in known.items()})
    content = data.draw(
        objects.map(lambda o: json.dumps(o).encode()) | damaged([json.dumps(known).encode()]) | st.binary()
    )
    weights = bent / "model.safetensors"
    if name == "model.safetensors.index.json":
        weights.unlink(missing_ok=True)
        (bent / "model-1.safetensors").touch()
    (bent / name).unlink(missing_ok=True)
    (bent / name).write_bytes(content)
    (bent / "adapter_model.safetensors").touch()
    try:
        with contextlib.suppress(LarkStoreError):
            find_adapters(bent)
            examine(str(bent))
    finally:
        (bent / name).unlink()
        (bent / "adapter_model.safetensors").unlink()
        if name == "config.json":
            (bent / name).symlink_to(checkpoints["base"] / name)
        if not weights.exists():
            weights.symlink_to(checkpoints["base"] / weights.name)
            (bent / "model-1.safetensors").unlink()


RECIPE = b"""
folder = "out"
[model]
path = "model"
[finetune]
learning_rates = [2e-4]
[[source]]
name = "ft"
stage = "finetune"
uri = "ft.jsonl"
[[source]]
name = "pt"
stage = "pretrain"
uri = "pt.jsonl"
[[source]]
name = "q"
stage = "query"
uri = "~nobody-of-this-name/q.jsonl"
"""


@tried(80)
@given(damaged([RECIPE, RECIPE + b"[truth]\ncolumn = 'a'\n"]) | st.binary(max_size=60))
def test_any_recipe_parses_or_is_an_input_error(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzz.toml"
    path.write_bytes(data)
    with contextlib.suppress(InputError):
        read_recipe(path)


@pytest.fixture(scope="module")
def tokenizer(checkpoints):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(checkpoints["base"])


JINJA = [
    "{{ prompt }}",
    "{{ response }}",
    "{{ text }}",
    "{% for m in messages %}",
    "{% endfor %}",
    "{{ m.content }}",
    "{% if",
    "%}",
    "{{",
    "}}",
]
JINJA += [
    "{{ prompt.__class__ }}",
    "{{ cycler }}",
    "{{ ''.join }}",
    "{{ 1/0 }}",
    "{{ namespace() }}",
    "{% endif %}",
    "x",
    "\n",
    "{# #}",
]
SAMPLES = [{"prompt": "is it?", "response": "yes"}, {"text": "a song"}, {"prompt": "", "response": ""}]


@tried(60)
@given(st.lists(st.sampled_from(JINJA), max_size=6).map("".join) | st.text(max_size=20), st.sampled_from(SAMPLES))
def test_any_template_renders_or_fails_the_sample(tokenizer, tmp_path_factory, template, parts):
    path = tmp_path_factory.getbasetemp() / "fuzz.jinja"
    path.write_text(template, encoding="utf-8", errors="ignore")
    with contextlib.suppress(InputError, UnusableSampleError):
        Renderer(make_variant("fuzz", str(path), "auto", 64), tokenizer, 64).render(Sample("a", **parts))


# --- SQL -----------------------------------------------------------------------------------------------------------

VIEWS = ["samples", "sketches", "influence", "checkpoints", "ingest_runs", "_samples", "_checkpoint", "sources"]
FILES = [
    "read_text('{secret}')",
    "read_csv('{secret}')",
    "'{secret}'",
    "glob('{folder}/*')",
    "read_blob(['{secret}'])",
    "sniff_csv('{secret}')",
]
FILES += [
    "read_parquet('http://127.0.0.1:9/x')",
    "'s3://a/b.parquet'",
    "query('FROM read_text(''{secret}'')')",
    "sqlite_scan('{catalog}', 'source')",
]
words = st.sampled_from(
    [
        "1",
        "NULL",
        "'a'",
        "text",
        "source",
        "score",
        "count(*)",
        "getenv('HOME')",
        "n_tokens",
        "*",
        "x.text",
        "$1",
        "[1, 2]",
        "{{'a': 1}}",
    ]
)
outside = st.sampled_from(FILES)
tables = st.deferred(lambda: st.sampled_from(VIEWS) | outside | selects.map(lambda s: f"({s})"))
terms = st.deferred(
    lambda: (
        words
        | st.builds(
            "({0} {2} {1})".format, terms, terms, st.sampled_from(["+", "=", "<", "||", "AND", "LIKE", "IN", "->>"])
        )
        | st.builds(
            "{1}({0})".format,
            terms,
            st.sampled_from(["sum", "length", "try", "list", "struct_pack", "unnest", "error", "lower"]),
        )
        | selects.map(lambda s: f"({s})")
        | selects.map(lambda s: f"EXISTS ({s})")
    )
)
selects = st.deferred(
    lambda: st.builds(
        "SELECT {0} FROM {1} x {2}".format,
        terms,
        tables,
        st.sampled_from(
            ["", "LIMIT 3", "WHERE source = 'a'", "ORDER BY 1", "GROUP BY ALL", "QUALIFY true", "USING SAMPLE 2"]
        ),
    )
)
CHANGES = [
    "COPY ({0}) TO '{{folder}}/out.csv'",
    "CREATE TABLE t AS {0}",
    "INSERT INTO _samples {0}",
    "ATTACH '{{catalog}}' AS c; {0}",
    "{0}; {0}",
]
CHANGES += [
    "EXPLAIN ANALYZE COPY ({0}) TO '{{folder}}/out.csv'",
    "SET VARIABLE a = ({0})",
    "WITH t AS ({0}) FROM t",
    "DESCRIBE {0}",
    "EXPLAIN {0}",
]
CHANGES += [
    "PREPARE p AS {0}",
    "CREATE MACRO m() AS TABLE {0}",
    "EXPORT DATABASE '{{folder}}/out'",
    "INSTALL httpfs; {0}",
    "LOAD '{{secret}}'",
]
statements = selects | st.builds(lambda change, select: change.format(select), st.sampled_from(CHANGES), selects)


@pytest.fixture(scope="module")
def places(scored_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("outside")
    (folder / "secret.csv").write_text("word\nabracadabra\n", encoding="utf-8")
    return {"secret": folder / "secret.csv", "folder": folder, "catalog": scored_path / "catalog.sqlite"}


def seen(places, scored_path):
    files = [p for root in (places["folder"], scored_path) for p in root.rglob("*") if p.is_file()]
    kept = [p for p in files if not p.name.endswith(("-wal", "-shm"))]
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in kept}


@pytest.fixture(scope="module")
def opened(scored_path):
    with Store.open(scored_path) as store:
        yield store


@tried(30)
@given(statements)
def test_no_sql_reads_writes_or_reaches_anything_else(opened, scored_path, places, statement):
    query = statement
    for name, value in places.items():
        query = query.replace(f"{{{name}}}", str(value))
    before = seen(places, scored_path)
    try:
        answer = str(opened.sql(query, timeout=5, memory="256MB", max_rows=20).rows())
    except LarkStoreError as error:
        answer = str(error)
    assert "abracadabra" not in answer
    assert "root:" not in answer
    assert seen(places, scored_path) == before


@tried(20)
@given(terms)
def test_no_condition_reads_writes_or_reaches_anything_else(opened, scored_path, places, condition):
    for name, value in places.items():
        condition = condition.replace(f"{{{name}}}", str(value))
    before = seen(places, scored_path)
    try:
        answer = str(opened.top("q100", checkpoint="base", sketcher="small", k=2, where=condition).frame.rows())
    except LarkStoreError as error:
        answer = str(error)
    assert "abracadabra" not in answer
    assert seen(places, scored_path) == before


def test_grammar_detects_a_disabled_sandbox(places):
    """The same statements do read the secret where nothing holds them in."""
    query = f"SELECT content FROM read_text('{places['secret']}') x"
    assert "abracadabra" in str(duckdb.connect().sql(query).fetchall())
