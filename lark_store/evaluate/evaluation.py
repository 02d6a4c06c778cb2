"""Shared by all evaluations: their options, and the rows, table, files and chart of their figures.

Intervals are percentile bootstrap intervals over queries; differences are paired by query. They cover other queries
like these, and no other randomness, such as the draw of half sets or the training seed.
"""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

import polars as pl

from lark_store.core.atomic_files import writing
from lark_store.core.names import check_name
from lark_store.errors import InputError
from lark_store.evaluate.baselines import BaselineContext
from lark_store.evaluate.dataset import draw, gather, load
from lark_store.evaluate.progress_log import digest
from lark_store.evaluate.scorers import check, matrices
from lark_store.results import Tabular
from lark_store.stats.bootstrap import Figure
from lark_store.study.groups import figure_frame, numbers

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from lark_store.evaluate.dataset import Loaded, Material
    from lark_store.evaluate.scorers import Matrix, ScoreSpec
    from lark_store.results import OnProgress
    from lark_store.specs import EvaluateSpec
    from lark_store.store import Store

_VALUES = {"method": pl.String, "measure": pl.String, "query_id": pl.String, "trial": pl.Int64, "value": pl.Float64}
_TABLE = "measure method value low high difference difference_low difference_high p_value n_queries"


@dataclass(frozen=True, repr=False)
class Outcome(Tabular[dict[str, Any]]):
    """The outcome of an evaluation; its rows are those of `table`.

    `table` has a row per measure and method: value (mean over queries), low, high (95%, over queries), difference (to
    the first method, paired by query), difference_low, difference_high, p_value (of the difference, by permutation) and
    n_queries. Of a figure over all queries, each trial counts as a query. `values` has the columns of the view
    `evaluations`: method, measure, query_id, trial, value.
    """

    name: str
    kind: str
    table: pl.DataFrame
    values: pl.DataFrame
    notes: list[str]
    files: list[Path]

    @property
    def _rows(self) -> pl.DataFrame:
        return self.table


class Task:
    """A running evaluation: `kind`, the store, the requested scores, and the options.

    `sources` are the candidates' sources, by default all of stage `finetune`. With `is_pool`, `material` holds all
    queries and samples, for trials to draw from.
    """

    def __init__(
        self,
        kind: str,
        store: Store,
        scores: Sequence[ScoreSpec],
        spec: EvaluateSpec,
        on_progress: OnProgress | None = None,
        *,
        is_pool: bool = False,
    ) -> None:
        self._is_pool = is_pool
        self.kind, self.store, self.scores, self.spec, self.name = kind, store, scores, spec, spec.name
        self.on_progress: OnProgress = on_progress or (lambda _: None)
        self.notes: list[str] = []
        self._rows: list[tuple[Any, ...]] = []
        self._recipe: dict[str, Any] = {}
        self.sources = list(spec.sources) or list(
            store.sql("select name from sources where stage = 'finetune' order by name")["name"]
        )
        for subject, n in (("queries", spec.max_queries), ("samples", spec.max_samples)):
            if n is not None and n < 1:
                raise InputError(
                    f"the maximum number of {subject} must be at least 1, not {n}", f"raise `--max-{subject}`"
                )
        if spec.name is not None:
            check_name(spec.name)
        self.folder = _writable_folder(spec.out)

    @cached_property
    def material(self) -> Material:
        """The queries and candidate samples."""
        return gather(
            self.store,
            sources=self.sources,
            variants=self.spec.variants,
            queries=self.spec.queries,
            query_variant=self.spec.query_variant,
            max_queries=None if self._is_pool else self.spec.max_queries,
            max_samples=None if self._is_pool else self.spec.max_samples,
            seed=self.spec.seed,
        )

    def trials(self, n: int) -> list[Material]:
        """Return the queries and candidates of each trial, drawn anew; a single trial has all of `material`."""
        if n == 1:
            return [self.material]
        maxima = (self.spec.max_queries, self.spec.max_samples)
        return [draw(self.material, *maxima, [self.spec.seed, trial]) for trial in range(n)]

    @cached_property
    def context(self) -> BaselineContext:
        """The context of the baselines."""
        spec = self.spec
        return BaselineContext(
            spec.device,
            spec.precision,
            spec.seed,
            self.on_progress,
            self.notes.append,
            folder=self.folder,
            attention=spec.attention,
        )

    @cached_property
    def matrices(self) -> dict[str, Matrix]:
        """The scores by name, (Q, N) each."""
        return matrices(self.material, self.scores, self.context)

    def prepare(self, *, also: Sequence[ScoreSpec] = (), **recipe: Any) -> None:
        """Preflight checks before any computation; `recipe` holds the evaluation's own options.

        `also` are scores needed in addition. A `checkpoint` in the recipe is checked here and loaded later.

        Raises
        ------
        InputError, NameUnknownError, NameTakenError, NothingToScoreError, CheckpointError, CheckpointChangedError
        """
        check(self.material, self.scores, self.context)
        if also:
            check(self.material, also, self.context)
        if "checkpoint" in recipe:
            self.load(recipe["checkpoint"]).tokens([*self.material.samples, *self.material.queries])
        self._recipe = self._full_recipe(recipe)
        self.name = self.name or f"{self.kind}-{digest([self.kind, self._recipe])[:8]}"
        self.store.evaluation_check(self.name, kind=self.kind, recipe=self._recipe)

    def _full_recipe(self, recipe: dict[str, Any]) -> dict[str, Any]:
        full: dict[str, Any] = {
            "scores": [score if isinstance(score, str) else score.name for score in self.scores],
            "sources": list(self.sources),
            "variants": list(self.spec.variants),
            "queries": self.material.queries[0].source,
            "query_variant": self.spec.query_variant,
            "max_queries": self.spec.max_queries,
            "max_samples": self.spec.max_samples,
            "seed": self.spec.seed,
        }
        plain: dict[str, Any] = json.loads(json.dumps(full | recipe))
        return plain

    def baseline(self, name: str) -> Matrix:
        """Return a baseline's scores, (Q, N), requested or not."""
        return matrices(self.material, [name], self.context)[name]

    def load(self, checkpoint: str) -> Loaded:
        """Load the model of a checkpoint."""
        return load(self.store, checkpoint, self.spec.device, self.spec.precision, self.spec.attention)

    def weights(self, checkpoint: str) -> str:
        """Return the hash of a checkpoint's weights."""
        return str(
            self.store.sql("select weights_sha256 from checkpoints where name = ?", [checkpoint])["weights_sha256"][0]
        )

    def add_overall(self, method: str, measure: str, value: float, trial: int | None = None) -> None:
        """Add a figure over all queries."""
        self._rows.append((method, measure, None, trial, value))

    def add(
        self,
        method: str,
        measure: str,
        value_Q: NDArray[np.float64],
        trial: int | None = None,
        material: Material | None = None,
    ) -> None:
        """Add a figure per query, of a trial's material or of all, skipping undefined ones (NaN)."""
        for query, value in zip((material or self.material).query_ids, value_Q.tolist(), strict=True):
            if value == value:  # noqa: PLR0124 (NaN)
                self._rows.append((method, measure, query, trial, value))

    def finish(self, *, has_spread: bool = False) -> Outcome:
        """Build the table, keep the rows in the store, and write the files.

        With `has_spread`, the table gets the column `trial_sd`: the standard deviation of the trials' means.
        """
        self.material.check()
        values = pl.DataFrame(self._rows, _VALUES, orient="row")
        if values.is_empty():
            raise InputError("the figure is undefined for every query", "see the notes, or choose other queries")
        assert self.name is not None
        self.store.evaluation_keep(
            self.name, kind=self.kind, recipe=self._recipe, environment=self._environment(), scores=values
        )
        table = tabulated(values)
        table = table.join(_spread(values), on=["measure", "method"], how="left") if has_spread else table
        files = self._write(self.name, table, values)
        return Outcome(self.name, self.kind, table, values, self.notes, files)

    def _environment(self) -> dict[str, Any]:
        from lark_store.core.device import device_name, pick_device
        from lark_store.core.versions import versions

        device = device_name(pick_device(self.spec.device))
        return versions() | {"device": device, "precision": self.spec.precision, "platform": platform.platform()}

    def _write(self, name: str, table: pl.DataFrame, values: pl.DataFrame) -> list[Path]:
        from lark_store.charts.files import save
        from lark_store.evaluate.charts import chart

        written = []
        for path, frame in ((self.folder / f"{name}.csv", table), (self.folder / f"{name}-values.csv", values)):
            with writing(path) as draft:
                frame.write_csv(draft)
            written.append(path)
        return written + save(chart(self.kind, table), self.folder, name)


