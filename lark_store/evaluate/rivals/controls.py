"""Negative controls: scores that know nothing of influence. What agrees with them should be looked at twice.

Shape letters: Q queries, N samples.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lark_store.errors import InputError

if TYPE_CHECKING:
    from lark_store.evaluate.material import Material
    from lark_store.evaluate.rivals.given import Given, Matrix


def random(material: Material, given: Given) -> Matrix:
    """Score at random, the same for the same seed: a negative control."""
    rng = np.random.default_rng(given.seed)
    return rng.standard_normal((len(material.queries), len(material.samples)), dtype=np.float32)


def length(material: Material, given: Given) -> Matrix:
    """Score by a sample's number of words, or of tokens of the model at a checkpoint: a negative control."""
    if given.checkpoints:
        from lark_store.ingest.models import load_tokenizer

        tokenizer = load_tokenizer(given.folders(material)[-1])
        counts = [len(tokenizer(text.whole)["input_ids"]) for text in material.samples]
    else:
        counts = [len(text.whole.split()) for text in material.samples]
    return np.tile(np.array(counts, np.float32), (len(material.queries), 1))


def same(material: Material, given: Given) -> Matrix:
    """Score 1 where a sample has the query's value of a metadata key, `same:relation`, else 0: a negative control."""
    if not given.argument:
        raise InputError("`same` needs a column of the metadata", "say `same:KEY`")
    own = material.own(given.argument)
    if not own.any():
        raise InputError(
            f"no sample has the same value of `{given.argument}` as a query", "both must have it in their metadata"
        )
    return own.astype(np.float32)
