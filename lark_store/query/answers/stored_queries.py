"""Rank for stored queries, and for samples of any source written as SOURCE/ID."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lark_store.core.names import SUM_SEPARATOR
from lark_store.errors import InputError
from lark_store.query.answers.top import Ranking, ids_of, null_groups, top
from lark_store.query.nulls import NULLS
from lark_store.query.select.queries import sample_of, without_sketch
from lark_store.query.select.resolve import ask
from lark_store.specs import build

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lark_store.results import Hits
    from lark_store.schema.database import Database
    from lark_store.specs import SearchSpec


def ranking_of(db: Database, spec: SearchSpec, options: Mapping[str, Any]) -> Ranking:
    """Return the ranking that options ask for."""
    ranking = build(Ranking, options)
    if ranking.null is None or ranking.null in NULLS:
        return ranking
    return replace(ranking, null_groups=null_groups(db, spec, ranking.null))


def of_stored(db: Database, queries: list[str], spec: SearchSpec, ranking: Ranking) -> list[Hits]:
    """Rank for stored queries, and for samples of any source written as SOURCE/ID."""
    samples = {query: sample for query in queries if (sample := sample_of(db, query)) is not None}
    plain = [query for query in queries if query not in samples]
    hits = top(db, plain, ask(db, spec), ranking) if plain else {}
    hits |= {query: _of_sample(db, query, sample, spec, ranking) for query, sample in samples.items()}
    return [hits[query] for query in queries]


def _of_sample(db: Database, query: str, sample: tuple[str, str], spec: SearchSpec, ranking: Ranking) -> Hits:
    """Rank for the sketch of a sample, which is left out of its own hits."""
    source, sample_id = sample
    if spec.queries not in (None, source):
        raise InputError(f"`{query}` is a sample of `{source}`, not of `{spec.queries}`", "leave out `--queries`")
    (question,) = ask(db, replace(spec, queries=source, any_stage=True))
    if sample_id not in ids_of(db, question):
        place = f"as `{question.queries.variant.name}` at `{SUM_SEPARATOR.join(question.checkpoints)}`"
        raise without_sketch(db, source, sample_id, place)
    hits = top(db, [sample_id], [question], replace(ranking, without=sample))
    return replace(hits[sample_id], query_id=query)
