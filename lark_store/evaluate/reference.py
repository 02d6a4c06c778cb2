"""`spearman`: how well scores agree with another that is taken for the truth.

Per query, the rank correlation over the candidates of a score with the reference's; the figure is the mean over
queries. The reference may be slow: conjugate gradient on a small model, a score of one's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lark_store.errors import InputError
from lark_store.evaluate import agree
from lark_store.evaluate.scorers import matrices
from lark_store.evaluate.task import Task
from lark_store.store.part import clear

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Unpack

    from lark_store.evaluate.scorers import Asked
    from lark_store.evaluate.task import Options, Outcome
    from lark_store.store import Store


@clear
def spearman(store: Store, scores: Sequence[Asked], *, reference: Asked, **options: Unpack[Options]) -> Outcome:
    """Correlate scores with a reference's, query by query, over all candidates. The measure is `spearman`.

    Raises
    ------
    InputError
        Fewer than 3 samples.
    NameUnknownError, NothingToScoreError
    """
    task = Task("spearman", store, scores, **options)
    n = len(task.material.samples)
    if n < 3:
        raise InputError(f"{n} samples have no rank correlation", "take 3 or more")
    ((name, truth_QN),) = matrices(task.material, [reference], task.given).items()
    for method, score_QN in task.matrices.items():
        task.add(method, "spearman", agree.spearman(score_QN, truth_QN))
    return task.finish(reference=name)
