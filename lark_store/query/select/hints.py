"""Hints for searches without results: a command that would produce some, given the store's state."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import select
from sqlalchemy.orm import joinedload

from lark_store.core.names import IMPORTED, SUM_SEPARATOR
from lark_store.schema.catalog import Checkpoint, IngestRun, ScoreRun, Sketcher, Source

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from sqlalchemy.orm import Session

    from lark_store.query.select.score_filter import ScoreFilter
    from lark_store.schema.database import Database

_READ_ONLY = "a snapshot is read-only: create them in the store itself, without `--snapshot`"
_FAILED = 'they failed; see the reasons with `lark-store sql "select reason, count(*) from failures group by all"`'


def quoted(names: Iterable[str]) -> str:
    """Return names sorted and in backticks."""
    return ", ".join(f"`{name}`" for name in sorted(names))


def for_sketches(
    db: Database,
    sketcher: Sketcher,
    checkpoint: Checkpoint | None,
    sources: Sequence[str] = (),
    variants: Sequence[str] = (),
    *,
    stages: Sequence[str] = ("finetune", "pretrain"),
) -> str:
    """Return a hint for missing sketches of these sources (without sources, of a stage) at a checkpoint."""

    def is_selected(source: Source) -> bool:
        return source.name in sources if sources else source.stage in stages

    with db.session() as session:
        all_runs = _ingested(session, checkpoint)
        runs = [run for run in all_runs if is_selected(run.source)]
        partners = [
            run.checkpoint.name for run in all_runs if run.sketcher_id == sketcher.id and not is_selected(run.source)
        ]
        first = next(iter(_missing(session, is_selected, runs, sketcher)), None)
        checkpoints = list(session.scalars(select(Checkpoint.name).order_by(Checkpoint.id.desc())))
        sketchers = _covering([run for run in runs if not variants or run.variant.name in variants], sketcher, sources)
    if sketchers:
        place = "this checkpoint" if checkpoint else "the store"
        return f"{place} has sketches by {quoted(sketchers)}; choose one with `--sketcher NAME`"
    own_runs = [run for run in runs if run.sketcher_id == sketcher.id]
    sketched_as = {run.variant.name for run in own_runs if run.n_sketched} - set(variants)
    if variants and sketched_as:
        option = "--query-variant" if "query" in stages else "--variant"
        return f"they are sketched as {quoted(sketched_as)}; choose one with `{option} NAME`"
    if any(run.n_failed and not run.n_sketched for run in own_runs):
        return _FAILED
    place = checkpoint.name if checkpoint else next(iter([*partners, *checkpoints]), "NAME")
    return _READ_ONLY if db.is_snapshot else _ingest(sketcher, place, first, next(iter(variants), "chatml"), stages[0])


def _ingest(sketcher: Sketcher, checkpoint: str, source: str | None, variant: str, stage: str) -> str:
    """Return the command that creates the sketches, or without a source the one that adds it."""
    if sketcher.correction == IMPORTED:
        return f"import them with `lark-store sketcher import {sketcher.name} FILE --checkpoint {checkpoint} …`"
    if source is None:
        return f"add a source with `lark-store source add NAME FILE --stage {stage}`, then ingest it"
    options = f"--checkpoint {checkpoint} --source {source} --variant {variant} --sketcher {sketcher.name}"
    return f"create them with `lark-store ingest {options}`"


def for_scores(db: Database, scores: ScoreFilter, sketcher: Sketcher) -> str:
    """Return a hint where `metrics` finds no such scores by a sketcher."""
    method, checkpoints = scores.method, scores.checkpoints
    with db.session() as session:
        scored = list(session.scalars(select(ScoreRun).filter_by(status="done").where(ScoreRun.n_queries > 0)))
        within = [run for run in scored if _is_selected(run, scores)]
        at_checkpoints = [
            run
            for run in within
            if not checkpoints or (run.over_checkpoints or run.checkpoint.name).split(SUM_SEPARATOR)[-1] in checkpoints
        ]
        sketchers = {run.sketcher.name for run in at_checkpoints if run.method == method.name} - {sketcher.name}
        methods = {run.method for run in at_checkpoints if run.sketcher_id == sketcher.id} - {method.name}
        by_method = [run for run in scored if (run.method, run.sketcher_id) == (method.name, sketcher.id)]
        other = [run for run in by_method if run not in within]
        across = {run.query_checkpoint.name for run in other if run.query_checkpoint_id != run.checkpoint_id}
        command = None if db.is_snapshot else _attribute(session, scores, sketcher)
        elsewhere = {run.over_checkpoints or run.checkpoint.name for run in by_method if run in within}
        alternatives = [] if command or db.is_snapshot else _all(session)
        commands = [_attribute(session, scores, alternative) for alternative in alternatives]
    hints = [f"score with `{command}`"] if command else []
    if across:
        queried = f"there are such scores with the queries at {quoted(across)}"
        hints = [f"{queried}; choose them with `--query-checkpoint NAME`", *hints]
    if sketchers:
        hints.append(f"scores exist for {quoted(sketchers)}; choose one with `--sketcher NAME`")
    elif any(commands):
        hints.append(f"score with `{next(filter(None, commands))}`, then choose that sketcher here too")
    if not command and methods:
        hints.append(f"scores exist by {quoted(methods)}; choose one with `--method NAME`")
    if not command and elsewhere:
        hints.append(f"scores exist at {quoted(elsewhere)}; choose one with `--checkpoint NAME`")
    if hints:
        return "; ".join(hints)
    if db.is_snapshot:
        return "a snapshot is read-only: score in the store itself, without `--snapshot`"
    return _sketches_for_scores(db, sketcher, scores)


def _is_selected(run: ScoreRun, scores: ScoreFilter) -> bool:
    """Tell whether a run's queries are at the checkpoint that a filter selects."""
    if scores.is_across:
        return run.query_checkpoint.name == scores.query_checkpoint != run.checkpoint.name
    return run.query_checkpoint_id == run.checkpoint_id


