"""Self-influence: the effect of a sample's own gradient step on its own loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

import polars as pl

from lark_store.errors import InputError, NothingToScoreError
from lark_store.query.answers.top import texts_of_frame
from lark_store.query.select.resolve import searched_groups
from lark_store.query.select.rows import find_rows
from lark_store.schema.catalog import Checkpoint
from lark_store.schema.database import find
from lark_store.specs import SearchSpec

if TYPE_CHECKING:
    from lark_store.schema.database import Database

_KEYS = ["source", "variant", "sample_id"]


def self_influence(db: Database, checkpoints: list[str], sources: list[str], k: int, sketcher: str) -> pl.DataFrame:
    """Rank samples by the squared norm of their gradient; see `Store.self_influence`."""
    if not checkpoints:
        raise InputError("no checkpoint is given", "add one `--checkpoint` or several")
    with db.session() as session:
        rates = [find(session, Checkpoint, name).learning_rate for name in checkpoints]
    if len(rates) > 1 and None in rates:
        raise InputError(
            f"several checkpoints are weighted by learning rate, but `{checkpoints[rates.index(None)]}` has none",
            "use one checkpoint, or add this one under another name with `--learning-rate`",
        )
    weights = [1.0] if len(rates) == 1 else [rate for rate in rates if rate is not None]
    parts = []
    for name, weight in zip(checkpoints, weights, strict=True):
        groups = searched_groups(db, SearchSpec(checkpoints=[name], sketcher=sketcher, sources=sources))
        frame = find_rows(db, groups).frame
        parts.append(frame.select(*_KEYS, "loss", score=pl.col("grad_norm").cast(pl.Float64).pow(2) * weight))
    summed = pl.concat(parts).group_by(_KEYS).agg(pl.len().alias("n"), pl.sum("score"), pl.mean("loss"))
    complete = summed.filter(pl.col("n") == len(checkpoints))
    if complete.is_empty():
        raise NothingToScoreError(
            "no sample has a sketch at each of these checkpoints", "ingest the samples at all of them"
        )
    best = complete.sort(-pl.col("score"), *_KEYS).head(k)
    ranked = best.select(pl.int_range(1, pl.len() + 1, dtype=pl.Int32).alias("rank"), "score", "loss", *_KEYS)
    return ranked.join(
        texts_of_frame(db.vectors, ranked), on=["source", "sample_id"], how="left", maintain_order="left"
    )
