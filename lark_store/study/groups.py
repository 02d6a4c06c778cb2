"""The groups of a study (a source in a variant), their Φ, and figures over queries as frames."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from lark_store.errors import NothingToScoreError
from lark_store.stats.bootstrap import evaluate
from lark_store.stats.sketch_error import noise_of
from lark_store.study.recipe import BUILT_IN
from lark_store.study.results import PLAIN

if TYPE_CHECKING:
    from lark_store import Store
    from lark_store.stats.bootstrap import Figure
    from lark_store.study.recipe import Recipe

SKETCHER = "study"
_FLOATS = ("value", "low", "high", "p_value")
_VALUES: dict[str, Any] = dict.fromkeys(_FLOATS, pl.Float64) | {"n_queries": pl.Int64}
_PHI = """
    SELECT i.method, i.checkpoint, i.queries, i.query_id, i.source, s.stage, i.variant, i.max::DOUBLE AS phi, i.n,
           CASE WHEN i.method = 'cosine' THEN k.k END AS k
    FROM source_influence i JOIN sources s ON s.name = i.source JOIN sketchers k ON k.name = i.sketcher
    WHERE i.sketcher = $sketcher AND i.queries = $queries AND i.query_variant = $query_variant
      AND i.query_checkpoint = i.checkpoint AND list_contains($checkpoints, i.checkpoint)
      AND list_contains($methods, i.method) AND list_contains($groups, i.source || '/' || i.variant)
    ORDER BY i.query_id"""


def columns(kind: Any, names: str) -> dict[str, Any]:
    """Return columns of one type, for a frame's schema.

    >>> columns(int, "step epoch")
    {'step': <class 'int'>, 'epoch': <class 'int'>}
    """
    return dict.fromkeys(names.split(), kind)


def searched_groups(recipe: Recipe) -> list[tuple[str, str]]:
    """Return all fine-tuning and pretraining groups in the recipe's order."""
    sources = [recipe.tuning, *recipe.pretraining]
    return [(source.name, variant) for source in sources for variant in source.variants]


def sql_parameters(recipe: Recipe, sketcher: str) -> dict[str, Any]:
    """Return the SQL parameters to select this study's answers from a store."""
    return {
        "sketcher": sketcher,
        "queries": recipe.queries.name,
        "query_variant": recipe.queries.variant,
        "checkpoints": recipe.checkpoints,
    }


def read_phi(store: Store, recipe: Recipe, sketcher: str) -> pl.DataFrame:
    """Return Φ: a row per method, checkpoint, query and group, in the recipe's order.

    Columns: method, the columns of `query.metrics` (checkpoint, queries, query_id, source, stage, variant, phi and, for
    the cosine, noise), and n, the number of samples in the group.

    Raises
    ------
    NothingToScoreError
        A checkpoint has no cosine scores.
    """
    groups = [f"{source}/{variant}" for source, variant in searched_groups(recipe)]
    parameters = sql_parameters(recipe, sketcher) | {"methods": list(recipe.compare.methods), "groups": groups}
    phi = store.sql(_PHI, parameters)
    k = phi["k"].cast(pl.Float64).fill_null(float("nan")).to_numpy()
    noise = noise_of(numbers(phi["phi"]), np.ones(len(phi)), k)
    phi = phi.drop("k").with_columns(noise=pl.Series(noise, dtype=pl.Float64).fill_nan(None))
    scored = phi.filter(pl.col("method") == "cosine")["checkpoint"].unique()
    missing = [name for name in recipe.checkpoints if name not in scored]
    if missing:
        raise NothingToScoreError(
            f"the study's queries are not scored by `cosine` at {', '.join(f'`{name}`' for name in missing)} yet",
            "score them with `lark-store study run RECIPE.toml`",
        )
    return in_order(phi, recipe, "checkpoint", "method", "source", "variant")


def in_order(frame: pl.DataFrame, recipe: Recipe, *columns: str) -> pl.DataFrame:
    """Sort by columns of names in the recipe's order, checkpoints by epoch; the sort is stable."""
    sources = [recipe.tuning.name, *(source.name for source in recipe.pretraining)]
    orders: dict[str, list[str]] = {
        "checkpoint": recipe.checkpoints,
        "method": list(dict.fromkeys(["cosine", *recipe.compare.methods])),
        "source": sources,
        "against_source": sources,
        "variant": [*sorted(BUILT_IN, key=PLAIN.__eq__), *(variant.name for variant in recipe.variant)],
    }
    return frame.sort([pl.col(name).cast(pl.Enum(orders[name])) for name in columns], maintain_order=True)


def with_epoch(frame: pl.DataFrame, recipe: Recipe) -> pl.DataFrame:
    """Insert the column `epoch` after `checkpoint`."""
    epoch = pl.col("checkpoint").cast(pl.Enum(recipe.checkpoints)).to_physical().cast(pl.Int64)
    return frame.select("checkpoint", epoch.alias("epoch"), pl.exclude("checkpoint"))


def figure_frame(figures: list[Figure], names: dict[str, Any]) -> pl.DataFrame:
    """Return figures as rows of `names` (columns and their types), value, low, high, p_value and n_queries.

    Undefined figures are null.
    """
    frame = pl.DataFrame(evaluate(figures), schema=names | _VALUES)
    return frame.with_columns(pl.col(*_FLOATS).fill_nan(None))


def numbers(series: pl.Series) -> Any:
    """Return a column as an array of 64-bit floats."""
    return series.cast(pl.Float64).to_numpy()
