r"""`lds`: whether the sum of a score over a training set predicts a query's loss after training on it.

The linear datamodeling score (Park et al. 2023). The model is trained from one checkpoint on each of m random halves
S_1 … S_m of the samples; L_j(q) is the query's loss afterwards. For each query

    LDS(q) = Spearman over j of ( Σ_{z ∈ S_j} score(z, q),  −L_j(q) )

and the figure is the mean over queries. With several training seeds, L_j is the mean over seeds (measure `lds`);
`lds of one seed` averages the LDS against the losses of each seed. Its method `another seed (ceiling)` averages, over
pairs of seeds, how well the losses of one seed predict the other's: the score of a second training.

The interval is over queries and excludes the noise of drawing half sets: with m sets, a single rank correlation has a
standard error of about 1/√(m − 1), partly shared by all queries. Differences between scores use the same sets and
suffer less.

Shape letters: Q queries, N samples, M half sets, S seeds.
"""

from __future__ import annotations

from dataclasses import asdict
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from lark_store.errors import InputError
from lark_store.evaluate.evaluation import Task
from lark_store.evaluate.progress_log import digest, journal
from lark_store.evaluate.retrain import Start, train
from lark_store.modeling.losses import losses
from lark_store.results import Progress
from lark_store.specs import EvaluateSpec, LdsSpec, TrainingSpec, build
from lark_store.stats.ranks import spearman
from lark_store.store.base import clear, keywords

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, Unpack

    from numpy.typing import NDArray

    from lark_store.evaluate.evaluation import Outcome
    from lark_store.evaluate.scorers import ScoreSpec
    from lark_store.results import OnProgress
    from lark_store.specs import LdsOptions
    from lark_store.store import Store

ANOTHER = "another seed (ceiling)"


@clear
@keywords(LdsSpec, TrainingSpec, EvaluateSpec)
def lds(
    store: Store,
    scores: Sequence[ScoreSpec],
    *,
    checkpoint: str,
    on_progress: OnProgress | None = None,
    **options: Unpack[LdsOptions],
) -> Outcome:
    """Retrain on random half sets from a checkpoint, and correlate summed scores with the queries' losses.

    Resumable: each half set's losses are on disk before the next training, and more half sets or seeds can be added
    later. Trains with AdamW, a constant learning rate and shuffled batches. Measures: `lds` and, with several seeds,
    `lds of one seed`, which adds the method `another seed (ceiling)`.

    Raises
    ------
    InputError
        Fewer than 3 half sets, a half set of fewer than 2 samples, or an invalid recipe.
    NameUnknownError, NothingToScoreError, CheckpointError, StoreBusyError
    """
    spec = build(LdsSpec, options)
    if spec.half_sets < 3 or spec.seeds < 1:
        raise InputError(
            f"{spec.half_sets} half sets of {spec.seeds} seeds have no rank correlation", "use 3 or more half sets"
        )
    task = Task("lds", store, scores, build(EvaluateSpec, options), on_progress)
    recipe = build(TrainingSpec, options)
    if len(task.spec.variants) != 1:
        raise InputError("half sets are trained on in one variant", "choose one with `--variant`")
    size = len(task.material.samples) // 2
    if size < 2:
        raise InputError(f"half of {len(task.material.samples)} samples is fewer than 2", "choose a larger source")
    task.prepare(checkpoint=checkpoint, **asdict(spec), **asdict(recipe))
    matrices = task.matrices  # computed first: a wrong score fails before hours of training
    member_MN = members(len(task.material.samples), spec.half_sets, task.spec.seed)
    loss_SMQ = _retrained(task, checkpoint, recipe, member_MN, spec.seeds)
    flat = [
        q
        for q, spread in zip(task.material.query_ids, np.ptp(loss_SMQ.mean(axis=0), axis=0), strict=True)
        if spread == 0
    ]
    if flat:
        task.notes.append(
            f"skipped {len(flat)} queries whose loss is the same after every half set, such as `{flat[0]}`"
        )
    for name, score_QN in matrices.items():
        summed_QM = score_QN.astype(np.float64) @ member_MN.T
        task.add(name, "lds", spearman(summed_QM, -loss_SMQ.mean(axis=0).T))
        for seed in range(spec.seeds if spec.seeds > 1 else 0):
            task.add(name, "lds of one seed", spearman(summed_QM, -loss_SMQ[seed].T), trial=seed)
    for trial, (first, second) in enumerate(combinations(range(spec.seeds), 2)):
        task.add(ANOTHER, "lds of one seed", spearman(loss_SMQ[first].T, loss_SMQ[second].T), trial=trial)
    return task.finish()


def members(n: int, half_sets: int, seed: int) -> NDArray[np.bool_]:
    """Draw half sets of n samples, (M, N) bool, ⌊n/2⌋ each; drawing more leaves the first ones unchanged."""
    member_MN = np.zeros((half_sets, n), dtype=bool)
    for j, row in enumerate(member_MN):
        row[np.random.default_rng([seed, j]).permutation(n)[: n // 2]] = True
    return member_MN


def _retrained(
    task: Task, checkpoint: str, recipe: TrainingSpec, member_MN: NDArray[np.bool_], seeds: int
) -> NDArray[np.float64]:
    """Return the queries' losses after training on each half set, (S, M, Q), in nats per target token."""
    loaded, start = task.load(checkpoint), None
    samples, queries = loaded.tokens(task.material.samples), loaded.tokens(task.material.queries)
    predicted = sum(sample.rule == "predicted" for sample in samples)
    if predicted:
        task.notes.append(
            f"{predicted} of {len(samples)} samples use the model's own predictions as labels: training on them "
            "teaches nothing about their text; a variant with `--targets text` uses their own tokens"
        )
    pieces = {f"seed {s}, half set {j}": (s, j) for s in range(seeds) for j in range(len(member_MN))}
    with journal(task.folder, "lds", _identity(task, checkpoint, recipe, samples, queries)) as log:
        for number, (piece, (seed, j)) in enumerate(pieces.items()):
            if piece not in log.done:
                start = start or Start(loaded.model)
                train(start, [samples[i] for i in np.flatnonzero(member_MN[j])], recipe, [task.spec.seed, seed, j])
                log.add(piece, losses(loaded.model, queries).tolist())
            task.on_progress(Progress("retraining on half sets", number + 1, len(pieces)))
        loss_rows = [log.done[piece] for piece in pieces]
    loss_SMQ = np.array(loss_rows).reshape(seeds, len(member_MN), len(queries))
    if not np.isfinite(loss_SMQ).all():
        raise InputError("a query's loss is not finite after training", "lower the learning rate")
    return loss_SMQ


def _identity(task: Task, checkpoint: str, recipe: TrainingSpec, samples: Any, queries: Any) -> dict[str, Any]:
    """Return everything that determines the losses after a half set: neither the number of sets nor the scores."""
    texts = {
        name: digest([[text.input_ids, text.is_target, text.rule] for text in tokens])
        for name, tokens in (("samples", samples), ("queries", queries))
    }
    return (
        {"weights": task.weights(checkpoint), "seed": task.spec.seed, "precision": task.spec.precision}
        | texts
        | asdict(recipe)
    )