def _sketches_for_scores(db: Database, sketcher: Sketcher, scores: ScoreFilter) -> str:
    """Return the hint for sketches missing before scoring: the samples', or the queries'."""
    samples_at = scores.checkpoints[0] if scores.checkpoints else None
    with db.session() as session:
        checkpoint = session.scalar(select(Checkpoint).filter_by(name=samples_at)) if samples_at else None
        runs = [run for run in _ingested(session, checkpoint) if run.sketcher_id == sketcher.id and run.n_sketched]
        lacks_samples = all(run.source.stage == "query" for run in runs)
        if scores.is_across and not lacks_samples:
            checkpoint = session.scalar(select(Checkpoint).filter_by(name=scores.query_checkpoint))
    return for_sketches(db, sketcher, checkpoint, stages=("finetune", "pretrain") if lacks_samples else ("query",))


def _ingested(session: Session, checkpoint: Checkpoint | None) -> list[IngestRun]:
    loaded = [
        joinedload(part) for part in (IngestRun.sketcher, IngestRun.checkpoint, IngestRun.source, IngestRun.variant)
    ]
    runs = select(IngestRun).filter_by(status="done").order_by(IngestRun.id).options(*loaded)
    return list(session.scalars(runs if checkpoint is None else runs.filter_by(checkpoint_id=checkpoint.id)))


def _all(session: Session) -> list[Sketcher]:
    return list(session.scalars(select(Sketcher).order_by(Sketcher.name)))


def _missing(
    session: Session, is_selected: Callable[[Source], bool], runs: list[IngestRun], sketcher: Sketcher
) -> list[str]:
    """Return the selected sources without sketches by the sketcher; all of them if none lack any."""
    sketched = {run.source_id for run in runs if run.sketcher_id == sketcher.id and run.n_sketched}
    selected = [source for source in session.scalars(select(Source).order_by(Source.id)) if is_selected(source)]
    return [source.name for source in selected if source.id not in sketched] or [source.name for source in selected]


def _covering(runs: list[IngestRun], sketcher: Sketcher, sources: Sequence[str]) -> set[str]:
    """Return the other sketchers with sketches of every source."""
    covered: dict[str, set[str]] = {}
    for run in runs:
        if run.sketcher_id != sketcher.id and run.n_sketched:
            covered.setdefault(run.sketcher.name, set()).add(run.source.name)
    return {name for name, names in covered.items() if names >= set(sources)}


def _attribute(session: Session, scores: ScoreFilter, sketcher: Sketcher) -> str | None:
    """Return the scoring command with the store's own names; None where sketches are missing."""
    method, checkpoints = scores.method, scores.checkpoints
    query_checkpoint = scores.query_checkpoint if scores.is_across else None
    queries: dict[str, list[str]] = {}
    samples: dict[str, None] = {}
    for run in _ingested(session, None):
        if run.sketcher_id == sketcher.id and run.n_sketched:
            if run.source.stage == "query":
                queries.setdefault(run.checkpoint.name, []).append(run.source.name)
            else:
                samples[run.checkpoint.name] = None
    if query_checkpoint is None:
        complete = [name for name in queries if name in samples]
    else:
        complete = [name for name in samples if query_checkpoint in queries and name != query_checkpoint]
    places = [name for name in complete if not checkpoints or name in checkpoints]
    if not places or (method.over and checkpoints and len(places) < len(checkpoints)):
        return None
    selected = places if method.over else places[:1]
    flags = " ".join(f"--checkpoint {name}" for name in selected)
    summing = f" --over-checkpoints {method.over}" if method.over else ""
    if query_checkpoint is not None:
        flags += f" --query-checkpoint {query_checkpoint}"
    queried = queries[query_checkpoint or selected[-1]][0]
    scoring = f"--method {method.base}{summing} --sketcher {sketcher.name}"
    return f"lark-store attribute {flags} --queries {queried} {scoring}"
