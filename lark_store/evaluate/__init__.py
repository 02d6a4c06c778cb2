"""How true a store's scores are, as client code of `Store`: each kind of evaluation holds scores against a truth.

    lds           the loss after retraining on random half sets              retraining
    facts         the samples that are known to state the answer             finding
    causal        one real optimizer step on each sample                     stepping
    tail_patch    one real step on a query's top samples                     stepping
    format        what a score tells apart: format, source, domain           telling
    spearman      another score, taken for the truth                         reference

    scorers       scores by name, from the store or from a rival
    rivals        other methods and negative controls
    material      queries and samples from the store, models of its checkpoints
    task          what all kinds share: options, tables with intervals, rows, files
    training      from one start again and again; steps: one optimizer step; journal: what is done so far
    agree         rank correlation, AUC; figures: the charts

>>> from lark_store import Store, evaluate
>>> with Store.open("lark.store") as store:  # doctest: +SKIP
...     found = evaluate.facts(store, ["lark:cosine@epoch-1", "bm25"], key="fact")
...     print(found.table)
"""

from lark_store.evaluate.finding import facts
from lark_store.evaluate.reference import spearman
from lark_store.evaluate.retraining import lds
from lark_store.evaluate.scorers import Scorer
from lark_store.evaluate.stepping import causal, tail_patch
from lark_store.evaluate.task import Outcome
from lark_store.evaluate.telling import format  # noqa: A004 (the command's name)

__all__ = ["Outcome", "Scorer", "causal", "facts", "format", "lds", "spearman", "tail_patch"]
