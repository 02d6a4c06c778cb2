"""The recipe: parsing, validation and error messages."""

from __future__ import annotations

import copy
import json
import re
import tomllib

import pytest
from helpers.checkpoints import save_tokenizer
from transformers import AutoTokenizer

from lark_store import Store
from lark_store.errors import InputError, StoreExistsError
from lark_store.modeling.sample import Sample
from lark_store.study import recipe as recipes
from lark_store.study.pipeline import _changes, _with_defaults
from lark_store.study.render import add_variants, renderer_of

MINIMAL = """
[model]
path = "model"
[finetune]
learning_rates = [1e-3, 1e-4]
[[source]]
name = "finetune"
stage = "finetune"
uri = "qa.jsonl"
[[source]]
name = "test"
stage = "query"
uri = "qa.jsonl"
[[source]]
name = "medical"
stage = "pretrain"
uri = "medical.jsonl"
"""


def read(tmp_path, text):
    path = tmp_path / "tiny.toml"
    path.write_text(text, encoding="utf-8")
    return recipes.read(path)


def test_minimal_recipe_gets_defaults(tmp_path):
    recipe = read(tmp_path, MINIMAL)
    assert (recipe.title, recipe.root, recipe.store) == ("tiny", tmp_path / "tiny", tmp_path / "tiny" / "lark.store")
    assert recipe.checkpoints == ["base", "epoch-1", "epoch-2"]
    assert (recipe.against, recipe.epoch, recipe.queries.name) == ("medical", 2, "test")
    assert (recipe.sketch.k, recipe.compare.methods, recipe.evaluate) == (
        65_536,
        ["cosine", "bm25-okapi", "bm25"],
        None,
    )


def test_paths_are_relative_to_the_recipe_and_hub_names_stay(tmp_path, monkeypatch):
    (tmp_path / "qa.jsonl").touch()
    recipe = read(tmp_path, MINIMAL)
    monkeypatch.chdir("/")
    assert recipe.place("qa.jsonl") == str(tmp_path / "qa.jsonl")
    assert recipe.place("qiaojin/PubMedQA") == "qiaojin/PubMedQA"
    assert recipe.place("lost.jsonl") == str(tmp_path / "lost.jsonl")
    monkeypatch.chdir(tmp_path.parent)
    (tmp_path.parent / "here").mkdir(exist_ok=True)
    assert recipe.place("here") == str(tmp_path / "here"), "what lies where the command runs is not the recipe's"


@pytest.mark.parametrize(
    ("change", "message", "hint"),
    [
        (("learning_rates", "learning_rate"), r"`finetune.learning_rate`: unknown key.*", "`learning_rates`"),
        (('path = "model"', ""), r"`model.path`: Field required", "every key explained"),
        (("1e-4]", "7.0]"), "learning rates must be between 0 and 1", "every key explained"),
        (('stage = "query"', 'stage = "finetune"'), "one source of stage `finetune`, but this one has 2", "explained"),
        (('stage = "pretrain"', 'stage = "query"'), "one source of stage `query`, but this one has 2", "explained"),
        (('name = "test"', 'name = "finetune"'), "two sources have the same name", "explained"),
        (('name = "test"', 'name = "Test Set"'), r"`source.2.name`: `Test Set` is not a valid name", "try `test-set`"),
        (('name = "medical"', 'name = "medical"\nvariants = ["rwa"]'), "no format variant `rwa`", "explained"),
        (("[finetune]", "[compare]\nagainst = 'songs'\n[finetune]"), "`songs`, which is not a source", "explained"),
        (("[finetune]", "[compare]\nepoch = 3\n[finetune]"), "`compare.epoch` is 3, but there are 2", "explained"),
        (("[finetune]", "[compare]\nmethods = ['bm25']\n[finetune]"), "must have `cosine`", "explained"),
        (('stage = "query"', 'stage = "query"\nchoose = "bm25"'), "similarity to themselves", "explained"),
        (("[model]", "[model"), "is not valid TOML: ", "study init"),
        (("[finetune]", "[finetune]\nmicro_batch_size = 3"), "multiple of `micro_batch_size`", "explained"),
        (("[model]", "seed = 4294967296\n[model]"), "`seed`: Input should be less than", "explained"),
        (("[finetune]", "[sketch]\nseed = -1\n[finetune]"), r"`sketch\.seed`: Input should be", "explained"),
        (("[finetune]", "[sketch]\nprecision = 'fp8'\n[finetune]"), r"`sketch\.precision`: Input", "explained"),
        (("[finetune]", "[evaluate]\nlabels = ['a', 'a']\n[finetune]"), "labels have `a` twice", "explained"),
        (("[finetune]", "[evaluate]\nlabels = ['a', ' b']\n[finetune]"), "without surrounding space", "explained"),
        (('name = "medical"', 'name = "medical"\nvariants = ["raw", "raw"]'), "`raw` twice", "explained"),
        (('name = "medical"', 'name = "evaluation"'), "no source can be named `evaluation`", "explained"),
        (('name = "medical"', 'name = "medical"\ncolumns = {txet = "a"}'), "`txet`; the fields", "explained"),
        (("[[source]]", "[[variant]]\nname = 'raw'\ntemplate = 'x'\n[[source]]"), "have `raw` twice", "explained"),
    ],
)
def test_a_wrong_recipe_is_refused_with_its_key_and_a_hint(tmp_path, change, message, hint):
    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path, MINIMAL.replace(*change, 1))
    assert hint in str(caught.value)


