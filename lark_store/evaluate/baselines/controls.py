"""Negative controls: scores unrelated to influence. Distrust a method that agrees with them.

Shape letters: Q queries, N samples.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lark_store.errors import InputError
from lark_store.evaluate.baselines.checks import check_no_settings

if TYPE_CHECKING:
    from lark_store.evaluate.baselines.context import BaselineContext, Matrix
    from lark_store.evaluate.dataset import Material


def random(material: Material, context: BaselineContext) -> Matrix:
    """Score at random, reproducibly per seed: a negative control."""
    rng = np.random.default_rng(context.seed)
    return rng.standard_normal((len(material.queries), len(material.samples)), dtype=np.float32)


def check_random(_: Material, context: BaselineContext) -> None:
    """Check that the name is plain."""
    check_no_settings(context)


def length(material: Material, context: BaselineContext) -> Matrix:
    """Score by a sample's length in words, or in tokens of a checkpoint's tokenizer: a negative control."""
    if context.checkpoints:
        from lark_store.modeling.loading import load_tokenizer

        tokenizer = load_tokenizer(context.folders(material)[-1])
        counts = [len(tokenizer(text.whole)["input_ids"]) for text in material.samples]
    else:
        counts = [len(text.whole.split()) for text in material.samples]
    return np.tile(np.array(counts, np.float32), (len(material.queries), 1))


def check_length(material: Material, context: BaselineContext) -> None:
    """Check that the name has no settings, and the checkpoint exists."""
    check_no_settings(context, uses_model=True)
    if context.checkpoints:
        context.folders(material)


def same(material: Material, context: BaselineContext) -> Matrix:
    """Score 1 for samples with the query's value of a metadata key, `same:relation`, else 0: a negative control."""
    return same_values(material, context).astype(np.float32)


def same_values(material: Material, context: BaselineContext) -> Matrix:
    """Return which samples share a query's value of the metadata key in the argument, (Q, N).

    Raises
    ------
    InputError
        There is no key, or no query and sample share a value.
    """
    if not context.argument:
        raise InputError("`same` needs a column of the metadata", "use `same:KEY`")
    matches = material.own(context.argument)
    if not matches.any():
        raise InputError(
            f"no sample has the same value of `{context.argument}` as a query", "choose a metadata column of both"
        )
    return matches
