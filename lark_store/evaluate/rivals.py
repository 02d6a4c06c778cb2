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
from lark_store.query.lexical import Lexical, words

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from lark_store.evaluate.material import Material
    from lark_store.schema.records import OnProgress

    Matrix = NDArray[Any]

_CORPUS = """
    SELECT x.source, x.sample_id, coalesce(x.text, x.prompt || chr(10) || x.response) AS text
    FROM samples x JOIN sources s ON s.name = x.source WHERE s.stage <> 'query'"""


@dataclass(frozen=True)
class Given:
    """What a rival is given beside queries and samples: what its name was followed by, and how to compute.

    `spec` is the whole name, `argument` what follows `:`, `checkpoints` what follows `@`; `note` takes
    what a reader of the figures has to know.
    """

    device: str = "auto"
    precision: str = "float32"
    seed: int = 0
    on_progress: OnProgress = lambda _: None
    note: Callable[[str], None] = lambda _: None
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
    """Score by BM25 over the texts of all samples that are no query, as the store's `bm25` does; needs no sketch."""
    import bm25s

    del given
    corpus = material.store.sql(_CORPUS)
    index = bm25s.BM25(method="lucene")
    index.index(words(corpus["text"].to_list()), show_progress=False)
    keys = ["source", "sample_id"]
    wanted = pl.DataFrame([(text.source, text.id) for text in material.samples], keys, orient="row")
    numbered = corpus.select(keys).with_row_index("_place")
    places = wanted.join(numbered, on=keys, how="left", maintain_order="left")["_place"]
    if places.null_count():
        raise InputError("candidates of stage `query` are not in BM25's corpus", "name sources of another stage")
    lexical = Lexical("bm25", corpus.select(keys), index)
    return np.concatenate([lexical.scores([query.whole])[:, places.to_numpy()] for query in material.queries])


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
