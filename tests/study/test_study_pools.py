"""Pools: drawn samples, their order, and refusals."""

from __future__ import annotations

import json
import math
from collections import Counter

import pytest
from helpers.texts import qa_rows, text_rows, write_jsonl

from lark_store import Store
from lark_store.errors import InputError
from lark_store.modeling.sample import Sample
from lark_store.study import pools
from lark_store.study import recipe as recipes

RECIPE = """
[model]
path = "model"
[finetune]
learning_rates = [1e-3]
[evaluate]
labels = ["yes", "no", "maybe"]
samples = 9
[[source]]
name = "finetune"
stage = "finetune"
uri = "qa.jsonl"
samples = 6
[[source]]
name = "test"
stage = "query"
uri = "qa.jsonl"
skip = 6
samples = 4
[[source]]
name = "medical"
stage = "pretrain"
uri = "medical.jsonl"
samples = 5
choose = "bm25"
[[source]]
name = "songs"
stage = "pretrain"
uri = "songs.jsonl"
samples = 5
choose = "random"
"""
ORGANS = [
    "the kidney",
    "a song about organ 77",
    "affected: organ 66 is affected, affected",
    "seen 88 times at sea",
    "a question",
    "organ 99 and kidney 77",
    "no such thing",
]


def lucene(documents, queries, k1=1.5, b=0.75):
    """Score documents by BM25 in Lucene's form, in plain Python."""
    texts = pools.words(documents)
    mean = sum(map(len, texts)) / len(texts)
    has = Counter(word for text in texts for word in set(text))
    idf = {word: math.log(1 + (len(texts) - n + 0.5) / (n + 0.5)) for word, n in has.items()}

    def score(query_tokens, text):
        count = Counter(text)
        long = k1 * (1 - b + b * len(text) / mean)
        return sum(idf[word] * count[word] / (count[word] + long) for word in query_tokens if count[word])

    return [[score(query_tokens, text) for text in texts] for query_tokens in pools.words(queries)]


@pytest.fixture
def place(tmp_path):
    rows = [{**row, "context": f"{row['context']} {11 * i} times."} for i, row in enumerate(qa_rows(20))]
    write_jsonl(tmp_path / "qa.jsonl", rows)
    write_jsonl(tmp_path / "medical.jsonl", [{"id": f"m{i}", "text": text} for i, text in enumerate(ORGANS)])
    write_jsonl(tmp_path / "songs.jsonl", text_rows(30))
    return tmp_path


def recipe(place, *changes, name="tiny"):
    text = RECIPE
    for change in changes:
        assert change[0] in text
        text = text.replace(*change)
    path = place / f"{name}.toml"
    path.write_text(text, encoding="utf-8")
    return recipes.read(path)


def ids(path):
    return [sample.sample_id for sample in pools.read(path)]


def test_the_first_rows_after_the_skipped_ones(place):
    paths = pools.build(recipe(place))
    assert ids(paths["finetune"]) == [f"q{i}" for i in range(6)]
    assert ids(paths["test"]) == [f"q{i}" for i in range(6, 10)]
    assert ids(paths["evaluation"]) == [f"q{i}" for i in range(6, 15)]


def test_random_draw_depends_on_the_seed_and_is_no_prefix(place):
    first, again = (ids(pools.build(recipe(place, name=name))["songs"]) for name in ("one", "two"))
    other = ids(
        pools.build(recipe(place, ("[model]", "[model]"), ("\n[model]", "seed = 1\n[model]"), name="x"))["songs"]
    )
    assert first == again != other
    assert first != [f"sea-{i}" for i in range(5)]
    assert len(set(first)) == 5


def test_bm25_draw_takes_each_querys_best_in_turn(place):
    paths = pools.build(recipe(place))
    queries = [sample.whole for sample in pools.read(paths["test"])]
    ranked = [sorted(range(len(ORGANS)), key=lambda i: -scores[i]) for scores in lucene(ORGANS, queries)]
    assert len({ranks[0] for ranks in ranked}) > 1
    expected = dict.fromkeys(ranks[place] for place in range(len(ORGANS)) for ranks in ranked)
    assert ids(paths["medical"]) == [f"m{i}" for i in expected][:5]


def test_existing_pool_is_reused(place):
    before = pools.build(recipe(place))["songs"].read_bytes()
    write_jsonl(place / "songs.jsonl", text_rows(30, "mountain"))
    paths = pools.build(recipe(place))
    assert paths["songs"].read_bytes() == before
    paths["songs"].unlink()
    assert b"mountain" in pools.build(recipe(place))["songs"].read_bytes()


def test_rows_round_trip_with_labels_and_metadata(place, tmp_path):
    rows = [
        {
            "pubid": i,
            "question": f"Is {i}?",
            "context": {"contexts": ["a", "b"], "year": 7},
            "final": "no",
            "x": {"y": 1},
        }
        for i in range(30)
    ]
    write_jsonl(place / "qa.jsonl", rows)
    columns = 'columns = { sample_id = "pubid", answer = "final", context = "context.contexts" }\nuri = "qa.jsonl"'
    paths = pools.build(recipe(place, ('uri = "qa.jsonl"', columns)))
    sample = pools.read(paths["test"])[0]
    assert (sample.sample_id, sample.prompt, sample.response) == ("6", "Context: a\nb\n\nQuestion: Is 6?", "no")
    assert sample.meta == {"context_": {"year": 7}, "x": {"y": 1}}
    with Store.create(tmp_path / "s") as store:
        assert store.source_add("test", paths["test"], stage="query").n_added == 4


def test_metadata_named_like_a_field_is_kept_apart():
    row = pools._row(Sample("1", text="a", meta={"text": "b", "text_": "c", "prompt": "d", "Text": "e"}))
    assert row == {"sample_id": "1", "text": "a", "text_": "c", "text__": "b", "prompt_": "d", "Text": "e"}


def test_samples_are_unique_by_id_and_content(place):
    rows = [*text_rows(3), {"id": "sea-1", "text": "another"}, {"id": "copy", "text": text_rows(1)[0]["text"]}]
    write_jsonl(place / "songs.jsonl", rows)
    with pytest.raises(InputError, match=r"`songs.jsonl` has 3 usable samples after the first 0, needed: 5") as caught:
        pools.build(recipe(place))
    assert "lower `samples` of source `songs`" in caught.value.hint


def test_a_query_is_never_trained_on(place):
    with pytest.raises(InputError, match="4 samples of `finetune` are also queries, such as `q0`") as caught:
        pools.build(recipe(place, ("skip = 6\n", "")))
    assert "skip" in caught.value.hint


def test_evaluation_questions_are_not_trained_on(place):
    change = ("skip = 6\nsamples = 4", "samples = 4"), ('uri = "qa.jsonl"\nsamples = 6', 'uri = "qa.jsonl"\nskip = 5')
    with pytest.raises(InputError, match="4 samples of `finetune` are also in the evaluation, such as `q5`"):
        pools.build(recipe(place, *change))


@pytest.mark.parametrize("text", ["the", "xyz"])
def test_texts_sharing_no_word_with_queries_are_not_drawn(place, text):
    write_jsonl(place / "medical.jsonl", [{"id": i, "text": f"{text} " * i} for i in range(1, 9)])
    with pytest.raises(InputError, match="no text of `medical` shares a word"):
        pools.build(recipe(place))


def test_unusable_row_is_named(place):
    (place / "medical.jsonl").write_text(json.dumps({"title": "x"}) + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"`medical\.jsonl`, row 1: a row needs"):
        pools.build(recipe(place))
