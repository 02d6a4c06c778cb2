r"""`lds`: whether the sum of a score over a training set foretells a query's loss after training on it.

The linear datamodeling score (Park et al. 2023). Each of m random halves S_1 … S_m of the samples is trained on from
one checkpoint; L_j(q) is the query's loss afterwards. For each query

    LDS(q) = Spearman over j of ( Σ_{z ∈ S_j} score(z, q),  −L_j(q) )

and the figure is the mean over queries. With several seeds of training, L_j is the mean over seeds (measure `lds`);
`lds of one seed` is the mean over the seeds of the LDS against each one's losses; there `another seed (ceiling)` is the
mean over pairs of seeds of how well the losses of one foretell the other's: what a second training reaches as a score.

The interval is over queries. Which half sets were drawn is another source of noise, which it does not have: with m sets
a single rank correlation has a standard error of about 1/√(m − 1), partly shared by all queries. Differences between
scores are on the same sets and suffer less.

Shape letters: Q queries, N samples, M half sets, S seeds.
"""

from __future__ import annotations

from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lark_store.errors import InputError
from lark_store.evaluate.agree import spearman
from lark_store.evaluate.journal import digest, journal
from lark_store.evaluate.task import Task
from lark_store.evaluate.training import Recipe, Start, losses, train
from lark_store.schema.records import Progress
from lark_store.store.part import clear

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, Unpack

    from numpy.typing import NDArray

    from lark_store.evaluate.scorers import Asked
    from lark_store.evaluate.task import Options, Outcome
    from lark_store.store import Store

ANOTHER = "another seed (ceiling)"


@clear
def lds(
    store: Store,
    scores: Sequence[Asked],
    *,
    checkpoint: str,
    half_sets: int = 40,
    seeds: int = 1,
    epochs: int = 1,
    learning_rate: float = 1e-4,
    batch_size: int = 4,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    **options: Unpack[Options],
) -> Outcome:
    """Retrain on random half sets from a checkpoint, and correlate summed scores with the queries' losses.

    Each half set's losses are on the disk before the next is trained: killed and run again, it goes on, and more half
    sets or seeds can be added later. Trains by AdamW with one learning rate and shuffled batches. Measures: `lds` and,
    with several seeds, `lds of one seed`, where a method `another seed (ceiling)` is added.

    Raises
    ------
    InputError
        Fewer than 3 half sets, a half set of fewer than 2 samples, an impossible recipe.
    NameUnknownError, NothingToScoreError, CheckpointError, StoreBusyError
    """
    if half_sets < 3 or seeds < 1:
        raise InputError(f"{half_sets} half sets of {seeds} seeds have no rank correlation", "take 3 or more half sets")
    task = Task("lds", store, scores, **options)
    recipe = Recipe(epochs, learning_rate, batch_size, weight_decay, max_grad_norm)
    if len(task.variants) != 1:
        raise InputError("half sets are trained on in one variant", "name one with `--variant`")
    size = len(task.material.samples) // 2
    if size < 2:
        raise InputError(f"a half of {len(task.material.samples)} samples is fewer than 2", "take a larger source")
    matrices = task.matrices  # what is wrong with a score is said before hours of training
    member_MN = members(len(task.material.samples), half_sets, task.seed)
    loss_SMQ = _retrained(task, checkpoint, recipe, member_MN, seeds)
    flat = [
        q
        for q, spread in zip(task.material.query_ids, np.ptp(loss_SMQ.mean(axis=0), axis=0), strict=True)
        if spread == 0
    ]
    if flat:
        task.notes.append(
            f"the loss of {len(flat)} queries is the same after every half set, such as `{flat[0]}`: left out"
        )
    for name, score_QN in matrices.items():
        summed_QM = score_QN.astype(np.float64) @ member_MN.T
        task.add(name, "lds", spearman(summed_QM, -loss_SMQ.mean(axis=0).T))
        for seed in range(seeds if seeds > 1 else 0):
            task.add(name, "lds of one seed", spearman(summed_QM, -loss_SMQ[seed].T), trial=seed)
    for trial, (one, other) in enumerate(combinations(range(seeds), 2)):
        task.add(ANOTHER, "lds of one seed", spearman(loss_SMQ[one].T, loss_SMQ[other].T), trial=trial)
    return task.finish(checkpoint=checkpoint, half_sets=half_sets, seeds=seeds, **asdict(recipe))


def members(n: int, half_sets: int, seed: int) -> NDArray[np.bool_]:
    """Draw half sets of n samples, (M, N) bool: ⌊n/2⌋ each; the first are the same however many are drawn."""
    member_MN = np.zeros((half_sets, n), dtype=bool)
    for j, row in enumerate(member_MN):
        row[np.random.default_rng([seed, j]).permutation(n)[: n // 2]] = True
    return member_MN


def _retrained(
    task: Task, checkpoint: str, recipe: Recipe, member_MN: NDArray[np.bool_], seeds: int
) -> NDArray[np.float64]:
    """Return the queries' losses after training on each half set, (S, M, Q), in nats per target token."""
    loaded, start = task.load(checkpoint), None
    samples, queries = loaded.tokens(task.material.samples), loaded.tokens(task.material.queries)
    predicted = sum(sample.rule == "predicted" for sample in samples)
    if predicted:
        task.notes.append(
            f"{predicted} of {len(samples)} samples have the model's own predictions for labels: training on them "
            "teaches nothing of their text; a variant with `--targets text` has their own tokens"
        )
    pieces = {f"seed {s}, half set {j}": (s, j) for s in range(seeds) for j in range(len(member_MN))}
    with journal(Path(task.out), "lds", _identity(task, checkpoint, recipe, samples, queries)) as kept:
        for done, (piece, (seed, j)) in enumerate(pieces.items()):
            if piece not in kept.done:
                start = start or Start(loaded.model)
                train(start, [samples[i] for i in np.flatnonzero(member_MN[j])], recipe, [task.seed, seed, j])
                kept.add(piece, losses(loaded.model, queries).tolist())
            assert task.on_progress is not None
            task.on_progress(Progress("retraining on half sets", done + 1, len(pieces)))
        found = [kept.done[piece] for piece in pieces]
    loss_SMQ = np.array(found).reshape(seeds, len(member_MN), len(queries))
    if not np.isfinite(loss_SMQ).all():
        raise InputError("after training, a query's loss is no number", "lower the learning rate")
    return loss_SMQ


def _identity(task: Task, checkpoint: str, recipe: Recipe, samples: Any, queries: Any) -> dict[str, Any]:
    """Return what decides the losses after a half set; not how many are drawn, nor which scores are asked for."""
    texts = {
        name: digest([[text.input_ids, text.is_target, text.rule] for text in some])
        for name, some in (("samples", samples), ("queries", queries))
    }
    return (
        {"weights": task.weights(checkpoint), "seed": task.seed, "precision": task.precision} | texts | asdict(recipe)
    )
