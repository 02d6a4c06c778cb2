"""Resolve a search into groups (checkpoint × source × variant) of committed sketches, and its queries.

A question has one term per checkpoint: one, or several whose scores are summed. All terms have the same query source
and the same groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sqlalchemy import select
from sqlalchemy.orm import joinedload

from lark_store.core.names import SUM_SEPARATOR
from lark_store.core.text import coded, joined
from lark_store.errors import InputError, NothingToScoreError
from lark_store.query.methods import Method
from lark_store.query.select.hints import for_sketches
from lark_store.query.select.sketchers import with_sketcher
from lark_store.schema.catalog import Checkpoint, FormatVariant, IngestRun, Sketcher, Source
from lark_store.schema.database import Database, find, find_sketcher
from lark_store.schema.table_schemas import sketch_table
from lark_store.schema.vectors import where

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy.orm import Session

    from lark_store.specs import SearchSpec


@dataclass(frozen=True)
class Group:
    """The committed sketches of one source in one variant at one checkpoint, by one sketcher."""

    sketcher: Sketcher
    fingerprint: str
    checkpoint: Checkpoint
    source: Source
    variant: FormatVariant
    runs: tuple[int, ...]

    @property
    def table(self) -> str:
        """The group's Lance table."""
        return sketch_table(self.fingerprint)

    @property
    def filter(self) -> str:
        """The Lance filter for the group's rows."""
        names = {"checkpoint": self.checkpoint.name, "source": self.source.name, "variant": self.variant.name}
        return where(**names) + " AND " + where(ingest_run=self.runs)

    @property
    def label(self) -> str:
        """A short label, `source · variant`."""
        return f"{self.source.name} · {self.variant.name}"


@dataclass(frozen=True)
class Term:
    """Queries (a group of stage `query`; None for a new text) and the groups to score, with a weight."""

    queries: Group | None
    groups: list[Group]
    weight: float = 1.0

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint of the groups."""
        return self.groups[0].checkpoint


@dataclass(frozen=True)
class Question:
    """A resolved search: the terms, in the checkpoints' order, the method, and notes on what was chosen."""

    terms: list[Term]
    method: Method
    notes: tuple[str, ...] = ()

    @property
    def checkpoints(self) -> list[str]:
        """The checkpoints' names, in order."""
        return [term.checkpoint.name for term in self.terms]

    @property
    def over_checkpoints(self) -> str | None:
        """The summed checkpoints, as `base + epoch-1`; None without a sum."""
        return SUM_SEPARATOR.join(self.checkpoints) if self.method.over else None

    @property
    def label(self) -> str:
        """A short label of the score, as `adam · cosine, sum over base + epoch-1`."""
        return self.method.label(self.groups[0].sketcher.name, self.checkpoints)

    @property
    def groups(self) -> list[Group]:
        """The groups of the last term."""
        return self.terms[-1].groups

    @property
    def queries(self) -> Group:
        """The queries of the last term, which must have some."""
        queries = self.terms[-1].queries
        assert queries is not None
        return queries


def committed_groups(session: Session, sketcher: Sketcher, checkpoint: Checkpoint) -> list[Group]:
    """Return all groups at a checkpoint, in order of their first ingest. Ignores unfinished runs."""
    runs = session.scalars(
        select(IngestRun)
        .filter_by(sketcher_id=sketcher.id, checkpoint_id=checkpoint.id, status="done")
        .where(IngestRun.n_sketched > 0)
        .order_by(IngestRun.id)
        .options(joinedload(IngestRun.source), joinedload(IngestRun.variant))
    )
    runs_of: dict[tuple[str, Source, FormatVariant], list[int]] = {}
    for run in runs:
        runs_of.setdefault((run.fingerprint, run.source, run.variant), []).append(run.id)
    return [
        Group(sketcher, fingerprint, checkpoint, source, variant, tuple(ids))
        for (fingerprint, source, variant), ids in runs_of.items()
    ]


def method_across(
    name: str | None, over: str | None, checkpoints: Sequence[str], query_checkpoint: str | None
) -> Method:
    """Return the given or default method of samples at these checkpoints and queries at `query_checkpoint`.

    The default is `dot` where the queries are at another checkpoint, else `cosine`.

    Raises
    ------
    InputError
        The method does not exist, or needs queries and samples at the same checkpoints.
    """
    is_across = query_checkpoint is not None and [query_checkpoint] != list(checkpoints)
    method = Method.of(name, over, default="dot" if is_across and over is None else "cosine")
    if is_across and (method.over or method.scoring.is_local):
        raise InputError(
            f"`{method.name}` needs queries and samples at the same checkpoints",
            "leave out `--query-checkpoint`, or use another method",
        )
    return method


