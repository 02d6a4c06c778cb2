"""Options of the evaluations of scores."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import inf
from typing import TYPE_CHECKING, TypedDict

from lark_store.errors import InputError
from lark_store.specs.compute import Compute
from lark_store.specs.option import like, option

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class EvaluateSpec:
    """The options of all evaluations; see `lark_store.evaluate`.

    `max_queries` takes the first queries, `max_samples` a random subset of the candidates.
    """

    sources: Sequence[str] = option(
        (),
        flags="--source -s",
        metavar="NAME",
        help="A source of candidates; repeatable (default: stage `finetune`).",
    )
    variants: Sequence[str] = option(
        ("chatml",), flags="--variant -v", metavar="NAME", help="The candidates' format variant (default: `chatml`)."
    )
    queries: str | None = option(
        None, flags="--queries -q", metavar="NAME", help="The queries' source (default: the only one)."
    )
    query_variant: str = option("chatml", metavar="NAME", help="The queries' format variant.")
    max_queries: int | None = option(None, help="Use only the first N queries.")
    max_samples: int | None = option(None, help="Use only N candidates, drawn at random.")
    seed: int = option(0, help="Seed of all random draws.")
    device: str = like(Compute, "device")
    precision: str = option("float32", help="Precision of the model: `float32`, `bfloat16` or `auto`.")
    attention: str = like(Compute, "attention")
    out: str | Path = option(
        "evaluations", flags="--out -o", metavar="FOLDER", help="Folder for tables, charts and intermediate results."
    )
    name: str | None = option(None, metavar="NAME", help="Name in the view `evaluations` (default: generated).")


@dataclass(frozen=True, kw_only=True)
class TrainingSpec:
    """Training settings: AdamW (β 0.9 and 0.999, ε 1e-8), constant learning rate, all parameters or LoRA adapters."""

    epochs: int = option(1, help="Epochs per training run.")
    learning_rate: float = option(1e-4, help="Learning rate of AdamW, constant.")
    batch_size: int = option(4, help="Samples per step.")
    weight_decay: float = option(0.0, help="Weight decay of AdamW.")
    max_grad_norm: float = option(1.0, help="Clip gradients to this norm.")

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1 or not self.learning_rate > 0 or not self.max_grad_norm > 0:
            raise InputError(
                f"invalid training settings: {asdict(self)}",
                "epochs and batch size must be at least 1, learning rate and maximum gradient norm above 0",
            )


@dataclass(frozen=True, kw_only=True)
class LdsSpec:
    """The retraining of `lds`."""

    half_sets: int = option(40, help="Number of random half sets.")
    seeds: int = option(1, help="Training runs per half set, each with its own seed.")


@dataclass(frozen=True, kw_only=True)
class FactsSpec:
    """The ranking of `facts`; `at` are the k of recall@k."""

    at: Sequence[int] = option((1, 10), metavar="K", help="Recall at K; repeatable (default: 1 and 10).")
    rerank: bool = option(False, help="Rank hard candidates too.")
    trials: int = option(3, help="Trials of the rerank protocol.")
    pool_by: str = option("bm25-okapi", help="BM25 of the rerank protocol: `bm25-okapi` or the faster `bm25`.")


@dataclass(frozen=True, kw_only=True)
class SpearmanSpec:
    """The trials of `spearman`."""

    trials: int = option(1, help="Draws of `--max-queries` queries and `--max-samples` candidates.")


@dataclass(frozen=True, kw_only=True)
class StepSpec:
    """An optimizer step from a checkpoint; see `lark_store.evaluate.optimizer_step`."""

    checkpoint: str
    optimizer: str = option("adam", help="`adam` (no weight decay; second moments of the training) or `sgd`.")
    learning_rate: float = option(2e-5, help="Learning rate of the step.")
    moment_samples: int = option(100, help="Training samples to measure Adam's second moments on.")

    def __post_init__(self) -> None:
        if self.optimizer not in {"adam", "sgd"}:
            raise InputError(f"unknown optimizer `{self.optimizer}`", "the optimizers are `adam` and `sgd`")
        if not 0 < self.learning_rate < inf:
            raise InputError(f"the learning rate {self.learning_rate} is not a positive number", "for example `2e-5`")
        if self.moment_samples < 1:
            raise InputError(f"second moments need at least 1 sample, not {self.moment_samples}", "for example 100")


@dataclass(frozen=True, kw_only=True)
class FormatSpec:
    """The comparisons of `format`."""

    against_rest: Sequence[str] = option((), metavar="NAME", help="A source to tell apart from all others; repeatable.")
    domains: Sequence[str] = option(
        (), flags="--domain", metavar="NAME", help="A domain to tell apart from all others; repeatable."
    )


class EvaluateOptions(TypedDict, total=False):
    """`EvaluateSpec` as keywords."""

    sources: Sequence[str]
    variants: Sequence[str]
    queries: str | None
    query_variant: str
    max_queries: int | None
    max_samples: int | None
    seed: int
    device: str
    precision: str
    attention: str
    out: str | Path
    name: str | None


class TrainingOptions(TypedDict, total=False):
    """`TrainingSpec` as keywords."""

    epochs: int
    learning_rate: float
    batch_size: int
    weight_decay: float
    max_grad_norm: float


class LdsOptions(EvaluateOptions, TrainingOptions, total=False):
    """The keywords of `lds`."""

    half_sets: int
    seeds: int


class FactsOptions(EvaluateOptions, total=False):
    """The keywords of `facts`."""

    at: Sequence[int]
    rerank: bool
    trials: int
    pool_by: str


class SpearmanOptions(EvaluateOptions, total=False):
    """The keywords of `spearman`."""

    trials: int


class StepOptions(EvaluateOptions, total=False):
    """The keywords of `causal`."""

    optimizer: str
    learning_rate: float
    moment_samples: int


class TailPatchOptions(StepOptions, total=False):
    """The keywords of `tail_patch`."""

    k: int


class FormatOptions(EvaluateOptions, total=False):
    """The keywords of `format`."""

    against_rest: Sequence[str]
    domains: Sequence[str]
