"""What a study compares: its groups (a source in a variant), their Φ, and figures over queries as frames."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import polars as pl

from lark_store.errors import NothingToScoreError
from lark_store.query.compare import evaluate
from lark_store.study.results import FORMATTED, PLAIN

if TYPE_CHECKING:
    from lark_store import Store
    from lark_store.query.compare import Figure
    from lark_store.study.recipe import Recipe

SKETCHER = "study"
_VALUES: dict[str, Any] = dict.fromkeys(("value", "low", "high", "p_value"), pl.Float64) | {"n_queries": pl.Int64}
_PHI = """
    SELECT i.method, i.checkpoint, i.queries, i.query_id, i.source, s.stage, i.variant, i.max::DOUBLE AS phi, i.n
    FROM source_influence i JOIN sources s ON s.name = i.source
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


def searched(recipe: Recipe) -> list[tuple[str, str]]:
    """Return all groups of fine-tuning and pretraining, in the recipe's order."""
    sources = [recipe.tuning, *recipe.pretraining]
    return [(source.name, variant) for source in sources for variant in source.variants]


def asked(recipe: Recipe, sketcher: str) -> dict[str, Any]:
    """Return the parameters of SQL that say which of a store's answers are this study's."""
    return {
        "sketcher": sketcher,
        "queries": recipe.queries.name,
        "query_variant": recipe.queries.variant,
        "checkpoints": recipe.checkpoints,
    }


def read_phi(store: Store, recipe: Recipe, sketcher: str) -> pl.DataFrame:
    """Return Φ: a row per method, checkpoint, query and group, in the recipe's order.

    Columns: method, then those that `query.metrics` takes (checkpoint, queries, query_id, source, stage, variant, phi),
    then n, the samples of the group.

    Raises
    ------
    NothingToScoreError
        A checkpoint was not scored by the cosine.
    """
    groups = [f"{source}/{variant}" for source, variant in searched(recipe)]
    parameters = asked(recipe, sketcher) | {"methods": list(recipe.compare.methods), "groups": groups}
    phi = store.sql(_PHI, parameters)
    scored = phi.filter(pl.col("method") == "cosine")["checkpoint"].unique()
    missing = [name for name in recipe.checkpoints if name not in scored]
    if missing:
        raise NothingToScoreError(
            f"the study's queries are not scored by `cosine` at {', '.join(f'`{name}`' for name in missing)} yet",
            "`lark-store study run RECIPE.toml` does what is missing",
        )
    return in_order(phi, recipe, "checkpoint", "method", "source", "variant")


def in_order(frame: pl.DataFrame, recipe: Recipe, *columns: str) -> pl.DataFrame:
    """Sort by columns of names in the recipe's order: checkpoints by epoch; rows that are alike stay as they are."""
    sources = [recipe.tuning.name, *(source.name for source in recipe.pretraining)]
    orders: dict[str, list[str]] = {
        "checkpoint": recipe.checkpoints,
        "method": list(dict.fromkeys(["cosine", *recipe.compare.methods])),
        "source": sources,
        "against_source": sources,
        "variant": list(dict.fromkeys([FORMATTED, PLAIN, *(variant.name for variant in recipe.variant)])),
    }
    return frame.sort([pl.col(name).cast(pl.Enum(orders[name])) for name in columns], maintain_order=True)


def with_epoch(frame: pl.DataFrame, recipe: Recipe) -> pl.DataFrame:
    """Put the epoch behind the checkpoint's name."""
    epoch = pl.col("checkpoint").cast(pl.Enum(recipe.checkpoints)).to_physical().cast(pl.Int64)
    return frame.select("checkpoint", epoch.alias("epoch"), pl.exclude("checkpoint"))


def evaluated(figures: list[Figure], names: dict[str, Any]) -> pl.DataFrame:
    """Return figures as rows of `names` (columns and their types), value, low, high, p_value and n_queries.

    What is undefined is null.
    """
    frame = pl.DataFrame(evaluate(figures), schema=names | _VALUES)
    return frame.with_columns(pl.col("value", "low", "high", "p_value").fill_nan(None))


def numbers(series: pl.Series) -> Any:
    """Return a column as an array of 64-bit floats."""
    return series.cast(pl.Float64).to_numpy()
