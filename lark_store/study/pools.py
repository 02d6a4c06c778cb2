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

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from lark_store.study.recipe import Recipe, Source

EVALUATION = "evaluation"


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
    queries = asked[:wanted]
    if recipe.evaluate:
        _write(paths[EVALUATION], asked[: more or wanted])
    _write(paths[recipe.queries.name], queries)
    for source in recipe.source:
        if source.stage != "query":
            _write(paths[source.name], _checked(source, _draw(recipe, source, source.samples, queries), queries))
    return paths


def _draw(recipe: Recipe, source: Source, wanted: int | None, queries: list[Sample]) -> list[Sample]:
    """Return the first `wanted` samples of the source's order (default: all)."""
    found = _samples(source, recipe.place(source.uri))
    if source.choose == "first":
        drawn = list(islice(found, wanted))
    else:
        all_samples = list(found)
        order = _random(len(all_samples), recipe.seed) if source.choose == "random" else _alike(all_samples, queries)
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


def _alike(samples: list[Sample], queries: list[Sample]) -> Iterator[int]:
    """Yield samples by their BM25 likeness to the queries: each query's best in turn, then each one's next best."""
    import bm25s

    index = bm25s.BM25(method="lucene")
    index.index(words([text_of(sample) for sample in samples]), show_progress=False)
    ranks = []
    for asked in words([text_of(query) for query in queries]):
        scores = index.get_scores(asked) if asked else np.zeros(len(samples), np.float32)
        ranks.append(np.argsort(-scores, kind="stable"))
    taken: set[int] = set()
    for place in np.stack(ranks, axis=1).ravel().tolist():
        if place not in taken:
            taken.add(place)
            yield place


def text_of(sample: Sample) -> str:
    """Return a sample's text, a prompt and its response as one."""
    return sample.text if sample.text is not None else f"{sample.prompt}\n{sample.response}"


def _checked(source: Source, samples: list[Sample], queries: list[Sample]) -> list[Sample]:
    asked = {query.content_sha256 for query in queries}
    both = [sample.sample_id for sample in samples if sample.content_sha256 in asked]
    if both:
        raise InputError(
            f"{len(both)} samples of `{source.name}` are queries too, such as `{both[0]}`",
            "draw them from other rows: `skip` leaves out the first ones of a file",
        )
    return samples


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