def resolved_method(spec: SearchSpec) -> Method:
    """Return the given or default method of a search.

    Raises
    ------
    InputError
        The method does not exist or does not fit the checkpoints.
    """
    method = method_across(spec.method, spec.over_checkpoints, spec.checkpoints, spec.query_checkpoint)
    if method.over is None and len(spec.checkpoints) > 1:
        listed = ", ".join(f"`{name}`" for name in spec.checkpoints)
        raise InputError(
            f"`{method.name}` scores at one checkpoint, not at {listed}",
            "sum the scores of several with `--over-checkpoints sum` (or `lr-weighted`)",
        )
    if len(set(spec.checkpoints)) < len(spec.checkpoints):
        raise InputError("a checkpoint is given twice", "give each checkpoint once")
    return method


def ask(db: Database, spec: SearchSpec) -> list[Question]:
    """Resolve names into questions: one, or without `queries` one per source of stage `query`.

    Raises
    ------
    NameUnknownError, NothingToScoreError, InputError
    """
    method = resolved_method(spec)
    spec, notes = with_sketcher(db, spec)
    per_checkpoint = [_terms(db, spec, name, method) for name in spec.checkpoints]
    first, *others = per_checkpoint
    names = [name for name in first if all(name in terms for terms in others)]
    return [Question([terms[name] for terms in per_checkpoint], method, notes) for name in names]


def mixed_variants(questions: Sequence[Question]) -> list[str]:
    """Return a note for each source of queries whose format variant is not the same at all checkpoints."""
    places: dict[str, dict[str, dict[str, None]]] = {}
    for queries in (term.queries for question in questions for term in question.terms):
        if queries is not None:
            of_source = places.setdefault(queries.source.name, {})
            of_source.setdefault(queries.variant.name, {})[queries.checkpoint.name] = None
    notes = []
    for source, of_source in places.items():
        if len(of_source) > 1:
            parts = (f"as `{variant}` at {joined(coded(names), 'and')}" for variant, names in of_source.items())
            notes.append(f"queries of `{source}` are {joined(parts, 'and')}: these values differ in format, too")
    return notes


def ask_new(db: Database, spec: SearchSpec, fingerprint: str) -> Question:
    """Resolve names into a question for a text outside the store, sketched as `fingerprint`."""
    method = resolved_method(spec)
    if len(spec.checkpoints) > 1:
        raise InputError("a new text is sketched at one checkpoint only", "give one `--checkpoint`")
    spec, notes = with_sketcher(db, spec)
    with db.session() as session:
        sketcher, checkpoint, weight = _resolve(session, spec, spec.checkpoints[0], method)
        committed = committed_groups(session, sketcher, checkpoint)
    groups = [g for g in _searched(db, spec, committed, sketcher, checkpoint) if g.fingerprint == fingerprint]
    if not groups:
        raise NothingToScoreError(
            f"the text's sketch can't be compared with those at `{checkpoint.name}`: the models' parameters differ",
            "choose a checkpoint of the same model",
        )
    return Question([Term(None, groups, weight)], method, notes)


def searched_groups(db: Database, spec: SearchSpec) -> list[Group]:
    """Return the groups to search at the last checkpoint."""
    spec, _ = with_sketcher(db, spec)
    with db.session() as session:
        sketcher, checkpoint, _ = _resolve(session, spec, spec.checkpoints[-1], Method())
        committed = committed_groups(session, sketcher, checkpoint)
    return _searched(db, spec, committed, sketcher, checkpoint)


