"""The reference experiment on any causal model, fine-tuning set and pretraining pools, as client code of `Store`.

    recipe     the TOML file, read and checked
    pools      samples drawn from files: first, random, or most similar to the queries
    render     format variants of the recipe beside the built-in ones
    finetune   transformers' Trainer, a checkpoint per epoch
    evaluate   accuracy and macro-F1 by the likelihoods of the labels
    steps      all of it in order, going on where it stopped
    groups     what is compared with what; Φ of each
    tables     the store's answers as the tables of `results`; truth: where it is known which samples state an answer
    findings   what the numbers say, in words; notes: what a reader must be warned of
    figures    charts
    report     one HTML file

>>> from lark_store import study
>>> study.init("pubmedqa.toml")  # doctest: +SKIP
>>> results = study.run("pubmedqa.toml")  # doctest: +SKIP
>>> results.dominance  # a polars frame  # doctest: +SKIP
"""

from lark_store.study.recipe import init
from lark_store.study.steps import report, run

__all__ = ["init", "report", "run"]
