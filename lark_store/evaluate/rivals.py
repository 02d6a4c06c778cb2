"""Rivals of the store's scores, by name: other methods, and negative controls that know nothing of influence.

A rival is a function of a `Material` and of what it is `Given`; it returns a matrix (Q, N), higher = more helpful. To
add one, put it into `RIVALS`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from lark_store.errors import InputError
from lark_store.evaluate.material import folder_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from lark_store.evaluate.material import Material
    from lark_store.schema.records import OnProgress

    Matrix = NDArray[Any]


@dataclass(frozen=True)
class Given:
    """What a rival is given beside queries and samples: what its name was followed by, and how to compute.

    `spec` is the whole name, `argument` what follows `:`, `checkpoints` what follows `@`.
    """

    device: str = "auto"
    precision: str = "float32"
    seed: int = 0
    on_progress: OnProgress = lambda _: None
    spec: str = ""
    argument: str | None = None
    checkpoints: tuple[str, ...] = ()

    def of(self, spec: str, argument: str | None, checkpoints: list[str]) -> Given:
        """Return the same for one rival."""
        return replace(self, spec=spec, argument=argument, checkpoints=tuple(checkpoints))

    def folders(self, material: Material) -> list[Path]:
        """Return the folders of the models of the checkpoints.

        Raises
        ------
        InputError
            No checkpoint is named.
        """
        if not self.checkpoints:
            raise InputError(f"`{self.spec}` needs a model", f"say `{self.spec}@CHECKPOINT`")
        return [folder_of(material.store, name) for name in self.checkpoints]


def bm25(material: Material, given: Given) -> Matrix:
    """Score by BM25 over the texts, as the store's `similar_text` does: no sketch is needed."""
    del given
    sources = list(dict.fromkeys(text.source for text in material.samples))
    keys = pl.DataFrame([(t.source, t.id) for t in material.samples], ["source", "sample_id"], orient="row")
    n = len(keys) + 1_000_000  # a source's samples may not all be candidates
    rows = []
    for query in material.queries:
        found = material.store.similar_text(text=query.whole, k=n, sources=sources)
        scores = keys.join(
            found.select("source", "sample_id", "score"), on=["source", "sample_id"], how="left", maintain_order="left"
        )
        rows.append(scores["score"].to_numpy())
    return np.stack(rows)


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


RIVALS: dict[str, Callable[[Material, Given], Matrix]] = {
    "bm25": bm25,
    "random": random,
    "length": length,
    "same": same,
}
