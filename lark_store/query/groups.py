"""Which sketches a question is about: groups (checkpoint × source × variant) of committed rows, and the queries.

A question has one term per checkpoint that it looks at: one, or several whose scores are summed. Every term has the
same query source and the same groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sqlalchemy import select
from sqlalchemy.orm import joinedload

from lark_store.errors import InputError, NothingToScoreError
from lark_store.query.methods import BETWEEN, Method
from lark_store.schema.catalog import Checkpoint, FormatVariant, IngestRun, Sketcher, Source
from lark_store.schema.database import Database, find
from lark_store.schema.vectors import sketch_table, where

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy.orm import Session


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
        """The Lance table that holds the group."""
        return sketch_table(self.fingerprint)

    @property
    def filter(self) -> str:
        """The Lance filter that selects the group."""
        names = {"checkpoint": self.checkpoint.name, "source": self.source.name, "variant": self.variant.name}
        return where(**names) + " AND " + where(ingest_run=self.runs)

    @property
    def label(self) -> str:
        """The group in a few words."""
        return f"{self.source.name} · {self.variant.name}"


@dataclass(frozen=True)
class Term:
    """Queries (a group of stage `query`; None where a new text is asked about) and the groups to score, at a weight."""

    queries: Group | None
    groups: list[Group]
    weight: float = 1.0

    @property
    def checkpoint(self) -> Checkpoint:
        """Where the groups were sketched."""
        return self.groups[0].checkpoint


@dataclass(frozen=True)
class Question:
    """What is asked: the terms, in the checkpoints' order, and the method."""

    terms: list[Term]
    method: Method

    @property
    def checkpoints(self) -> list[str]:
        """The names of the checkpoints, in their order."""
        return [term.checkpoint.name for term in self.terms]

    @property
    def over_checkpoints(self) -> str | None:
        """The checkpoints that are summed over, as `base + epoch-1`; None where there is no sum."""
        return BETWEEN.join(self.checkpoints) if self.method.over else None

    @property
    def label(self) -> str:
        """The score in a few words, as `adam · cosine, sum over base + epoch-1`."""
        return self.method.label(self.groups[0].sketcher.name, self.checkpoints)

    @property
    def groups(self) -> list[Group]:
        """The groups of the last term."""
        return self.terms[-1].groups

    @property
    def queries(self) -> Group:
        """The queries of the last term, where there are any."""
        queries = self.terms[-1].queries
        assert queries is not None
        return queries


def committed_groups(session: Session, sketcher: Sketcher, checkpoint: Checkpoint) -> list[Group]:
    """Return all groups at a checkpoint, in the order they were first ingested. Unfinished runs don't count."""
    runs = session.scalars(
        select(IngestRun)
        .filter_by(sketcher_id=sketcher.id, checkpoint_id=checkpoint.id, status="done")
        .where(IngestRun.n_sketched > 0)
        .order_by(IngestRun.id)
        .options(joinedload(IngestRun.source), joinedload(IngestRun.variant))
    )
    found: dict[tuple[str, int, int], list[IngestRun]] = {}
    for run in runs:
        found.setdefault((run.fingerprint, run.source_id, run.variant_id), []).append(run)
    return [
        Group(sketcher, fp, checkpoint, same[0].source, same[0].variant, tuple(r.id for r in same))
        for (fp, _, _), same in found.items()
    ]


@dataclass(frozen=True)
class Wanted:
    """What a question was asked about, by name; see `Store.top`."""

    checkpoints: Sequence[str]
    sketcher: str
    queries: str | None = None
    sources: Sequence[str] = ()
    variants: Sequence[str] = ()
    query_checkpoint: str | None = None
    query_variant: str | None = None
    method: str | None = None
    over_checkpoints: str | None = None

    def resolved_method(self) -> Method:
        """Return the method, chosen or by default.

        Raises
        ------
        InputError
            There is no such method, or it does not go with the checkpoints asked for.
        """
        other = self.query_checkpoint is not None and [self.query_checkpoint] != list(self.checkpoints)
        two_stage = other and self.over_checkpoints is None
        method = Method.of(self.method, self.over_checkpoints, default="dot" if two_stage else "cosine")
        if method.over is None and len(self.checkpoints) > 1:
            named = ", ".join(f"`{name}`" for name in self.checkpoints)
            raise InputError(
                f"`{method.name}` looks at one checkpoint, not at {named}",
                "`--over-checkpoints sum` (or `lr-weighted`) sums the scores of several",
            )
        if other and (method.over or method.base == "centred"):
            raise InputError(
                f"`{method.name}` takes queries and samples from the same checkpoints", "leave one of them out"
            )
        if len(set(self.checkpoints)) < len(self.checkpoints):
            raise InputError("a checkpoint is named twice", "a sum has each checkpoint once")
        return method


def ask(db: Database, wanted: Wanted) -> list[Question]:
    """Resolve names into questions: one, or with `queries` None one for each source of stage `query`.

    Raises
    ------
    NameUnknownError, NothingToScoreError, InputError
    """
    method = wanted.resolved_method()
    per_checkpoint = [_terms(db, wanted, name, method) for name in wanted.checkpoints]
    names = list(per_checkpoint[0])
    for terms in per_checkpoint[1:]:
        names = [name for name in names if name in terms]
    return [Question([terms[name] for terms in per_checkpoint], method) for name in names]


