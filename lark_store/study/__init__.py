"""The reference experiment on any causal model, fine-tuning set and pretraining pools, as client code of `Store`.

    recipe     the TOML file, read and checked
    pools      samples drawn from files: first, random, or most similar to the queries
    render     format variants of the recipe, besides the built-in ones
    finetune   transformers' Trainer, a checkpoint per epoch
    evaluate   accuracy and macro-F1 by label likelihood
    pipeline   the whole study in order, resumable; preflight: checks before training
    groups     the groups to compare, and Φ of each
    tables     the tables of `results`; known_answers: ranks of the samples known to state an answer
    claims     the questions, tested and answered in words; conclusions: all of them; caveats: warnings for the reader
    charts     the figures; chart_style; presentation: headings and rounding; wording
    page       the report, one HTML file

>>> from lark_store import study
>>> study.init("pubmedqa.toml")  # doctest: +SKIP
>>> results = study.run("pubmedqa.toml")  # doctest: +SKIP
>>> results.dominance  # a polars frame  # doctest: +SKIP
"""

from lark_store.study.pipeline import report, run
from lark_store.study.recipe import init

__all__ = ["init", "report", "run"]
