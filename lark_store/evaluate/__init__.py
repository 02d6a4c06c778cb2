"""Validate a store's scores, as client code of `Store`: each evaluation compares scores with a ground truth.

    kinds                one module per kind of evaluation: lds, facts, causal (and tail_patch), format_bias, spearman
    scorers              scores by name, from the store or from a baseline
    baselines            baselines and negative controls
    dataset              queries and samples of the store, models of its checkpoints
    evaluation           shared by all: tables with intervals, rows, files
    retrain              repeated training from one start; optimizer_step: one step; progress_log: finished pieces
    charts               the charts

>>> from lark_store import Store, evaluate
>>> with Store.open("lark.store") as store:  # doctest: +SKIP
...     outcome = evaluate.facts(store, ["lark:cosine@epoch-1", "bm25"], key="fact")
...     print(outcome.table)
"""

from lark_store.evaluate.evaluation import Outcome
from lark_store.evaluate.kinds.causal import causal, tail_patch
from lark_store.evaluate.kinds.facts import facts
from lark_store.evaluate.kinds.format_bias import format  # noqa: A004 (the command's name)
from lark_store.evaluate.kinds.lds import lds
from lark_store.evaluate.kinds.spearman import spearman
from lark_store.evaluate.scorers import Scorer

__all__ = ["Outcome", "Scorer", "causal", "facts", "format", "lds", "spearman", "tail_patch"]
