"""`top` for stored queries, samples and new texts, at one or several checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lark_store.core.names import SUM_SEPARATOR
from lark_store.errors import InputError
from lark_store.results import Hits, NewText
from lark_store.specs import Compute, SearchSpec, build
from lark_store.store.base import named
from lark_store.store.distance_notes import distance_note
from lark_store.store.rankings import Rankings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lark_store.ingest.new_query import NewQuery
    from lark_store.modeling.sample import Sample
    from lark_store.query.answers.top import Ranking
    from lark_store.schema.database import Database


@dataclass(frozen=True)
class Asked:
    """The queries to rank for: ids, or new texts; at one checkpoint or a sum of several, or at each of several."""

    query: str | Sequence[str] | None
    new: NewText | Sequence[NewText] | None
    checkpoint: str | Sequence[str] | None
    checkpoints: Sequence[str] | None

    @property
    def is_single(self) -> bool:
        """Whether the answer is one ranking."""
        return self.checkpoints is None and (isinstance(self.query, str) or isinstance(self.new, NewText))

    @property
    def passes(self) -> list[list[str]]:
        """The checkpoints of each ranking: those of a sum together."""
        if self.checkpoints is None:
            return [named(self.checkpoint or [])]
        if self.checkpoint is not None:
            raise InputError("`checkpoint` and `checkpoints` can't be combined", "give one of them")
        return [[name] for name in dict.fromkeys(named(self.checkpoints))]


def rankings(db: Database, asked: Asked, options: Mapping[str, Any]) -> Hits | Rankings:
    """Rank for each query at each checkpoint; see `Store.top`."""
    if (asked.query is None) == (asked.new is None):
        fact = "a query id and a new text can't be combined" if asked.new else "no query is given"
        raise InputError(fact, "give the id of a query, or a new text")
    from lark_store.query.answers.stored_queries import of_stored, ranking_of

    passes = asked.passes
    new = [asked.new] if isinstance(asked.new, NewText) else list(asked.new or ())
    queries = list(dict.fromkeys(named(asked.query, "query"))) if asked.query is not None else []
    if asked.query is None and not new:
        raise InputError("no query is given", "give the id of a query, or a new text")
    answers = []
    for names in passes:
        spec = build(SearchSpec, options, checkpoints=names)
        ranking = ranking_of(db, spec, options)
        answers.append(_of_new(db, new, spec, ranking) if new else of_stored(db, queries, spec, ranking))
    ordered = [with_distance(db, hits) for at_checkpoints in zip(*answers, strict=True) for hits in at_checkpoints]
    return ordered[0] if asked.is_single else Rankings(tuple(ordered))


def _of_new(db: Database, new: list[NewText], spec: SearchSpec, ranking: Ranking) -> list[Hits]:
    """Sketch texts and rank by them. Lives here because it needs both `ingest` and `query`."""
    from lark_store.ingest.new_query import NewQuerySketcher
    from lark_store.query.select.resolve import resolved_method
    from lark_store.query.select.sketchers import with_sketcher

    if len({text.precision for text in new}) > 1:
        raise InputError("the new queries name several precisions", "give all of them the same one")
    samples = [sample_of_new(text) for text in new]
    resolved_method(spec)  # a wrong method fails before the model is loaded
    spec, notes = with_sketcher(db, spec)
    variant, checkpoint = spec.query_variant or "chatml", spec.query_checkpoint or spec.checkpoints[0]
    compute = Compute(device=ranking.device, precision=new[0].precision, attention=new[0].attention)
    sketcher = NewQuerySketcher(db, sketcher=spec.sketcher, checkpoint=checkpoint, variant=variant, compute=compute)
    answers = ranked_new(db, sketcher.sketch(samples), _names(new), spec, ranking, (checkpoint, variant))
    return [with_notes(hits, notes) for hits in answers]


def ranked_new(
    db: Database,
    queries: Sequence[NewQuery],
    names: list[str],
    spec: SearchSpec,
    ranking: Ranking,
    sketched_as: tuple[str, str],
) -> list[Hits]:
    """Rank for new queries, sketched at one checkpoint in one variant (`sketched_as`)."""
    import numpy as np

    from lark_store.query.answers.top import top_of_new
    from lark_store.query.scoring.products import Queries, QueryBatch, normalized
    from lark_store.query.select.resolve import ask_new

    question = ask_new(db, spec, queries[0].fingerprint)
    unit = normalized(np.stack([query.sketch.vector.numpy() for query in queries]))
    norms = np.array([query.sketch.grad_norm for query in queries], np.float32)
    batch = QueryBatch(names, [Queries(names, unit, norms)], [query.text for query in queries], sketched_as[1])
    answers = top_of_new(db, batch, question, ranking, sketched_as)
    return [with_notes(hits, query.notes) for hits, query in zip(answers, queries, strict=True)]


def with_notes(hits: Hits, notes: tuple[str, ...]) -> Hits:
    """Return hits with further notes, before their own."""
    return replace(hits, notes=(*notes, *hits.notes))


def sample_of_new(new: NewText) -> Sample:
    """Return the sample of a new text.

    Raises
    ------
    InputError
        The text is incomplete, or given in several forms.
    """
    from lark_store.ingest.new_query import read_sample, sample_of

    is_pair = new.prompt is not None or new.response is not None
    if (new.file is not None) + (new.row is not None) + (new.text is not None) + is_pair > 1:
        raise InputError("a new query is given in one form only", "give a prompt and its response, a text, or a file")
    if new.row is not None:
        return sample_of(dict(new.row))
    if new.file is not None:
        return read_sample(new.file)
    if new.text is None and None in (new.prompt, new.response):
        raise InputError("the new query is incomplete", "give `--prompt` and `--response`, or `--text`")
    return sample_of({"prompt": new.prompt, "response": new.response, "text": new.text})


def _names(new: list[NewText]) -> list[str]:
    """Return the names of new queries: `new` for one; else the ids of their rows, or `new-1` and so on."""
    from lark_store.readers.fields import id_of

    if len(new) == 1:
        return ["new"]
    ids = [id_of(dict(text.row), {})[1] if text.row else None for text in new]
    names = [name or f"new-{number}" for number, name in enumerate(ids, start=1)]
    if len(set(names)) < len(names):
        twice = next(name for number, name in enumerate(names) if name in names[:number])
        raise InputError(f"two of the new queries have the id `{twice}`", "give each its own id, or none")
    return names


def with_distance(db: Database, hits: Hits) -> Hits:
    """Add a note with the distance between the query's and the samples' checkpoints, if they differ."""
    note = distance_note(db, hits.query_checkpoint, hits.checkpoint.split(SUM_SEPARATOR))
    return replace(hits, notes=(*hits.notes, note)) if note else hits