def ask_new(db: Database, wanted: Wanted, fingerprint: str) -> Question:
    """Resolve names into a question about a text that is not in the store, sketched as `fingerprint`."""
    method = wanted.resolved_method()
    if len(wanted.checkpoints) > 1:
        raise InputError("a new text is sketched at one checkpoint", "give one `--checkpoint`")
    with db.session() as session:
        by, at, weight = _found(session, wanted, wanted.checkpoints[0], method)
        here = committed_groups(session, by, at)
    groups = [g for g in _searched(db, wanted, here, by, at) if g.fingerprint == fingerprint]
    if not groups:
        raise NothingToScoreError(
            f"no sketches at `{at.name}` can be compared with the text's: the models' parameters differ",
            "ask at a checkpoint of the same model",
        )
    return Question([Term(None, groups, weight)], method)


def searched_groups(db: Database, wanted: Wanted) -> list[Group]:
    """Return the groups that would be searched at the last checkpoint."""
    with db.session() as session:
        by, at, _ = _found(session, wanted, wanted.checkpoints[-1], Method())
        here = committed_groups(session, by, at)
    return _searched(db, wanted, here, by, at)


def _found(session: Session, wanted: Wanted, checkpoint: str, method: Method) -> tuple[Sketcher, Checkpoint, float]:
    """Find what is named; returns the sketcher, the checkpoint and its weight."""
    by, at = find(session, Sketcher, wanted.sketcher), find(session, Checkpoint, checkpoint)
    for kind, names in ((Source, wanted.sources), (FormatVariant, wanted.variants)):
        for name in names:
            find(session, kind, name)
    if wanted.queries is not None and find(session, Source, wanted.queries).stage != "query":
        raise InputError(f"source `{wanted.queries}` has not the stage `query`", "queries are samples of such a source")
    if wanted.query_variant is not None:
        find(session, FormatVariant, wanted.query_variant)
    if method.over != "lr-weighted":
        return by, at, 1.0
    if at.learning_rate is None:
        raise InputError(
            f"`{method.name}` weighs checkpoints by learning rate, and `{at.name}` has none",
            "add the checkpoint with `--learning-rate`",
        )
    return by, at, at.learning_rate


def _terms(db: Database, wanted: Wanted, checkpoint: str, method: Method) -> dict[str, Term]:
    """Return one checkpoint's term for each query source."""
    with db.session() as session:
        by, at, weight = _found(session, wanted, checkpoint, method)
        query_at = find(session, Checkpoint, wanted.query_checkpoint or checkpoint)
        here = committed_groups(session, by, at)
        there = here if query_at.id == at.id else committed_groups(session, by, query_at)
    asked = _query_groups(there, wanted.queries, wanted.query_variant)
    if not asked:
        what = f"`{wanted.queries}`" if wanted.queries else "any queries"
        what += f" as `{wanted.query_variant}`" if wanted.query_variant else ""
        raise _nothing(db, what, query_at, by)
    groups = _searched(db, wanted, here, by, at)
    return {q.source.name: Term(q, _comparable(q, groups), weight) for q in asked}


def _searched(db: Database, wanted: Wanted, here: list[Group], by: Sketcher, at: Checkpoint) -> list[Group]:
    """Return the groups to search: of the sources and variants named, else all that are no queries."""
    sources, variants = wanted.sources, wanted.variants
    groups = [
        g
        for g in here
        if (g.source.name in sources if sources else g.source.stage != "query")
        and (not variants or g.variant.name in variants)
    ]
    missing = set(sources) - {g.source.name for g in groups}
    if not groups or missing:
        what = " and ".join(f"`{name}`" for name in (*(sorted(missing) or sources), *variants)) or "any source"
        raise _nothing(db, what, at, by)
    return groups


def _query_groups(groups: list[Group], queries: str | None, variant: str | None) -> list[Group]:
    """Return the query group of each query source; where several variants were sketched, `chatml` is taken."""
    found: dict[str, list[Group]] = {}
    for group in groups:
        if group.source.stage == "query" and queries in (None, group.source.name):
            found.setdefault(group.source.name, []).append(group)
    chosen = []
    for same in found.values():
        by_name = {group.variant.name: group for group in same}
        name = variant or (next(iter(by_name)) if len(by_name) == 1 else "chatml")
        if name in by_name:
            chosen.append(by_name[name])
        elif variant is None:
            have = ", ".join(f"`{n}`" for n in by_name)
            raise InputError(f"the queries are sketched as {have}", "choose one with `--query-variant`")
    return chosen


def _nothing(db: Database, what: str, checkpoint: Checkpoint, sketcher: Sketcher) -> NothingToScoreError:
    """Say that sketches are missing, and whether another sketcher made some at this checkpoint."""
    with db.session() as session:
        runs = select(IngestRun).filter_by(checkpoint_id=checkpoint.id, status="done")
        others = {run.sketcher.name for run in session.scalars(runs)} - {sketcher.name}
    if others:
        named = ", ".join(f"`{name}`" for name in sorted(others))
        hint = f"this checkpoint has sketches by {named}: choose with `--sketcher NAME`"
    elif sketcher.correction == "imported":
        hint = f"import them with `lark-store sketcher import {sketcher.name} FILE --checkpoint {checkpoint.name} …`"
    else:
        hint = f"make them with `lark-store ingest --checkpoint {checkpoint.name} --source NAME --variant NAME`"
    return NothingToScoreError(
        f"there are no committed `{sketcher.name}` sketches of {what} at checkpoint `{checkpoint.name}`", hint
    )


def _comparable(queries: Group, groups: list[Group]) -> list[Group]:
    """Keep the groups whose sketches can be compared with the queries'."""
    same = [g for g in groups if g.fingerprint == queries.fingerprint]
    if not same:
        raise NothingToScoreError(
            f"the sketches at `{groups[0].checkpoint.name}` can't be compared with the queries' at "
            f"`{queries.checkpoint.name}`: the models' parameters differ",
            "compare checkpoints of one model, sketched by one sketcher",
        )
    return same