def test_missing_and_binary_recipes_are_refused(tmp_path):
    with pytest.raises(InputError, match="can't be read: No such file") as caught:
        recipes.read(tmp_path / "none.toml")
    assert "study init" in caught.value.hint
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="is not valid TOML"):
        recipes.read(tmp_path / "bytes.toml")


def test_recipe_without_suffix_collides_with_its_folder(tmp_path):
    (tmp_path / "tiny").write_text(MINIMAL, encoding="utf-8")
    with pytest.raises(InputError, match="it is a file") as caught:
        recipes.read(tmp_path / "tiny")
    assert ".toml" in caught.value.hint


def test_init_writes_the_reference_recipe_once(tmp_path):
    result = recipes.init(tmp_path / "pubmedqa.toml")
    recipe = recipes.read(result)
    assert recipe.finetune.learning_rates == [2e-4, 2e-4, 2e-4, 2e-5, 2e-5]
    assert [source.samples for source in recipe.source] == [500] * 4
    with pytest.raises(StoreExistsError, match="exists already"):
        recipes.init(result)
    with pytest.raises(InputError, match="can't be written"):
        recipes.init(tmp_path / "no" / "folder.toml")


def test_commented_lines_of_the_reference_recipe_are_valid_keys(tmp_path):
    text = recipes.TEMPLATE.read_text(encoding="utf-8")
    lines = [re.sub(r"^# (?=[\w\[]+(?: = |\]))", "", line) for line in text.splitlines()]
    assert sum(a != b for a, b in zip(lines, text.splitlines(), strict=True)) >= 15
    values = tomllib.loads("\n".join(lines))
    assert values["truth"] == {"column": "fact"}
    assert read(tmp_path, "\n".join(lines)).finetune.micro_batch_size == 1


def test_identity_covers_everything_affecting_sketches(tmp_path):
    recipe = read(tmp_path, MINIMAL)
    other = read(tmp_path, f"title = 'other'\ndevice = 'cpu'\n[compare]\nmethods = ['cosine']\n{MINIMAL}")
    assert other.identity == recipe.identity
    assert read(tmp_path, f"seed = 1\n{MINIMAL}").identity != recipe.identity


def test_recipe_of_an_older_version_equals_the_same_recipe_with_later_keys(tmp_path):
    recipe = read(tmp_path, MINIMAL + '[[variant]]\nname = "own"\ntargets = "text"\n')
    identity = json.loads(json.dumps(recipe.identity))
    older = copy.deepcopy(identity)
    for key in ("dtype", "correction", "damping", "power", "min_ndim", "mask_template"):
        del older["sketch"][key]
    del older["variant"][0]["question"], older["variant"][0]["labels"]
    assert _with_defaults(older) == identity
    older["sketch"]["seed"] = 7
    assert _changes(_with_defaults(older), identity) == ["sketch.seed"]
    gone = identity | {"of-no-version": 1}
    assert _with_defaults(gone) == gone


def test_all_settings_of_the_sketcher_and_of_a_variant_reach_the_store(tmp_path):
    settings = 'dtype = "float32"\ncorrection = "adam2"\ndamping = 0.5\nmin_ndim = 2\nmask_template = true\n'
    formatted = '[[variant]]\nname = "formatted"\ntargets = "predicted-answer"\nquestion = "So?"\nmax_answer = 5\n'
    recipe = read(tmp_path, MINIMAL + formatted + f"[sketch]\n{settings}")
    with Store.create(tmp_path / "lark.store") as store:
        info = store.sketcher_add("study", **recipe.sketch.sketcher)
        add_variants(store, recipe)
        assert (info.dtype, info.correction, info.damping, info.min_ndim, info.positions) == (
            *("float32", "adam2", 0.5, 2),
            "content",
        )
        (answers,) = store.sql("select answers from variants where name = 'formatted'").row(0)
    assert json.loads(answers) == {
        "prompt": "Context: {document}\n\nQuestion: {question}",
        "question": "So?",
        "question_column": None,
        "labels": [],
        "max_answer": 5,
    }
    save_tokenizer(tmp_path)
    renderer = renderer_of(recipe, "formatted", AutoTokenizer.from_pretrained(tmp_path), None)
    assert renderer.prompt(Sample("a", text="The sea.")).max_tokens == 5
