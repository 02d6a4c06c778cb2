"""What every kind of evaluation is asked for, and what it makes of its figures: rows, a table, files, a chart.

Intervals are percentile bootstrap intervals over queries, and differences are paired by query: they speak of queries
like these. What else is random (which half sets were drawn, which seed trained) is not in them.
"""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import polars as pl

from lark_store.errors import InputError
from lark_store.evaluate.journal import digest
from lark_store.evaluate.material import gather, load
from lark_store.evaluate.rivals import Given
from lark_store.evaluate.scorers import matrices
from lark_store.query.compare import Figure
from lark_store.schema.names import check_name
from lark_store.study.files import writing
from lark_store.study.groups import evaluated, numbers

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from lark_store.evaluate.material import Loaded, Material
    from lark_store.evaluate.scorers import Asked, Matrix
    from lark_store.schema.records import OnProgress
    from lark_store.store import Store

OUT = "evaluations"
_VALUES = {"method": pl.String, "measure": pl.String, "query_id": pl.String, "trial": pl.Int64, "value": pl.Float64}
_TABLE = "measure method value low high difference difference_low difference_high p_value n_queries"


class Options(TypedDict, total=False):
    """What all kinds take.

    `sources` are the candidates' sources (default: all of stage `finetune`), `variants` their format variants,
    `queries` the queries' source and `query_variant` theirs; `max_queries` takes the first queries, `max_samples` so
    many candidates at random. `out` is the folder of tables, charts and journals, `name` what the evaluation is called
    in the view `evaluations` (default: kind and a hash of what was asked). `seed` is of all that is drawn.
    """

    sources: Sequence[str]
    variants: Sequence[str]
    queries: str | None
    query_variant: str
    max_queries: int | None
    max_samples: int | None
    seed: int
    device: str
    precision: str
    out: str | Path
    name: str | None
    on_progress: OnProgress | None


@dataclass(frozen=True)
class Outcome:
    """What an evaluation found. Offers the Arrow stream interface with its table.

    `table` has a row per measure and method: value (mean over queries), low, high (95%, over queries), difference (to
    the first method, paired by query), difference_low, difference_high, p_value (of the difference, by permutation) and
    n_queries. `values` has method, measure, query_id, trial, value: what the view `evaluations` has.
    """

    name: str
    kind: str
    table: pl.DataFrame
    values: pl.DataFrame
    notes: list[str]
    files: list[Path]

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        return self.table.__arrow_c_stream__(requested_schema)

    def _repr_html_(self) -> str:
        return self.table._repr_html_()


