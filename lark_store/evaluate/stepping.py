"""`causal` and `tail_patch`: what one real optimizer step does, on each sample, or on a query's top samples together.

`causal`: a step is made on each sample alone, from one checkpoint; its effect on a query is by how much that query's
loss falls.

    spearman     the rank correlation of a query's scores with the effects, over the samples
    sign         of the tenth of the samples with the largest |effect|, the share whose score has the effect's sign; a
                 score of 0 has none

`tail_patch` (after Chang et al. 2024): a step on the k samples that a score puts first, as one batch. The measure is
the change of the log-probability of the query's answer (its target tokens), in nats; the k of `random` and of `bm25`
are there for comparison.

`adam` needs second moments: they are measured on `moment_samples` samples of stage `finetune` (where there is none, of
the candidates), at the checkpoint. Intervals are over queries. Shape letters: Q queries, N samples.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lark_store.errors import InputError
from lark_store.evaluate.agree import spearman
from lark_store.evaluate.journal import digest, journal
from lark_store.evaluate.material import gather
from lark_store.evaluate.steps import OPTIMIZERS, Stepper, second_moments
from lark_store.evaluate.task import Task
from lark_store.evaluate.training import losses
from lark_store.schema.records import Progress
from lark_store.store.part import clear

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Unpack

    import torch
    from numpy.typing import NDArray

    from lark_store.evaluate.journal import Journal
    from lark_store.evaluate.material import Loaded, Text
    from lark_store.evaluate.scorers import Asked
    from lark_store.evaluate.task import Options, Outcome
    from lark_store.ingest.variants import Tokens
    from lark_store.store import Store

    Floats = NDArray[np.float64]

FIRST = 0.1  # the share of the samples whose signs are looked at
BESIDE = ("random", "bm25")


@clear
def causal(
    store: Store,
    scores: Sequence[Asked],
    *,
    checkpoint: str,
    optimizer: str = "adam",
    learning_rate: float = 2e-5,
    moment_samples: int = 100,
    **options: Unpack[Options],
) -> Outcome:
    """Make one real optimizer step on each sample from a checkpoint, and correlate scores with what it does.

    Each sample's effects are on the disk before the next step: killed and run again, it goes on. `optimizer` is `adam`
    or `sgd`. Measures: `spearman` and `sign`.

    Raises
    ------
    InputError
        Fewer than 3 samples, no such optimizer.
    NameUnknownError, NothingToScoreError, CheckpointError, StoreBusyError
    """
    task = Task("causal", store, scores, **options)
    how = Step(checkpoint, optimizer, learning_rate, moment_samples)
    if len(task.material.samples) < 3:
        raise InputError(f"{len(task.material.samples)} samples have no rank correlation", "take 3 or more")
    matrices = task.matrices  # what is wrong with a score is said before the steps
    rows = []
    with _stepping(task, how) as steps:
        n = len(task.material.samples)
        for i in range(n):
            rows.append(steps.effects([i], range(len(steps.queries))))
            steps.say("steps on single samples", i + 1, n)
    effect_QN = np.array(rows).T
    for name, score_QN in matrices.items():
        task.add(name, "spearman", spearman(score_QN, effect_QN))
        task.add(name, "sign", right_signs(score_QN, effect_QN))
    return task.finish(**asdict(how))


def right_signs(score_QN: NDArray[Any], effect_QN: Floats) -> Floats:
    """Return, of the tenth of the samples with the largest |effect|, the share whose score has its sign, (Q,).

    >>> right_signs(np.array([[-2.0, 0.0, 1.0]]), np.array([[-0.5, 0.1, 0.2]])).tolist()
    [1.0]
    """
    n = max(1, round(effect_QN.shape[1] * FIRST))
    first_Qn = np.argsort(-np.abs(effect_QN), axis=1, kind="stable")[:, :n]
    right = np.sign(np.take_along_axis(score_QN, first_Qn, 1)) == np.sign(np.take_along_axis(effect_QN, first_Qn, 1))
    found: Floats = right.mean(axis=1)
    return found


@clear
def tail_patch(
    store: Store,
    scores: Sequence[Asked],
    *,
    checkpoint: str,
    k: int = 10,
    optimizer: str = "adam",
    learning_rate: float = 2e-5,
    moment_samples: int = 100,
    **options: Unpack[Options],
) -> Outcome:
    """Make one step on the `k` samples that a score puts first for a query, together, and see what the answer gains.

    The measure `log-probability` is the change of the log-probability of the query's target tokens, in nats; `random`
    and `bm25` are added where they were not asked for. Resumable, as `causal` is.

    Raises
    ------
    InputError
        k is no number of samples, no such optimizer.
    NameUnknownError, NothingToScoreError, CheckpointError, StoreBusyError
    """
    names = [each if isinstance(each, str) else each.name for each in scores]
    task = Task("tail-patch", store, [*scores, *(name for name in BESIDE if name not in names)], **options)
    how = Step(checkpoint, optimizer, learning_rate, moment_samples)
    if not 1 <= k <= len(task.material.samples):
        raise InputError(f"k = {k} is not from 1 to {len(task.material.samples)} samples", "such as `-k 10`")
    first = {name: np.argsort(-each, axis=1, kind="stable")[:, :k] for name, each in task.matrices.items()}
    gained: dict[str, list[float]] = {name: [] for name in first}
    with _stepping(task, how) as steps:
        for q, query in enumerate(steps.queries):
            for name, top_Qk in first.items():
                (fall,) = steps.effects(sorted(top_Qk[q].tolist()), [q])
                gained[name].append(fall * query.n_targets)
            steps.say("steps on top samples", q + 1, len(steps.queries))
    for name, gains in gained.items():
        task.add(name, "log-probability", np.array(gains))
    return task.finish(k=k, **asdict(how))


@dataclass(frozen=True)
class Step:
    """Which step is made: see `lark_store.evaluate.steps`."""

    checkpoint: str
    optimizer: str
    learning_rate: float
    moment_samples: int

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise InputError(f"`{self.optimizer}` is no optimizer here", "the optimizers are `adam` and `sgd`")
        if self.moment_samples < 1:
            raise InputError(f"{self.moment_samples} samples have no second moments", "such as 100")


@contextmanager
def _stepping(task: Task, how: Step) -> Iterator[_Steps]:
    """Load the model and open the journal of its steps."""
    loaded = task.load(how.checkpoint)
    moments = loaded.tokens(_tuned_on(task, how)) if how.optimizer == "adam" else []
    identity = asdict(how) | {
        "checkpoint": task.weights(how.checkpoint),
        "moment_samples": [_hash(tokens) for tokens in moments],
        "precision": task.precision,
    }
    with journal(Path(task.out), "steps", identity) as kept:
        yield _Steps(task, how, loaded, moments, kept)


def _tuned_on(task: Task, how: Step) -> list[Text]:
    """Return the samples whose second moments are measured: of the sources of stage `finetune`, or the candidates."""
    tuning = task.store.sql("select name from sources where stage = 'finetune' order by name")["name"].to_list()
    return gather(
        task.store,
        sources=tuning or task.sources,
        variants=task.variants[:1],
        queries=task.queries,
        query_variant=task.query_variant,
        max_samples=how.moment_samples,
        seed=task.seed,
    ).samples


def _hash(tokens: Tokens) -> str:
    return digest([tokens.input_ids, tokens.is_target, tokens.rule])[:16]


class _Steps:
    """The steps of an evaluation, each made once; second moments are measured when the first is made."""

    def __init__(self, task: Task, how: Step, loaded: Loaded, moments: list[Tokens], kept: Journal) -> None:
        self.samples, self.queries = loaded.tokens(task.material.samples), loaded.tokens(task.material.queries)
        self._task, self._how, self._loaded, self._tuned_on, self._kept = task, how, loaded, moments, kept
        self._hash_Q, self._hash_N = [_hash(t) for t in self.queries], [_hash(t) for t in self.samples]
        self._before: dict[tuple[int, ...], torch.Tensor] = {}

    def effects(self, some: Sequence[int], asked: Sequence[int]) -> list[float]:
        """Return how much a step on some samples together lowers each query's loss, in nats per target token."""
        piece = digest([[self._hash_N[i] for i in some], [self._hash_Q[q] for q in asked]])[:24]
        if piece not in self._kept.done:
            queries = [self.queries[q] for q in asked]
            before = self._before.get(tuple(asked))
            if before is None:  # in the same batches as afterwards, so that rounding is the same
                before = self._before[tuple(asked)] = losses(self._loaded.model, queries)
            found = self._stepper.effect([self.samples[i] for i in some], queries, before)
            if not found.isfinite().all():
                raise InputError("after a step, a query's loss is no number", "lower the learning rate")
            self._kept.add(piece, found.tolist())
        return self._kept.done[piece]

    @cached_property
    def _stepper(self) -> Stepper:
        stepper = Stepper(self._loaded.model, self._how.learning_rate)
        if self._how.optimizer == "adam":
            n = len(self._tuned_on)
            stepper.moments = second_moments(
                stepper.start, self._tuned_on, lambda done: self.say("measuring second moments", done, n)
            )
        return stepper

    def say(self, what: str, done: int, of: int) -> None:
        """Report how far it is."""
        assert self._task.on_progress is not None
        self._task.on_progress(Progress(what, done, of))
