"""`format`: how well a score separates formats, which it should not, and sources and domains.

A query's AUC is how often a sample of one group scores higher than one of the other (ties count half); the figure is
the mean over queries.

    format          samples in the queries' variant (or the first variant) against the same samples in the others; .5
                    means no effect of the format
    source NAME     samples of one source against all others, within each variant, averaged over variants; 1 means the
                    score separates the source perfectly
    domain NAME     the same for a domain

A score may separate sources by their format: read the figures together. Shape letters: Q queries, N samples.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lark_store.errors import InputError
from lark_store.evaluate.evaluation import Task
from lark_store.specs import EvaluateSpec, FormatSpec, build
from lark_store.stats.ranks import auc
from lark_store.store.base import clear, keywords

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Unpack

    from numpy.typing import NDArray

    from lark_store.evaluate.evaluation import Outcome
    from lark_store.evaluate.scorers import ScoreSpec
    from lark_store.results import OnProgress
    from lark_store.specs import FormatOptions
    from lark_store.store import Store

    Comparison = tuple[NDArray[np.bool_], NDArray[np.bool_]]  # masks of the compared and of the positive samples


@clear
@keywords(FormatSpec, EvaluateSpec)
def format(  # noqa: A001 (the command's name)
    store: Store,
    scores: Sequence[ScoreSpec],
    *,
    on_progress: OnProgress | None = None,
    **options: Unpack[FormatOptions],
) -> Outcome:
    """Measure how well scores separate formats and, on request, sources and domains.

    Measures: `format` with several variants, `source NAME` for each of `against_rest` and `domain NAME` for each of
    `domains`. Every source is taken in every variant.

    Raises
    ------
    InputError
        Nothing to compare: one variant and no source or domain, or a group of all samples or none.
    NameUnknownError, NothingToScoreError
    """
    task = Task("format", store, scores, build(EvaluateSpec, options), on_progress)
    spec = build(FormatSpec, options)
    comparisons = _comparisons(task, spec)
    if not comparisons:
        raise InputError(
            "there is nothing to compare", "give two variants, a source with `--against-rest`, or a `--domain`"
        )
    for measure, of_variants in comparisons.items():
        for is_in, is_positive in of_variants:
            n, total = int((is_positive & is_in).sum()), int(is_in.sum())
            if not 0 < n < total:
                raise InputError(f"`{measure}` has {n} of {total} samples", "a comparison needs samples in both groups")
    task.prepare(against_rest=list(spec.against_rest), domains=list(spec.domains))
    for name, score_QN in task.matrices.items():
        for measure, of_variants in comparisons.items():
            auc_VQ = [auc(score_QN[:, is_in], is_positive[is_in]) for is_in, is_positive in of_variants]
            task.add(name, measure, np.mean(auc_VQ, axis=0))
    return task.finish()


def _comparisons(task: Task, spec: FormatSpec) -> dict[str, list[Comparison]]:
    """Return the comparisons of each measure; the measure is their mean."""
    texts = task.material.samples
    of_domain = dict(task.store.sql("select name, domain from sources").iter_rows())
    variant_N, source_N = np.array([text.variant for text in texts]), np.array([text.source for text in texts])
    domain_N = np.array([of_domain[text.source] or "" for text in texts])
    comparisons: dict[str, list[Comparison]] = {}
    variants = task.spec.variants
    if len(variants) > 1:
        own_variant = task.spec.query_variant if task.spec.query_variant in variants else variants[0]
        comparisons["format"] = [(np.ones(len(texts), dtype=bool), variant_N == own_variant)]
    positive = {f"source {name}": source_N == name for name in spec.against_rest}
    positive |= {f"domain {name}": domain_N == name for name in spec.domains}
    for measure, is_positive in positive.items():
        comparisons[measure] = [(variant_N == name, is_positive) for name in variants]
    return comparisons
