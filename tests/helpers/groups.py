"""Groups of sketches and jobs of scoring, by their names alone."""

from __future__ import annotations

from types import SimpleNamespace

from lark_store.query.answers.score_runs import Job
from lark_store.query.methods import Method
from lark_store.query.select.resolve import Group, Question, Term


def group(source, variant, *, stage="pretrain", runs=(1,), fingerprint="f", checkpoint="c"):
    """A group of sketches, by its names."""
    named = {"checkpoint": checkpoint, "source": source, "variant": variant}
    results = {kind: SimpleNamespace(id=name, name=name, stage=stage, domain=None) for kind, name in named.items()}
    return Group(SimpleNamespace(id=1, name="s"), fingerprint, runs=runs, **results)


def job(*runs, hits=5, method="cosine", **besides):
    """A job of scoring one source, with further inputs of its recipe."""
    terms = [Term(group("q", "raw", stage="query", runs=(9,)), [group("a", "raw", runs=runs)])]
    return Job(Question(terms, Method.of(method)), terms[0].groups[0], hits, besides)
