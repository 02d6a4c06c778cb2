"""`causal` and `tail_patch`: the effect of one real optimizer step, on each sample or on a query's top samples.

`causal` steps from one checkpoint on each sample alone. The step's effect on a query is the drop in the query's loss.

    spearman     the rank correlation of a query's scores with the effects, over the samples
    sign         among the 10% of samples with the largest |effect|, the share whose score has the effect's sign; a
                 score of 0 has no sign

`tail_patch` (after Chang et al. 2024) steps on a score's top k samples as one batch. The measure is the change in the
log-probability of the query's answer (its target tokens), in nats; `random` and `bm25` are added for comparison.

`adam` needs second moments, measured at the checkpoint on `moment_samples` samples of stage `finetune`, or of the
candidates if there are none. Intervals are over queries. Shape letters: Q queries, N samples.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from lark_store.errors import InputError
from lark_store.evaluate.dataset import gather
from lark_store.evaluate.evaluation import Task
from lark_store.evaluate.optimizer_step import Stepper, second_moments
from lark_store.evaluate.progress_log import digest, journal
from lark_store.modeling.losses import losses
from lark_store.results import Progress
from lark_store.specs import EvaluateSpec, RankSpec, StepSpec, build
from lark_store.stats.ranks import spearman
from lark_store.store.base import clear, keywords

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Unpack

    import torch
    from numpy.typing import NDArray

    from lark_store.evaluate.dataset import Loaded, Text
    from lark_store.evaluate.evaluation import Outcome
    from lark_store.evaluate.progress_log import Journal
    from lark_store.evaluate.scorers import ScoreSpec
    from lark_store.modeling.tokens import Tokens
    from lark_store.results import OnProgress
    from lark_store.specs import StepOptions, TailPatchOptions
    from lark_store.store import Store

    Floats = NDArray[np.float64]

SIGN_SHARE = 0.1  # of the samples: those with the largest effects
CONTROLS = ("random", "bm25")


@clear
@keywords(StepSpec, EvaluateSpec)
def causal(
    store: Store,
    scores: Sequence[ScoreSpec],
    *,
    checkpoint: str,
    on_progress: OnProgress | None = None,
    **options: Unpack[StepOptions],
) -> Outcome:
    """Make one real optimizer step on each sample from a checkpoint, and correlate scores with its effects.

    Resumable: each sample's effects are on disk before the next step. `optimizer` is `adam` or `sgd`. Measures:
    `spearman` and `sign`.

    Raises
    ------
    InputError
        Fewer than 3 samples, or an unknown optimizer.
    NameUnknownError, NothingToScoreError, CheckpointError, StoreBusyError
    """
    task = Task("causal", store, scores, build(EvaluateSpec, options), on_progress)
    step = build(StepSpec, options, checkpoint=checkpoint)
    if len(task.material.samples) < 3:
        raise InputError(f"{len(task.material.samples)} samples have no rank correlation", "use 3 or more")
    _prepare(task, step)
    matrices = task.matrices  # computed first: a wrong score fails before the steps
    rows = []
    with _stepping(task, step) as steps:
        n = len(task.material.samples)
        for i in range(n):
            rows.append(steps.effects([i], range(len(steps.queries))))
            steps.say("steps on single samples", i + 1, n)
    effect_QN = np.array(rows).T
    for name, score_QN in matrices.items():
        task.add(name, "spearman", spearman(score_QN, effect_QN))
        task.add(name, "sign", right_signs(score_QN, effect_QN))
    return task.finish()


def right_signs(score_QN: NDArray[Any], effect_QN: Floats) -> Floats:
    """Return the share of right signs among the 10% of samples with the largest |effect|, (Q,).

    >>> right_signs(np.array([[-2.0, 0.0, 1.0]]), np.array([[-0.5, 0.1, 0.2]])).tolist()
    [1.0]
    """
    n = max(1, round(effect_QN.shape[1] * SIGN_SHARE))
    first_Qn = np.argsort(-np.abs(effect_QN), axis=1, kind="stable")[:, :n]
    is_right = np.sign(np.take_along_axis(score_QN, first_Qn, 1)) == np.sign(np.take_along_axis(effect_QN, first_Qn, 1))
    share_Q: Floats = is_right.mean(axis=1)
    return share_Q


@clear
@keywords(RankSpec, StepSpec, EvaluateSpec)
def tail_patch(
    store: Store,
    scores: Sequence[ScoreSpec],
    *,
    checkpoint: str,
    on_progress: OnProgress | None = None,
    **options: Unpack[TailPatchOptions],
) -> Outcome:
    """Make one step on a query's top `k` samples by a score, together, and measure the answer's gain.

    The measure `log-probability` is the change in the log-probability of the query's target tokens, in nats. `random`
    and `bm25` are always added. Resumable, like `causal`.

    Raises
    ------
    InputError
        k exceeds the number of samples or is below 1, or an unknown optimizer.
    NameUnknownError, NothingToScoreError, CheckpointError, StoreBusyError
    """
    names = [score if isinstance(score, str) else score.name for score in scores]
    controls = [name for name in CONTROLS if name not in names]
    task = Task("tail-patch", store, [*scores, *controls], build(EvaluateSpec, options), on_progress)
    k = options.get("k", RankSpec.k)
    step = build(StepSpec, options, checkpoint=checkpoint)
    if not 1 <= k <= len(task.material.samples):
        raise InputError(f"k = {k} is not between 1 and {len(task.material.samples)} samples", "for example `-k 10`")
    _prepare(task, step, k=k)
    first = {name: np.argsort(-score, axis=1, kind="stable")[:, :k] for name, score in task.matrices.items()}
    gained: dict[str, list[float]] = {name: [] for name in first}
    with _stepping(task, step) as steps:
        for q, query in enumerate(steps.queries):
            for name, top_Qk in first.items():
                (fall,) = steps.effects(sorted(top_Qk[q].tolist()), [q])
                gained[name].append(fall * query.n_targets)
            steps.say("steps on top samples", q + 1, len(steps.queries))
    for name, gains in gained.items():
        task.add(name, "log-probability", np.array(gains))
    return task.finish()


def _prepare(task: Task, step: StepSpec, **recipe: Any) -> None:
    """Check the task, and render the samples of the second moments."""
    task.prepare(**recipe, **asdict(step))
    if step.optimizer == "adam":
        task.load(step.checkpoint).tokens(_moment_texts(task, step))


@contextmanager
def _stepping(task: Task, step: StepSpec) -> Iterator[_Steps]:
    """Load the model and open the journal of its steps."""
    loaded = task.load(step.checkpoint)
    moments = loaded.tokens(_moment_texts(task, step)) if step.optimizer == "adam" else []
    identity = asdict(step) | {
        "checkpoint": task.weights(step.checkpoint),
        "moment_samples": [_hash(tokens) for tokens in moments],
        "precision": task.spec.precision,
    }
    with journal(task.folder, "steps", identity) as log:
        yield _Steps(task, step, loaded, moments, log)


def _moment_texts(task: Task, step: StepSpec) -> list[Text]:
    """Return the samples for the second moments: of the sources of stage `finetune`, or of the candidates."""
    tuning = task.store.sql("select name from sources where stage = 'finetune' order by name")["name"].to_list()
    return gather(
        task.store,
        sources=tuning or task.sources,
        variants=task.spec.variants[:1],
        queries=task.spec.queries,
        query_variant=task.spec.query_variant,
        max_samples=step.moment_samples,
        seed=task.spec.seed,
    ).samples


def _hash(tokens: Tokens) -> str:
    return digest([tokens.input_ids, tokens.is_target, tokens.rule])[:16]


class _Steps:
    """The steps of an evaluation, each made once; the first step measures the second moments."""

    def __init__(self, task: Task, step: StepSpec, loaded: Loaded, moments: list[Tokens], log: Journal) -> None:
        self.samples, self.queries = loaded.tokens(task.material.samples), loaded.tokens(task.material.queries)
        self._task, self._step, self._loaded, self._moment_samples, self._log = task, step, loaded, moments, log
        self._hash_Q, self._hash_N = [_hash(t) for t in self.queries], [_hash(t) for t in self.samples]
        self._before: dict[tuple[int, ...], torch.Tensor] = {}

    def effects(self, sample_indices: Sequence[int], query_indices: Sequence[int]) -> list[float]:
        """Return the drop of each query's loss after one step on all `sample_indices`, in nats per target token."""
        piece = digest([[self._hash_N[i] for i in sample_indices], [self._hash_Q[q] for q in query_indices]])[:24]
        if piece not in self._log.done:
            queries = [self.queries[q] for q in query_indices]
            before = self._before.get(tuple(query_indices))
            if before is None:  # the same batches as afterwards, for the same rounding
                before = self._before[tuple(query_indices)] = losses(self._loaded.model, queries)
            drops = self._stepper.effect([self.samples[i] for i in sample_indices], queries, before)
            if not drops.isfinite().all():
                raise InputError("a query's loss is not finite after a step", "lower the learning rate")
            self._log.add(piece, drops.tolist())
        return self._log.done[piece]

    @cached_property
    def _stepper(self) -> Stepper:
        stepper = Stepper(self._loaded.model, self._step.learning_rate)
        if self._step.optimizer == "adam":
            n = len(self._moment_samples)
            stepper.moments = second_moments(
                stepper.start, self._moment_samples, lambda done: self.say("measuring second moments", done, n)
            )
        return stepper

    def say(self, label: str, n_done: int, total: int) -> None:
        """Report progress."""
        self._task.on_progress(Progress(label, n_done, total))
