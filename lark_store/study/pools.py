"""Pools: the samples of each source, drawn from a file or dataset, in a file of their own.

The draw is an order of the samples (as they stand, random, or by likeness to the queries), of which the first ones are
taken. A pool's file is made once; a study that goes on uses it as it is.
"""

from __future__ import annotations

import json
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from lark_store.errors import InputError
from lark_store.ingest.readers import read_rows
from lark_store.ingest.sources import FIELDS, Sample, make_sample
from lark_store.query.lexical import words
from lark_store.study.files import writing
from lark_store.study.recipe import EVALUATION

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from lark_store.study.recipe import Recipe, Source


def build(recipe: Recipe) -> dict[str, Path]:
    """Write the pools that are missing; return the path of each by its source's name, and of `evaluation`.

    Raises
    ------
    InputError
        A source has too few samples, or one that is a query and is trained on.
    """
    folder = recipe.root / "pools"
    names = [*(source.name for source in recipe.source), *([EVALUATION] if recipe.evaluate else [])]
    paths = {name: folder / f"{name}.jsonl" for name in names}
    if all(path.is_file() for path in paths.values()):
        return paths
    folder.mkdir(parents=True, exist_ok=True)
    more = recipe.evaluate.samples if recipe.evaluate else None
    wanted = recipe.queries.samples
    asked = _draw(recipe, recipe.queries, max(wanted, more) if wanted and more else wanted, [])
    queries, questions = asked[:wanted], asked[: more or wanted] if recipe.evaluate else []
    pools = {recipe.queries.name: queries, EVALUATION: questions}
    for source in recipe.source:
        if source.stage != "query":
            drawn = pools[source.name] = _draw(recipe, source, source.samples, queries)
            _apart(source.name, drawn, queries, "are queries too")
    _apart(recipe.tuning.name, pools[recipe.tuning.name], questions, "are asked in the evaluation too")
    for name, path in paths.items():
        _write(path, pools[name])
    return paths


def forget(recipe: Recipe) -> None:
    """Remove the pools: they are of a recipe that the study was not begun with."""
    for name in (*(source.name for source in recipe.source), EVALUATION):
        (recipe.root / "pools" / f"{name}.jsonl").unlink(missing_ok=True)


def _draw(recipe: Recipe, source: Source, wanted: int | None, queries: list[Sample]) -> list[Sample]:
    """Return the first `wanted` samples of the source's order (default: all)."""
    found = _samples(source, recipe.place(source.uri))
    if source.choose == "first":
        drawn = list(islice(found, wanted))
    else:
        all_samples = list(found)
        order = (
            _random(len(all_samples), recipe.seed)
            if source.choose == "random"
            else _alike(source, all_samples, queries, wanted)
        )
        drawn = [all_samples[i] for i in islice(order, wanted)]
    if len(drawn) < (wanted or 1):
        raise InputError(
            f"`{source.uri}` has {len(drawn)} usable samples after the first {source.skip}, {wanted or 1} are wanted",
            f"lower `samples` of source `{source.name}` in the recipe, or give it more text",
        )
    return drawn


def _samples(source: Source, uri: str) -> Iterator[Sample]:
    """Yield a source's samples after the skipped rows, each id and each content once."""
    seen: set[str] = set()
    for number, row in enumerate(islice(read_rows(uri, source.config, source.split), source.skip, None), source.skip):
        try:
            sample = make_sample(row, source.columns)
        except InputError as error:
            hint = f"map columns with `columns` of source `{source.name}` in the recipe"
            raise InputError(f"`{source.uri}`, row {number + 1}: {error.fact}", hint) from error
        if sample is not None and seen.isdisjoint((f"id {sample.sample_id}", sample.content_sha256)):
            seen |= {f"id {sample.sample_id}", sample.content_sha256}
            yield sample


def _random(n: int, seed: int) -> Iterable[int]:
    order: list[int] = np.random.default_rng(seed).permutation(n).tolist()
    return order


def _alike(source: Source, samples: list[Sample], queries: list[Sample], wanted: int | None) -> Iterator[int]:
    """Yield samples by their BM25 likeness to the queries: each query's best in turn, then each one's next best.

    Of each query's order `wanted` are kept, which is as far as any of them is read.
    """
    import bm25s

    texts = words([sample.whole for sample in samples])
    asked = [query for query in words([query.whole for query in queries]) if query]
    if {word for text in texts for word in text}.isdisjoint(word for query in asked for word in query):
        raise InputError(
            f"no text of `{source.name}` has a word in common with the queries",
            'choose = "bm25" needs texts in their language; or `first`, `random`',
        )
    index = bm25s.BM25(method="lucene")
    index.index(texts, show_progress=False)
    ranks = [np.argsort(-index.get_scores(query), kind="stable")[:wanted].copy() for query in asked]
    taken: set[int] = set()
    for place in np.stack(ranks, axis=1).flat:
        if place not in taken:
            taken.add(int(place))
            yield int(place)


def _apart(name: str, samples: list[Sample], asked: list[Sample], what: str) -> None:
    contents = {sample.content_sha256 for sample in asked}
    both = [sample.sample_id for sample in samples if sample.content_sha256 in contents]
    if both:
        raise InputError(
            f"{len(both)} samples of `{name}` {what}, such as `{both[0]}`",
            "draw them from other rows: `skip` leaves out the first ones of a file",
        )


def _write(path: Path, samples: Iterable[Sample]) -> None:
    with writing(path) as draft:
        draft.write_text("".join(f"{json.dumps(_row(s), ensure_ascii=False)}\n" for s in samples), encoding="utf-8")


def _row(sample: Sample) -> dict[str, Any]:
    """Return a sample as a row that `source_add` reads back as it is."""
    parts = {"sample_id": sample.sample_id, "prompt": sample.prompt, "response": sample.response}
    parts |= {"text": sample.text, "label": sample.label}
    meta = {f"{key}_" if key in {*FIELDS, "id"} else key: value for key, value in sample.meta.items()}
    return {**meta, **{name: part for name, part in parts.items() if part is not None}}


def read(path: Path) -> list[Sample]:
    """Return a pool's samples."""
    found = (make_sample(row, {}) for row in read_rows(str(path)))
    return [sample for sample in found if sample is not None]