@dataclass
class Task:
    """An evaluation under way: `kind`, the store, the scores asked for, and the options (see `Options`)."""

    kind: str
    store: Store
    scores: Sequence[Asked]
    sources: Sequence[str] = ()
    variants: Sequence[str] = ("chatml",)
    queries: str | None = None
    query_variant: str = "chatml"
    max_queries: int | None = None
    max_samples: int | None = None
    seed: int = 0
    device: str = "auto"
    precision: str = "float32"
    out: str | Path = OUT
    name: str | None = None
    on_progress: OnProgress | None = None
    notes: list[str] = field(default_factory=list)
    _rows: list[tuple[Any, ...]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.on_progress = self.on_progress or (lambda _: None)
        self.sources = list(self.sources) or list(
            self.store.sql("select name from sources where stage = 'finetune' order by name")["name"]
        )
        for what, n in (("queries", self.max_queries), ("samples", self.max_samples)):
            if n is not None and n < 1:
                raise InputError(f"{n} {what} are none", "name a number of 1 or more")
        if self.name is not None:
            check_name(self.name)
        try:
            Path(self.out).mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise InputError(f"`{self.out}` is no folder", "name another with `--out`") from error

    @cached_property
    def material(self) -> Material:
        """The queries and candidates."""
        return gather(
            self.store,
            sources=self.sources,
            variants=self.variants,
            queries=self.queries,
            query_variant=self.query_variant,
            max_queries=self.max_queries,
            max_samples=self.max_samples,
            seed=self.seed,
        )

    @cached_property
    def given(self) -> Given:
        """What rivals are given."""
        assert self.on_progress is not None
        return Given(self.device, self.precision, self.seed, self.on_progress, self.notes.append)

    @cached_property
    def matrices(self) -> dict[str, Matrix]:
        """The scores, (Q, N) each."""
        return matrices(self.material, self.scores, self.given)

    def rival(self, name: str) -> Matrix:
        """Return a rival's scores, (Q, N), whether they were asked for or not."""
        return matrices(self.material, [name], self.given)[name]

    def load(self, checkpoint: str) -> Loaded:
        """Load the model of a checkpoint."""
        return load(self.store, checkpoint, self.device, self.precision)

    def weights(self, checkpoint: str) -> str:
        """Return the hash of a checkpoint's weights."""
        return str(
            self.store.sql("select weights_sha256 from checkpoints where name = ?", [checkpoint])["weights_sha256"][0]
        )

    def add(self, method: str, measure: str, value_Q: NDArray[np.float64], trial: int | None = None) -> None:
        """Take a figure of each query; those that are undefined (NaN) are left out."""
        for query, value in zip(self.material.query_ids, value_Q.tolist(), strict=True):
            if value == value:  # noqa: PLR0124 (NaN)
                self._rows.append((method, measure, query, trial, value))

    def finish(self, **recipe: Any) -> Outcome:
        """Make the table, keep the rows in the store, and write files; `recipe` is what the kind was told beside."""
        values = pl.DataFrame(self._rows, _VALUES, orient="row")
        if values.is_empty():
            raise InputError(
                "there is no figure: of no query is anything defined", "see the notes, or ask other queries"
            )
        names = [each if isinstance(each, str) else each.name for each in self.scores]
        whole: dict[str, Any] = {
            "scores": names,
            "sources": list(self.sources),
            "variants": list(self.variants),
            "queries": self.material.queries[0].source,
            "query_variant": self.query_variant,
            "max_queries": self.max_queries,
            "max_samples": self.max_samples,
            "seed": self.seed,
        }
        whole = json.loads(json.dumps(whole | recipe))
        name = self.name or f"{self.kind}-{digest([self.kind, whole])[:8]}"
        self.store.evaluation_keep(name, kind=self.kind, recipe=whole, environment=self._environment(), scores=values)
        table = tabulated(values)
        files = self._write(name, table, values)
        return Outcome(name, self.kind, table, values, self.notes, files)

    def _environment(self) -> dict[str, Any]:
        from lark_store.ingest import ledger
        from lark_store.ingest.gradients import pick_device

        device = ledger.device_name(pick_device(self.device))
        return ledger.versions() | {"device": device, "precision": self.precision, "platform": platform.platform()}

    def _write(self, name: str, table: pl.DataFrame, values: pl.DataFrame) -> list[Path]:
        from lark_store.evaluate.figures import chart, save

        folder = Path(self.out)
        written = []
        for path, frame in ((folder / f"{name}.csv", table), (folder / f"{name}-values.csv", values)):
            with writing(path) as draft:
                frame.write_csv(draft)
            written.append(path)
        return written + save(chart(self.kind, table), folder, name)


def tabulated(values: pl.DataFrame) -> pl.DataFrame:
    """Return an evaluation's table (see `Outcome`) of its values; trials of a query are averaged first."""
    names = {"measure": pl.String, "method": pl.String}
    each = values.group_by("measure", "method", "query_id", maintain_order=True).agg(pl.col("value").mean())
    means, gaps = [], []
    for measure, of_measure in each.group_by("measure", maintain_order=True):
        methods = list(of_measure.group_by("method", maintain_order=True))
        first = methods[0][1].select("query_id", first="value")
        for method, group in methods:
            key = {"measure": measure[0], "method": method[0]}
            means.append(Figure(key, numbers(group["value"])))
            if method == methods[0][0]:
                continue
            both = group.join(first, on="query_id", maintain_order="left")
            gap = numbers(both["value"] - both["first"])
            gaps.append(Figure(key, gap, difference=gap))
    table = evaluated(means, names).drop("p_value")
    between = evaluated(gaps, names).rename({"value": "difference", "low": "difference_low", "high": "difference_high"})
    joined = table.join(between.drop("n_queries"), on=[*names], how="left", maintain_order="left")
    return joined.select(_TABLE.split())
