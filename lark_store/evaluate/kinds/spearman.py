"""`spearman`: how well scores agree with a reference score, and how long they take.

    spearman             the rank correlation over the candidates, per query
    overhead_seconds     the time to prepare a score, once for all queries
    pairwise_seconds     the time to score all candidates for one query

The reference may be slow: conjugate gradient on a small model, or a custom score. Its times are reported too. In the
multi-stage paper's Table 1, each of ten trials draws 10 queries and 500 candidates. All queries of a trial share its
candidates, and the trials share what a score prepares.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lark_store.errors import InputError
from lark_store.evaluate.evaluation import Task
from lark_store.evaluate.scorers import name_of, timed
from lark_store.specs import EvaluateSpec, SpearmanSpec, build
from lark_store.stats import ranks
from lark_store.store.base import clear, keywords

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Unpack

    from lark_store.evaluate.evaluation import Outcome
    from lark_store.evaluate.scorers import ScoreSpec, Timed
    from lark_store.results import OnProgress
    from lark_store.specs import SpearmanOptions
    from lark_store.store import Store

OVERHEAD, PAIRWISE = "overhead_seconds", "pairwise_seconds"


@clear
@keywords(SpearmanSpec, EvaluateSpec)
def spearman(
    store: Store,
    scores: Sequence[ScoreSpec],
    *,
    reference: ScoreSpec,
    on_progress: OnProgress | None = None,
    **options: Unpack[SpearmanOptions],
) -> Outcome:
    """Correlate scores with a reference score, query by query, over all candidates, and time them.

    Measures: `spearman`, and in seconds `overhead_seconds` and `pairwise_seconds` (preparing a score once, and scoring
    all candidates for one query), also of the reference. With `trials`, each draws `max_queries` queries and
    `max_samples` candidates, and the table has `trial_sd`, the standard deviation of the trials' means.

    Raises
    ------
    InputError
        Fewer than 3 samples, or trials that would all be alike.
    NameUnknownError, NothingToScoreError
    """
    n_trials, shared = build(SpearmanSpec, options).trials, build(EvaluateSpec, options)
    if n_trials < 1:
        raise InputError(f"the number of trials must be at least 1, not {n_trials}", "the paper has `--trials 10`")
    if n_trials > 1 and shared.max_queries is None and shared.max_samples is None:
        raise InputError("all trials would be alike", "give `--max-queries` or `--max-samples`, which each trial draws")
    task = Task("spearman", store, scores, shared, on_progress, is_pool=n_trials > 1)
    trials = task.trials(n_trials)
    n = len(trials[0].samples)
    if n < 3:
        raise InputError(f"{n} samples have no rank correlation", "use 3 or more")
    task.prepare(also=[reference], reference=name_of(reference), **({"trials": n_trials} if n_trials > 1 else {}))
    results = {name_of(score): timed(trials, score, task.context) for score in scores}
    truth = results.get(name_of(reference)) or timed(trials, reference, task.context)
    for trial, material in enumerate(trials):
        number = trial if n_trials > 1 else None
        for method, of_trials in results.items():
            rho_Q = ranks.spearman(of_trials[trial].matrix, truth[trial].matrix)
            task.add(method, "spearman", rho_Q, number, material)
    _add_seconds(task, results | {name_of(reference): truth})
    return task.finish(has_spread=n_trials > 1)


def _add_seconds(task: Task, results: dict[str, list[Timed]]) -> None:
    for method, of_trials in results.items():
        for trial, result in enumerate(of_trials):
            number = trial if len(of_trials) > 1 else None
            task.add_overall(method, OVERHEAD, result.seconds.overhead, number)
            task.add_overall(method, PAIRWISE, result.seconds.pairwise, number)
