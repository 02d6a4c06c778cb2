"""`format`: what a score tells apart: the format of the samples, which it should not, and their source or domain.

Per query, the AUC is how often a sample of one sort has a higher score than one of another (ties half); the figure is
the mean over queries.

    format          samples as the queries' own variant (or the first one asked for) against the same samples in the
                    others; .5 says that the format makes no difference
    source NAME     samples of one source against those of all others, within each variant, then the mean of these; 1
                    says that the score knows where a sample is from
    domain NAME     the same of a domain

A score may tell sources apart by their format: read them together. Shape letters: Q queries, N samples.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lark_store.errors import InputError
from lark_store.evaluate.agree import auc
from lark_store.evaluate.task import Task
from lark_store.store.part import clear

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Unpack

    from numpy.typing import NDArray

    from lark_store.evaluate.scorers import Asked
    from lark_store.evaluate.task import Options, Outcome
    from lark_store.store import Store

    Sort = tuple[NDArray[np.bool_], NDArray[np.bool_]]  # which samples are compared, and which of them are positive


@clear
def format(  # noqa: A001 (the command's name)
    store: Store,
    scores: Sequence[Asked],
    *,
    against_rest: Sequence[str] = (),
    domains: Sequence[str] = (),
    **options: Unpack[Options],
) -> Outcome:
    """Measure how well scores tell apart formats and, where asked for, sources and domains.

    Measures: `format` where there are several variants, `source NAME` for each of `against_rest` and `domain NAME` for
    each of `domains`. Every source is taken in every variant.

    Raises
    ------
    InputError
        There is nothing to tell apart: one variant and no source or domain, or one that all samples or none have.
    NameUnknownError, NothingToScoreError
    """
    task = Task("format", store, scores, **options)
    sorts = _sorts(task, against_rest, domains)
    if not sorts:
        raise InputError(
            "there is nothing to tell apart", "name two variants, a source with `--against-rest`, or a `--domain`"
        )
    for measure, of_variants in sorts.items():
        for is_in, is_positive in of_variants:
            n, of = int((is_positive & is_in).sum()), int(is_in.sum())
            if not 0 < n < of:
                raise InputError(f"`{measure}`: {n} of {of} samples are of that sort", "some must be, and others not")
    for name, score_QN in task.matrices.items():
        for measure, of_variants in sorts.items():
            each = [auc(score_QN[:, is_in], is_positive[is_in]) for is_in, is_positive in of_variants]
            task.add(name, measure, np.mean(each, axis=0))
    return task.finish(against_rest=list(against_rest), domains=list(domains))


def _sorts(task: Task, against_rest: Sequence[str], domains: Sequence[str]) -> dict[str, list[Sort]]:
    """Return what is told apart, by the measure's name: a pair for each comparison that its mean is taken over."""
    texts = task.material.samples
    of_domain = dict(task.store.sql("select name, domain from sources").iter_rows())
    variant_N, source_N = np.array([text.variant for text in texts]), np.array([text.source for text in texts])
    domain_N = np.array([of_domain[text.source] or "" for text in texts])
    made: dict[str, list[Sort]] = {}
    if len(task.variants) > 1:
        own = task.query_variant if task.query_variant in task.variants else task.variants[0]
        made["format"] = [(np.ones(len(texts), dtype=bool), variant_N == own)]
    positive = {f"source {name}": source_N == name for name in against_rest}
    positive |= {f"domain {name}": domain_N == name for name in domains}
    for measure, is_positive in positive.items():
        made[measure] = [(variant_N == name, is_positive) for name in task.variants]
    return made
