"""Defaults of an ingest: every checkpoint, every source, and each source in its usual variants.

A source's usual variants are those it has sketches in, by the same sketcher or else by any; `chatml` if it has none.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sqlalchemy import select
from sqlalchemy.orm import joinedload

from lark_store.core.text import joined
from lark_store.errors import InputError
from lark_store.schema.catalog import Checkpoint, IngestRun, Source
from lark_store.schema.database import find_sketcher

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from lark_store.schema.catalog import Sketcher
    from lark_store.schema.database import Database
    from lark_store.specs import IngestSpec

DEFAULT_VARIANT = "chatml"


@dataclass(frozen=True)
class ResolvedIngest:
    """An ingest with all names: `spec` has its checkpoints and sources, `variants` those of each source.

    `chosen` says in words which names were not given.
    """

    spec: IngestSpec
    variants: dict[str, list[str]]
    chosen: list[str]


def resolved(db: Database, spec: IngestSpec) -> ResolvedIngest:
    """Return an ingest with the names that its spec leaves out.

    Raises
    ------
    NameUnknownError
    InputError
        The store has no checkpoint or no source, or a source is known by candidates only.
    """
    with db.session() as session:
        sketcher = find_sketcher(session, spec.sketcher)
        checkpoints = list(spec.checkpoints) or _all(session, Checkpoint, "checkpoint")
        sources = list(spec.sources) or _all(session, Source, "source")
        runs = {name: _runs(session, name, sketcher) for name in sources}
    if not spec.sources and spec.candidates is None:
        for name in sources:
            _check_not_candidates(name, runs[name])
    variants = {name: list(spec.variants) or _usual(runs[name]) for name in sources}
    chosen = [] if spec.checkpoints else [f"every checkpoint: {_listed(checkpoints)}"]
    if not (spec.sources and spec.variants):
        subject = "its usual variants" if spec.sources else "every source"
        chosen.append(f"{subject}: " + "; ".join(f"`{name}` as {_listed(variants[name])}" for name in sources))
    return ResolvedIngest(replace(spec, checkpoints=checkpoints, sources=sources), variants, chosen)


def _listed(names: list[str]) -> str:
    return joined((f"`{name}`" for name in names), "and")


def _all(session: Session, kind: type[Checkpoint | Source], label: str) -> list[str]:
    names = list(session.scalars(select(kind.name).order_by(kind.id)))
    if not names:
        raise InputError(f"the store has no {label}", f"add one with `lark-store {label} add`")
    return names


def _runs(session: Session, source: str, sketcher: Sketcher) -> list[IngestRun]:
    """Return the runs with sketches of a source: those by the sketcher, or else all."""
    made = select(IngestRun).filter_by(status="done").where(IngestRun.n_sketched > 0).order_by(IngestRun.id)
    runs = session.scalars(made.join(Source).where(Source.name == source).options(joinedload(IngestRun.variant))).all()
    return [run for run in runs if run.sketcher_id == sketcher.id] or list(runs)


def _usual(runs: list[IngestRun]) -> list[str]:
    return list(dict.fromkeys(run.variant.name for run in runs)) or [DEFAULT_VARIANT]


def _check_not_candidates(source: str, runs: list[IngestRun]) -> None:
    """Refuse to take the whole of a source whose sketches are all of candidates: it may be too large."""
    candidates = [run.recipe["candidates"] for run in runs if run.recipe.get("candidates")]
    if candidates and len(candidates) == len(runs):
        how = candidates[-1]
        raise InputError(
            f"source `{source}` has sketches of candidates only ({how['by']} for `{how['queries']}`)",
            "choose candidates again with `--candidates N`, or name the sources to sketch in full with `--source NAME`",
        )
