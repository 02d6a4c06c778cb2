"""`trace`: a model's own answer to a question, and the samples that drive it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import select

from lark_store.errors import NothingToScoreError
from lark_store.results import Trace
from lark_store.schema.catalog import Checkpoint, IngestRun, Sketcher
from lark_store.specs import Compute, SearchSpec, TraceSpec, build
from lark_store.store.top import ranked_new, with_distance, with_notes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lark_store.ingest.new_query import NewQuery
    from lark_store.modeling.answers import ModelAnswer
    from lark_store.schema.database import Database

_NAME = "question"


def trace(db: Database, question: str, checkpoint: str | None, options: Mapping[str, Any]) -> Trace:
    """Answer a question and rank the samples by their influence on the answer; see `Store.trace`."""
    from lark_store.ingest.new_query import NewQuerySketcher, sample_of
    from lark_store.modeling.answers import answer_question
    from lark_store.query.answers.stored_queries import ranking_of
    from lark_store.query.select.resolve import resolved_method
    from lark_store.query.select.sketchers import with_sketcher

    limit = build(TraceSpec, options).max_answer
    spec = build(SearchSpec, options, checkpoints=[checkpoint or newest(db, options.get("sketcher"))])
    ranking = ranking_of(db, spec, options)
    resolved_method(spec)  # a wrong method fails before the model is loaded
    spec, notes = with_sketcher(db, spec)
    sketched_as = spec.query_checkpoint or spec.checkpoints[0], spec.query_variant or "chatml"
    sketcher = NewQuerySketcher(
        db, sketcher=spec.sketcher, checkpoint=sketched_as[0], variant=sketched_as[1], compute=build(Compute, options)
    )
    answer = sketcher.once(
        "answer", (question, limit), lambda: answer_question(sketcher.model, sketcher.renderer, question, limit)
    )
    (query,) = sketcher.sketch([sample_of({"prompt": question, "response": answer.text})])
    (hits,) = ranked_new(db, [query], [_NAME], spec, ranking, sketched_as)
    hits = with_distance(db, with_notes(hits, (*notes, *_retokenized(query, answer))))
    return Trace(question, answer.text, answer.log_probability, len(answer.ids), answer.is_complete, hits)


def newest(db: Database, sketcher: str | None) -> str:
    """Return the checkpoint of the latest epoch, or the one added last, among those with sketches.

    Raises
    ------
    NothingToScoreError
        No checkpoint has any.
    """
    sketched = select(IngestRun.checkpoint_id).where(IngestRun.status == "done", IngestRun.n_sketched > 0)
    if sketcher is not None:
        sketched = sketched.join(Sketcher, Sketcher.id == IngestRun.sketcher_id).where(Sketcher.name == sketcher)
    order = (Checkpoint.epoch.is_not(None).desc(), Checkpoint.epoch.desc(), Checkpoint.id.desc())
    with db.session() as session:
        name = session.scalars(select(Checkpoint.name).where(Checkpoint.id.in_(sketched)).order_by(*order)).first()
    if name is None:
        by = f" by `{sketcher}`" if sketcher else ""
        raise NothingToScoreError(f"no checkpoint has sketches{by}", "create them with `lark-store ingest`")
    return name


def _retokenized(query: NewQuery, answer: ModelAnswer) -> tuple[str, ...]:
    """Return a note if the answer's text, rendered as a response, has other tokens than the model gave."""
    assert query.tokens is not None
    pairs = zip(query.tokens.input_ids, query.tokens.is_target, strict=True)
    if [token for token, is_target in pairs if is_target][: len(answer.ids)] == answer.ids:
        return ()
    return ("the answer was sketched as text: its tokens or targets are not those that the model gave",)