def _resolve(
    session: Session, spec: SearchSpec, checkpoint_name: str, method: Method
) -> tuple[Sketcher, Checkpoint, float]:
    """Look up the names; returns the sketcher, the checkpoint and its weight."""
    sketcher, checkpoint = find_sketcher(session, spec.sketcher), find(session, Checkpoint, checkpoint_name)
    for kind, names in ((Source, spec.sources), (FormatVariant, spec.variants)):
        for name in names:
            find(session, kind, name)
    if spec.queries is not None and find(session, Source, spec.queries).stage != "query" and not spec.any_stage:
        raise InputError(f"source `{spec.queries}` is not of stage `query`", "choose a source of stage `query`")
    if spec.query_variant is not None:
        find(session, FormatVariant, spec.query_variant)
    if method.over != "lr-weighted":
        return sketcher, checkpoint, 1.0
    if checkpoint.learning_rate is None:
        raise InputError(
            f"`{method.name}` weights checkpoints by learning rate, but `{checkpoint.name}` has none",
            f"use `--method {method.base} --over-checkpoints sum`, or add the checkpoint under another name "
            f"with `lark-store checkpoint add NAME {checkpoint.path} --learning-rate RATE`",
        )
    return sketcher, checkpoint, checkpoint.learning_rate


def _terms(db: Database, spec: SearchSpec, checkpoint_name: str, method: Method) -> dict[str, Term]:
    """Return one checkpoint's term for each query source."""
    with db.session() as session:
        sketcher, checkpoint, weight = _resolve(session, spec, checkpoint_name, method)
        query_checkpoint = find(session, Checkpoint, spec.query_checkpoint or checkpoint_name)
        committed = committed_groups(session, sketcher, checkpoint)
        is_same = query_checkpoint.id == checkpoint.id
        query_groups = committed if is_same else committed_groups(session, sketcher, query_checkpoint)
    queries = _query_groups(query_groups, spec.queries, spec.query_variant)
    if not queries:
        subject = f"`{spec.queries}`" if spec.queries else "any queries"
        subject += f" as `{spec.query_variant}`" if spec.query_variant else ""
        names, variants = ([name] if name else [] for name in (spec.queries, spec.query_variant))
        hint = for_sketches(db, sketcher, query_checkpoint, names, variants, stages=("query",))
        raise _no_sketches(subject, query_checkpoint, sketcher, hint)
    groups = _searched(db, spec, committed, sketcher, checkpoint)
    return {q.source.name: Term(q, _comparable(q, groups), weight) for q in queries}


def _searched(
    db: Database, spec: SearchSpec, committed: list[Group], sketcher: Sketcher, checkpoint: Checkpoint
) -> list[Group]:
    """Return the groups to search: those of the given sources and variants, or all except queries."""
    sources, variants = spec.sources, spec.variants
    groups = [
        g
        for g in committed
        if (g.source.name in sources if sources else g.source.stage != "query")
        and (not variants or g.variant.name in variants)
    ]
    missing = set(sources) - {g.source.name for g in groups}
    if not groups or missing:
        subject = " and ".join(f"`{name}`" for name in (*(sorted(missing) or sources), *variants)) or "any source"
        hint = for_sketches(db, sketcher, checkpoint, sorted(missing) or sources, variants)
        raise _no_sketches(subject, checkpoint, sketcher, hint)
    return groups


def _query_groups(groups: list[Group], queries: str | None, variant: str | None) -> list[Group]:
    """Return each query source's group, or only that of `queries`; of several variants, `chatml`."""
    by_source: dict[str, list[Group]] = {}
    for group in groups:
        if group.source.name == queries if queries else group.source.stage == "query":
            by_source.setdefault(group.source.name, []).append(group)
    selected = []
    for source_groups in by_source.values():
        by_variant = {group.variant.name: group for group in source_groups}
        name = variant or (next(iter(by_variant)) if len(by_variant) == 1 else "chatml")
        if name in by_variant:
            selected.append(by_variant[name])
        elif variant is None:
            listed = ", ".join(f"`{n}`" for n in by_variant)
            raise InputError(f"the queries are sketched as {listed}", "choose one with `--query-variant`")
    return selected


def _no_sketches(subject: str, checkpoint: Checkpoint, sketcher: Sketcher, hint: str) -> NothingToScoreError:
    return NothingToScoreError(
        f"there are no committed `{sketcher.name}` sketches of {subject} at checkpoint `{checkpoint.name}`", hint
    )


def _comparable(queries: Group, groups: list[Group]) -> list[Group]:
    """Return the groups whose sketches can be compared with the queries'."""
    comparable = [g for g in groups if g.fingerprint == queries.fingerprint]
    if not comparable:
        raise NothingToScoreError(
            f"the sketches at `{groups[0].checkpoint.name}` can't be compared with the queries' at "
            f"`{queries.checkpoint.name}`: the models' parameters differ",
            "compare checkpoints of one model, sketched by one sketcher",
        )
    return comparable