def _writable_folder(out: str | Path) -> Path:
    """Create a folder if there is none, and check that it can be written to."""
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(f"`{out}` is not a folder", "choose another with `--out`") from error
    except OSError as error:
        raise InputError(f"`{out}` can't be written to: {error.strerror}", "choose another with `--out`") from error
    return folder


def _spread(values: pl.DataFrame) -> pl.DataFrame:
    means = values.group_by("measure", "method", "trial").agg(pl.col("value").mean())
    return means.group_by("measure", "method").agg(trial_sd=pl.col("value").std())


def tabulated(values: pl.DataFrame) -> pl.DataFrame:
    """Return the table of an evaluation's values (see `Outcome`).

    Each query's trials are averaged first. Of a figure over all queries, each trial counts as one.
    """
    names = {"measure": pl.String, "method": pl.String}
    trial = pl.format("trial {}", "trial").fill_null("")
    averaged = (
        values.with_columns(pl.coalesce("query_id", trial))
        .group_by("measure", "method", "query_id", maintain_order=True)
        .agg(pl.col("value").mean())
    )
    means, gaps = [], []
    for measure, of_measure in averaged.group_by("measure", maintain_order=True):
        methods = list(of_measure.group_by("method", maintain_order=True))
        first = methods[0][1].select("query_id", first="value")
        for method, group in methods:
            key = {"measure": measure[0], "method": method[0]}
            means.append(Figure(key, numbers(group["value"])))
            if method == methods[0][0]:
                continue
            pairs = group.join(first, on="query_id", maintain_order="left")
            gap = numbers(pairs["value"] - pairs["first"])
            gaps.append(Figure(key, gap, difference=gap))
    table = figure_frame(means, names).drop("p_value")
    renamed = {"value": "difference", "low": "difference_low", "high": "difference_high"}
    between = figure_frame(gaps, names).rename(renamed)
    joined = table.join(between.drop("n_queries"), on=[*names], how="left", maintain_order="left")
    return joined.select(_TABLE.split())
