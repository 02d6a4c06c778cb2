"""`explain`: which tokens of a query and a sample carry their score."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import select

from lark_store.core.text import coded, joined
from lark_store.errors import InputError, NameUnknownError
from lark_store.schema.catalog import Checkpoint, FormatVariant, Source
from lark_store.schema.database import find, find_sketcher
from lark_store.schema.vectors import where
from lark_store.specs import Compute, build
from lark_store.store.base import public

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lark_store.ingest.explain import ExplainedSample
    from lark_store.results import Explanation, NewText
    from lark_store.schema.database import Database

_DEFAULT_VARIANT = "chatml"


class Explainer:
    """Explains scores of one sketcher at one checkpoint; see `Store.explainer`. The model is loaded once and kept."""

    def __init__(self, db: Database, checkpoint: str | None, options: Mapping[str, Any]) -> None:
        from lark_store.ingest.explain import LoadedExplainer
        from lark_store.query.select.sketchers import sketcher_with_sketches

        self.checkpoint = _checkpoint(db, checkpoint)
        self.sketcher, self._notes = sketcher_with_sketches(db, options.get("sketcher"), [self.checkpoint])
        self._db = db
        self._loaded = LoadedExplainer(
            db, sketcher=self.sketcher, checkpoint=self.checkpoint, compute=build(Compute, options)
        )

    @public
    def explain(
        self,
        query: str | None,
        sample: str,
        *,
        new: NewText | None = None,
        queries: str | None = None,
        query_variant: str | None = None,
        variant: str | None = None,
        normalize: bool = True,
    ) -> Explanation:
        """Explain the score of a query and a sample; see `Store.explain`. Threads take turns."""
        from dataclasses import replace

        self._db.check_usable()
        asked = _query(self._db, query, new, queries)
        found = _sample(self._db, sample)
        left = self._explained(*asked, query_variant, "--query-variant")
        right = self._explained(*found, variant, "--variant")
        result = self._loaded.explain(left, right, normalize=normalize)
        return replace(result, notes=(*self._notes, *result.notes))

    def _explained(
        self, name: str, source: str | None, sample: Any, variant: str | None, option: str
    ) -> ExplainedSample:
        from lark_store.ingest.explain import ExplainedSample

        used = self._variant(source, variant, option)
        return ExplainedSample(name, sample, used, source)

    def _variant(self, source: str | None, variant: str | None, option: str) -> str:
        """Return the given variant, or the one a source is sketched in; of several, `chatml`."""
        from lark_store.query.select.resolve import committed_groups

        with self._db.session() as session:
            if variant is not None:
                return find(session, FormatVariant, variant).name
            sketcher = find_sketcher(session, self.sketcher)
            groups = committed_groups(session, sketcher, find(session, Checkpoint, self.checkpoint))
            names = list(dict.fromkeys(group.variant.name for group in groups if group.source.name == source))
        if len(names) == 1:
            return names[0]
        if names and _DEFAULT_VARIANT not in names:
            raise InputError(
                f"`{source}` is sketched as {joined(coded(names), 'and')}", f"choose one with `{option} NAME`"
            )
        return _DEFAULT_VARIANT


def check_names(db: Database, query: str | None, sample: str, new: NewText | None, options: Mapping[str, Any]) -> None:
    """Look up a query, a sample and their variants, before a model is loaded.

    Raises
    ------
    NameUnknownError, InputError
    """
    _query(db, query, new, options.get("queries"))
    _sample(db, sample)
    with db.session() as session:
        for name in (options.get("variant"), options.get("query_variant")):
            if name is not None:
                find(session, FormatVariant, name)


def _checkpoint(db: Database, name: str | None) -> str:
    with db.session() as session:
        if name is not None:
            return find(session, Checkpoint, name).name
        names = list(session.scalars(select(Checkpoint.name).order_by(Checkpoint.id)))
    if not names:
        raise InputError("the store has no checkpoint", "add one with `lark-store checkpoint add`")
    if len(names) > 1:
        raise InputError(
            f"the store has several checkpoints: {joined(coded(names), 'and')}", "choose one with `--checkpoint NAME`"
        )
    return names[0]


def _query(db: Database, query: str | None, new: NewText | None, queries: str | None) -> tuple[str, str | None, Any]:
    """Return a query's name, source and sample: by id, by `SOURCE/ID`, or a new text."""
    from lark_store.query.select.queries import sample_of
    from lark_store.store.top import sample_of_new

    if (query is None) == (new is None):
        fact = "a query id and a new text can't be combined" if new else "no query is given"
        raise InputError(fact, "give the id of a query, or a new text")
    if new is not None:
        return "new", None, sample_of_new(new)
    assert query is not None
    named = sample_of(db, query)
    if named is not None:
        return query, named[0], _read(db, *named)
    with db.session() as session:
        if queries is not None:
            find(session, Source, queries)
        sources = [queries] if queries else list(session.scalars(select(Source.name).filter_by(stage="query")))
    having = _having(db, query, sources)
    if len(having) > 1:
        raise InputError(f"query `{query}` is in {joined(coded(having), 'and')}", "choose one with `--queries NAME`")
    if not having:
        raise _unknown_query(db, query, sources)
    return query, having[0], _read(db, having[0], query)


def _unknown_query(db: Database, query: str, sources: list[str]) -> NameUnknownError:
    others = sorted(set(db.vectors.read("samples", ["source"], where(sample_id=query))["source"]))
    if others:
        names = joined((f"`{name}/{query}`" for name in others), "or")
        return NameUnknownError(
            f"no query `{query}`", f"it is a sample of {joined(coded(others), 'and')}; write {names}"
        )
    ids: Sequence[str] = []
    if sources:
        ids = db.vectors.read("samples", ["sample_id"], where(source=sources))["sample_id"].to_list()
    return NameUnknownError.of("query", query, ids, "add a source of stage `query`", n=3)


def _sample(db: Database, name: str) -> tuple[str, str, Any]:
    """Return a sample's name `SOURCE/ID`, its source and its content."""
    from lark_store.query.answers.samples import find_sample

    source, sample_id = find_sample(db, name)
    return f"{source}/{sample_id}", source, _read(db, source, sample_id)


def _having(db: Database, sample_id: str, sources: list[str]) -> list[str]:
    if not sources:
        return []
    return sorted(set(db.vectors.read("samples", ["source"], where(source=sources, sample_id=sample_id))["source"]))


def _read(db: Database, source: str, sample_id: str) -> Any:
    from lark_store.modeling.sample import SAMPLE_COLUMNS, Sample
    from lark_store.query.select.queries import unknown_sample

    rows = db.vectors.read("samples", SAMPLE_COLUMNS, where(source=source, sample_id=sample_id)).to_dicts()
    if not rows:
        raise unknown_sample(db, source, sample_id)
    return Sample.of_row(rows[0])
