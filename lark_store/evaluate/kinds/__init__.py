"""The kinds of evaluations: a module each, and this registry with the texts of their charts.

To add one, write its function in a module here, list it in `KINDS` by its name in the view `evaluations`, export it
from `lark_store.evaluate`, and give it a command in `lark_store.cli.evaluate`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EvaluationKind:
    """A kind of evaluation: its title, the meaning of its values, and the value of a score without effect."""

    title: str
    meaning: str
    no_effect: float = 0.0


KINDS: dict[str, EvaluationKind] = {
    "lds": EvaluationKind(
        "Retraining on half the samples", "rank correlation of summed scores with the loss after retraining"
    ),
    "facts": EvaluationKind("Finding a query's own samples", "mean over queries"),
    "causal": EvaluationKind(
        "One real optimizer step", "agreement with the drop of each query's loss after a step on one sample"
    ),
    "tail-patch": EvaluationKind("One step on the top samples", "change of the answer's log-probability, in nats"),
    "format": EvaluationKind(
        "Formats, sources and domains in a score", "AUC; .5 means no effect of the format", no_effect=0.5
    ),
    "spearman": EvaluationKind("Agreement with the reference", "mean rank correlation over queries"),
}
