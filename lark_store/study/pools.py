"""Pools: the samples of each source, drawn from a file or dataset into a file of their own.

A draw orders the samples (as in the file, at random, or by similarity to the queries) and takes the first. A pool is
written once; a resumed study reuses it.
"""

from __future__ import annotations

import json
from itertools import count, islice
from typing import TYPE_CHECKING, Any

import numpy as np

from lark_store.core.atomic_files import writing
from lark_store.core.words import words
from lark_store.errors import InputError
from lark_store.modeling.forms import fields_of_forms
from lark_store.modeling.forms.rows import samples_of
from lark_store.query.methods import METHODS
from lark_store.readers import read_rows
from lark_store.study.recipe import EVALUATION

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from lark_store.modeling.sample import Sample
    from lark_store.study.recipe import Recipe, Source


def build(recipe: Recipe) -> dict[str, Path]:
    """Write missing pools; return their paths by source name, including `evaluation`.

    Raises
    ------
    InputError
        A source has too few samples, or shares a sample with the queries.
    """
    folder = recipe.root / "pools"
    names = [*(source.name for source in recipe.source), *([EVALUATION] if recipe.evaluate else [])]
    paths = {name: folder / f"{name}.jsonl" for name in names}
    if all(path.is_file() for path in paths.values()):
        return paths
    folder.mkdir(parents=True, exist_ok=True)
    n_questions = recipe.evaluate.samples if recipe.evaluate else None
    n = recipe.queries.samples
    pool = _draw(recipe, recipe.queries, max(n, n_questions) if n and n_questions else n, [])
    queries, questions = pool[:n], pool[: n_questions or n] if recipe.evaluate else []
    pools = {recipe.queries.name: queries, EVALUATION: questions}
    for source in recipe.source:
        if source.stage != "query":
            drawn = pools[source.name] = _draw(recipe, source, source.samples, queries)
            _refuse_overlap(source.name, drawn, queries, "are also queries")
    _refuse_overlap(recipe.tuning.name, pools[recipe.tuning.name], questions, "are also in the evaluation")
    for name, path in paths.items():
        _write(path, pools[name])
    return paths


def remove(recipe: Recipe) -> None:
    """Remove the pools: they belong to a recipe of an earlier attempt."""
    for name in (*(source.name for source in recipe.source), EVALUATION):
        (recipe.root / "pools" / f"{name}.jsonl").unlink(missing_ok=True)


def _draw(recipe: Recipe, source: Source, n_samples: int | None, queries: list[Sample]) -> list[Sample]:
    """Return the first `n_samples` samples in the source's order (default: all)."""
    samples = _samples(source, recipe.place(source.uri))
    if source.choose == "first":
        drawn = list(islice(samples, n_samples))
    else:
        all_samples = list(samples)
        order = (
            _random(len(all_samples), recipe.seed)
            if source.choose == "random"
            else _most_similar(source, all_samples, queries, n_samples)
        )
        drawn = [all_samples[i] for i in islice(order, n_samples)]
    if len(drawn) < (n_samples or 1):
        raise InputError(
            f"`{source.uri}` has {len(drawn)} usable samples after the first {source.skip}, needed: {n_samples or 1}",
            f"lower `samples` of source `{source.name}` in the recipe, or add rows to the file",
        )
    return drawn


def _samples(source: Source, uri: str) -> Iterator[Sample]:
    """Yield a source's samples after the skipped rows, without duplicate ids or contents."""
    seen: set[str] = set()
    for sample in _read(source, uri):
        if sample is not None and seen.isdisjoint((f"id {sample.sample_id}", sample.content_sha256)):
            seen |= {f"id {sample.sample_id}", sample.content_sha256}
            yield sample


def _read(source: Source, uri: str) -> Iterator[Sample | None]:
    """Yield the sample of each row after the skipped ones."""
    rows = islice(read_rows(uri, source.config, source.split), source.skip, None)
    numbered = samples_of(rows, source.columns, source.uri, source.skip + 1)
    while True:
        try:
            _, _, sample = next(numbered)
        except StopIteration:
            return
        except InputError as error:
            hint = f"map columns with `columns` of source `{source.name}` in the recipe"
            raise InputError(error.fact, hint) from error
        yield sample


def _random(n: int, seed: int) -> Iterable[int]:
    order: list[int] = np.random.default_rng(seed).permutation(n).tolist()
    return order


def _most_similar(source: Source, samples: list[Sample], queries: list[Sample], n_samples: int | None) -> Iterator[int]:
    """Yield samples by BM25 similarity to the queries: the best of each query in turn, then the next best of each.

    Keeps `n_samples` ranks per query: no more are ever read.
    """
    texts = words([sample.whole for sample in samples])
    query_words = [query for query in words([query.whole for query in queries]) if query]
    if {word for text in texts for word in text}.isdisjoint(word for query in query_words for word in query):
        raise InputError(
            f"no text of `{source.name}` shares a word with the queries",
            f'set `choose` to "first" or "random": "{source.choose}" needs texts in the language of the queries',
        )
    index = METHODS[source.choose].index(texts)
    ranks = [np.argsort(-index.get_scores(query), kind="stable")[:n_samples].copy() for query in query_words]
    yielded: set[int] = set()
    for place in np.stack(ranks, axis=1).flat:
        if place not in yielded:
            yielded.add(int(place))
            yield int(place)


def _refuse_overlap(name: str, samples: list[Sample], queries: list[Sample], fault: str) -> None:
    contents = {sample.content_sha256 for sample in queries}
    shared = [sample.sample_id for sample in samples if sample.content_sha256 in contents]
    if shared:
        raise InputError(
            f"{len(shared)} samples of `{name}` {fault}, such as `{shared[0]}`",
            "draw them from other rows: set `skip` to skip the first rows of a file",
        )


def _write(path: Path, samples: Iterable[Sample]) -> None:
    with writing(path) as draft:
        draft.write_text("".join(f"{json.dumps(_row(s), ensure_ascii=False)}\n" for s in samples), encoding="utf-8")


def _row(sample: Sample) -> dict[str, Any]:
    """Return a sample as a row which `source_add` reads back unchanged."""
    parts = {"sample_id": sample.sample_id, "prompt": sample.prompt, "response": sample.response}
    parts |= {"text": sample.text, "label": sample.label, "completion": sample.completion}
    parts |= {"messages": sample.messages, "tools": sample.tools}
    meta = dict(sample.meta)
    for key in sorted({*fields_of_forms(), "id"} & meta.keys()):
        free = next(name for name in (key + "_" * n for n in count(1)) if name not in meta)
        meta[free] = meta.pop(key)
    return {**meta, **{name: part for name, part in parts.items() if part is not None}}


def read(path: Path) -> list[Sample]:
    """Return a pool's samples."""
    numbered = samples_of(read_rows(str(path)), {}, str(path))
    return [sample for _, _, sample in numbered if sample is not None]
