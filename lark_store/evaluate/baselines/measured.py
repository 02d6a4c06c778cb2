"""Measured influence (EIF) as a score: stored by `lark-store eif`, and the truth that other scores estimate.

    eif@base                             the only measurement at a checkpoint
    eif:context@base                     the one with the sample in context
    eif:finetune,learning_rate=0.001     one of several; also `optimizer=adamw`

Shape letters: Q queries, N samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import polars as pl

from lark_store.errors import InputError, NothingToScoreError

if TYPE_CHECKING:
    from lark_store.evaluate.baselines.context import BaselineContext, Matrix
    from lark_store.evaluate.dataset import Material

_ROWS = """
    SELECT e.checkpoint, e.mode, e.optimizer, e.learning_rate, e.source, e.variant, e.sample_id, e.query_id,
           arg_max(e.value, e.eif_run) AS value
    FROM eif e
    WHERE e.queries = $queries AND e.query_variant = $query_variant
      AND ($checkpoint IS NULL OR e.checkpoint = $checkpoint) AND ($mode IS NULL OR e.mode = $mode)
      AND ($optimizer IS NULL OR e.optimizer = $optimizer) AND ($rate IS NULL OR e.learning_rate = $rate)
    GROUP BY ALL ORDER BY ALL"""
_HOW = ["checkpoint", "mode", "optimizer", "learning_rate"]
_SAMPLE = ["source", "variant", "sample_id"]


@dataclass(frozen=True)
class Settings:
    """The settings in the name; each chooses among several measurements."""

    mode: Literal["finetune", "context"] | None = None
    optimizer: str | None = None
    learning_rate: float | None = None


def eif(material: Material, context: BaselineContext) -> Matrix:
    """Return the stored influence, (Q, N).

    Raises
    ------
    NothingToScoreError
        No measurement has all queries and samples.
    InputError
        Several have them.
    """
    settings = context.settings(Settings)
    if len(context.checkpoints) > 1:
        raise InputError(f"`{context.spec}`: influence is measured at one checkpoint", "name one after `@`")
    first = material.queries[0]
    stored = material.store.sql(
        _ROWS,
        {
            "queries": first.source,
            "query_variant": first.variant,
            "checkpoint": context.checkpoints[0] if context.checkpoints else None,
            "mode": settings.mode,
            "optimizer": settings.optimizer,
            "rate": settings.learning_rate,
        },
        max_rows=None,
    )
    samples = pl.DataFrame([(t.source, t.variant, t.id) for t in material.samples], _SAMPLE, orient="row")
    pairs = pl.DataFrame({"query_id": material.query_ids}).join(samples, how="cross", maintain_order="left_right")
    complete, most = {}, 0
    for how, of_one in stored.group_by(_HOW, maintain_order=True):
        values = pairs.join(of_one, on=["query_id", *_SAMPLE], how="left", maintain_order="left")["value"]
        most = max(most, len(values) - values.null_count())
        if not values.null_count():
            complete[how] = values
    return _only(complete, context, len(pairs) - most, len(pairs)).reshape(len(material.queries), len(samples))


def _only(complete: dict[tuple[object, ...], pl.Series], context: BaselineContext, missing: int, n: int) -> Matrix:
    if not complete:
        raise NothingToScoreError(
            f"`{context.spec}`: influence is not measured for {missing} of {n} pairs of a query and a sample",
            "measure it with `lark-store eif`, with the same sources, variants, `--max-samples` and `--seed`",
        )
    if len(complete) > 1:
        names = [f"`eif:{_name(*how)}`" for how in complete]
        raise InputError(
            f"`{context.spec}`: influence was measured in {len(names)} ways", f"choose one: {', '.join(names)}"
        )
    (values,) = complete.values()
    return values.to_numpy().astype(np.float32)


def _name(checkpoint: object, mode: object, optimizer: object, rate: object) -> str:
    detail = "" if mode == "context" else f",optimizer={optimizer},learning_rate={rate:g}"
    return f"{mode}{detail}@{checkpoint}"
