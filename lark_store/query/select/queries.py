"""Queries by id: `ID` of a query source, or `SOURCE/ID` of any source."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import select

from lark_store.core.text import joined
from lark_store.errors import LarkStoreError, NameUnknownError, NothingToScoreError
from lark_store.query.select.hints import quoted
from lark_store.schema.catalog import Source
from lark_store.schema.vectors import where

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lark_store.schema.database import Database


def sample_of(db: Database, query: str) -> tuple[str, str] | None:
    """Return the source and the id that `SOURCE/ID` names; None for the id of a query, which may hold a slash."""
    name, slash, sample_id = query.partition("/")
    if not slash:
        return None
    with db.session() as session:
        stages = {source.name: source.stage for source in session.scalars(select(Source))}
    if name not in stages:
        return None
    sources = [source for source, stage in stages.items() if stage == "query"]
    is_id = bool(sources) and len(db.vectors.read("samples", ["sample_id"], where(source=sources, sample_id=query)))
    return None if is_id else (name, sample_id)


def unknown_query(db: Database, query: str, ids: Iterable[str]) -> NameUnknownError:
    """Return the error for an id that no query has: the samples with this id, or the nearest ids of queries."""
    with db.session() as session:
        others = set(session.scalars(select(Source.name).where(Source.stage != "query")))
    having = sorted({*db.vectors.read("samples", ["source"], where(sample_id=query))["source"]} & others)
    if not having:
        return NameUnknownError.of("query", query, ids, "ingest a source of stage `query`", n=3)
    commands = joined((f"`lark-store top {name}/{query}`" for name in having), "or")
    return NameUnknownError(f"no query `{query}`", f"it is a sample of {quoted(having)}; rank for it with {commands}")


def unknown_sample(db: Database, source: str, sample_id: str) -> NameUnknownError:
    """Return the error for an id that a source lacks: the nearest of its ids."""
    ids = db.vectors.read("samples", ["sample_id"], where(source=source))["sample_id"].to_list()
    error = NameUnknownError.of("sample", sample_id, ids, f"add samples with `lark-store source add {source}`", n=3)
    return NameUnknownError(f"source `{source}` has no sample `{sample_id}`", error.hint)


def without_sketch(db: Database, source: str, sample_id: str, place: str) -> LarkStoreError:
    """Return the error for a sample of a source that has no sketch at a place, or that is not in the source."""
    if not len(db.vectors.read("samples", ["sample_id"], where(source=source, sample_id=sample_id))):
        return unknown_sample(db, source, sample_id)
    return NothingToScoreError(
        f"sample `{source}/{sample_id}` has no sketch {place}",
        "it failed, or was not ingested; see the SQL view `failures`",
    )
