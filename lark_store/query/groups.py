"""Which sketches a question is about: groups (checkpoint × source × variant) of committed rows, and the queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sqlalchemy import select

from lark_store.errors import InputError, NothingToScoreError
from lark_store.schema.catalog import Checkpoint, FormatVariant, IngestRun, Sketcher, Source
from lark_store.schema.database import Database, find
from lark_store.schema.vectors import sketch_table, where

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sqlalchemy.orm import Session

METHODS = ("cosine", "dot")


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
class Question:
    """Queries (a group of stage `query`), the groups to score them against, and the method."""

    queries: Group
    groups: list[Group]
    method: str


def check_method(method: str) -> str:
    """Return `method` if there is such a score."""
    if method in METHODS:
        return method
    raise InputError(f"`{method}` is no method", f"the methods are {', '.join(f'`{m}`' for m in METHODS)}")


def committed_groups(session: Session, sketcher: Sketcher, checkpoint: Checkpoint) -> list[Group]:
    """Return all groups at a checkpoint, in the order they were first ingested. Unfinished runs don't count."""
    runs = session.scalars(
        select(IngestRun)
        .filter_by(sketcher_id=sketcher.id, checkpoint_id=checkpoint.id, status="done")
        .where(IngestRun.n_sketched > 0)
        .order_by(IngestRun.id)
    )
    found: dict[tuple[str, int, int], list[IngestRun]] = {}
    for run in runs:
        found.setdefault((run.fingerprint, run.source_id, run.variant_id), []).append(run)
    return [
        Group(sketcher, fp, checkpoint, same[0].source, same[0].variant, tuple(r.id for r in same))
        for (fp, _, _), same in found.items()
    ]


def ask(
    db: Database,
    *,
    checkpoint: str,
    queries: str | None,
    sources: Iterable[str] = (),
    variants: Iterable[str] = (),
    query_checkpoint: str | None = None,
    query_variant: str | None = None,
    sketcher: str,
    method: str | None = None,
) -> list[Question]:
    """Resolve names into questions: one, or with `queries` None one for each source of stage `query`.

    Raises
    ------
    NameUnknownError, NothingToScoreError, InputError
    """
    method = check_method(method or ("dot" if query_checkpoint and query_checkpoint != checkpoint else "cosine"))
    with db.session() as session:
        by = find(session, Sketcher, sketcher)
        at = find(session, Checkpoint, checkpoint)
        query_at = find(session, Checkpoint, query_checkpoint or checkpoint)
        for kind, names in ((Source, sources), (FormatVariant, variants)):
            for name in names:
                find(session, kind, name)
        if queries is not None and find(session, Source, queries).stage != "query":
            raise InputError(f"source `{queries}` has not the stage `query`", "queries are samples of such a source")
        if query_variant is not None:
            find(session, FormatVariant, query_variant)
        here, there = committed_groups(session, by, at), committed_groups(session, by, query_at)
    asked = _query_groups(there, queries, query_variant)
    if not asked:
        what = (f"`{queries}`" if queries else "any queries") + (f" as `{query_variant}`" if query_variant else "")
        raise _nothing(db, what, query_at, by)
    wanted = [
        g
        for g in here
        if (g.source.name in sources if sources else g.source.stage != "query")
        and (not variants or g.variant.name in variants)
    ]
    missing = set(sources) - {g.source.name for g in wanted}
    if not wanted or missing:
        what = " and ".join(f"`{name}`" for name in (*(sorted(missing) or sources), *variants)) or "any source"
        raise _nothing(db, what, at, by)
    return [Question(q, _comparable(q, wanted), method) for q in asked]


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
