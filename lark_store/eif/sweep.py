"""Read the matrices of a sweep of learning rates, to compare them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from lark_store.eif.runs import NOISE, find_run
from lark_store.schema.vectors import where
from lark_store.stats.sweep import compare_rates

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lark_store.eif.runs import Job
    from lark_store.schema.database import Database

_RUN = {"eif_run": pl.Int64, "learning_rate": pl.Float64, "draw": pl.Int64}


def read_sweep(db: Database, jobs: Mapping[float, Sequence[Job]]) -> pl.DataFrame:
    """Return a row per learning rate with the columns of `EifReport.sweep`; `jobs` are the matrices of each rate.

    A rate counts if all its matrices are done.
    """
    runs, noises = [], {}
    for rate, of_rate in jobs.items():
        found = [find_run(db, job) for job in of_rate]
        done = [run for run in found if run is not None and run.status == "done"]
        is_whole = len(done) == len(found)
        noises[rate] = float(np.sqrt(np.mean([run.recipe[NOISE] ** 2 for run in done]))) if is_whole else np.nan
        runs += [(run.id, rate, run.draw) for run in done] if is_whole else []
    columns = ["eif_run", "sample_id", "query_id", "value"]
    rows = db.vectors.read("eif", columns, where(eif_run=[number for number, *_ in runs]))
    return compare_rates(rows.join(pl.DataFrame(runs, _RUN, orient="row"), on="eif_run"), noises)
