"""The sketcher of a command that names none: the store's default, or the only one with sketches."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import select

from lark_store.core.names import SUM_SEPARATOR
from lark_store.errors import NothingToScoreError
from lark_store.query.select.hints import quoted
from lark_store.schema.catalog import Checkpoint, IngestRun, ScoreRun, Sketcher

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy.orm import Session

    from lark_store.query.select.score_filter import ScoreFilter
    from lark_store.schema.database import Database

_Spec = TypeVar("_Spec", bound=Any)


def with_sketcher(db: Database, spec: _Spec) -> tuple[_Spec, tuple[str, ...]]:
    """Return a spec of checkpoints with the sketcher to use, and a note if it is not the default one."""
    name, notes = sketcher_with_sketches(db, spec.sketcher, spec.checkpoints)
    return replace(spec, sketcher=name), notes


def sketcher_with_sketches(
    db: Database, name: str | None, checkpoints: Sequence[str] = ()
) -> tuple[str, tuple[str, ...]]:
    """Return the sketcher to use at some checkpoints (none: anywhere), and a note if it is not the default one.

    Without sketches of any sketcher, it is the default one.

    Raises
    ------
    NothingToScoreError
        Only several others have sketches.
    """
    made = select(Sketcher.name).join(IngestRun, IngestRun.sketcher_id == Sketcher.id)
    made = made.where(IngestRun.status == "done", IngestRun.n_sketched > 0)
    if checkpoints:
        made = made.join(Checkpoint, Checkpoint.id == IngestRun.checkpoint_id).where(Checkpoint.name.in_(checkpoints))
    return _only(db, name, made, "sketches", checkpoints)


def sketcher_with_scores(db: Database, name: str | None, scores: ScoreFilter) -> tuple[str, tuple[str, ...]]:
    """Return the same for stored scores."""
    method, checkpoints = scores.method, scores.checkpoints
    made = select(Sketcher.name).join(ScoreRun, ScoreRun.sketcher_id == Sketcher.id)
    made = made.where(ScoreRun.status == "done", ScoreRun.n_queries > 0, ScoreRun.method == method.name)
    is_same = ScoreRun.query_checkpoint_id == ScoreRun.checkpoint_id
    if scores.is_across:
        made = made.where(~is_same, ScoreRun.query_checkpoint.has(name=scores.query_checkpoint))
    else:
        made = made.where(is_same)
    if checkpoints:
        made = made.join(Checkpoint, Checkpoint.id == ScoreRun.checkpoint_id).where(Checkpoint.name.in_(checkpoints))
    return _only(db, name, made, f"`{method.name}` scores", checkpoints)


def sketched_checkpoints(session: Session, sketcher: Sketcher) -> list[Checkpoint]:
    """Return the checkpoints with sketches of a sketcher, by epoch."""
    sketched = select(IngestRun.checkpoint_id).filter_by(sketcher_id=sketcher.id, status="done")
    order = (Checkpoint.epoch.is_not(None), Checkpoint.epoch, Checkpoint.id)
    return list(session.scalars(select(Checkpoint).where(Checkpoint.id.in_(sketched)).order_by(*order)))


def _only(
    db: Database, name: str | None, made: Any, what: str, checkpoints: Sequence[str]
) -> tuple[str, tuple[str, ...]]:
    """Return the given name, or the default if `made` selects it or nothing, or the only one it selects."""
    if name is not None:
        return name, ()
    default = db.default_sketcher
    with db.session() as session:
        names = set(session.scalars(made.distinct()))
    if default in names or not names:
        return default, ()
    place = f" at `{SUM_SEPARATOR.join(checkpoints)}`" if checkpoints else ""
    fact = f"the default sketcher `{default}` has no {what}{place}"
    if len(names) > 1:
        raise NothingToScoreError(f"{fact}, but {quoted(names)} have", "choose one with `--sketcher NAME`")
    (other,) = names
    return other, (f"{fact}; this is by `{other}`, the only sketcher that has some",)
