"""The fixed steps of a campaign, and the contents of a store compared at the end."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import polars as pl
import polars.selectors
import polars.testing
from helpers.checkpoints import save_checkpoint
from helpers.texts import qa_rows, text_rows, write_jsonl

from lark_store import Store
from lark_store.maintenance.orphan_files import files_of

if TYPE_CHECKING:
    from pathlib import Path

    from places import Place

REMOVED = ("sea-1", "sea-20")
N_REMOVED = 2 * len(REMOVED)  # sketches: in two variants


@dataclass(frozen=True)
class Step:
    """One command of the script. Run again, one that was done says so: nothing to do, or the error `again`.

    Of a step that `goes_on`, run again, only the rest is done. `older` is the schema that the store has before.
    """

    kind: str
    line: str
    kills: int
    again: str | None = None
    goes_on: bool = False
    older: str | None = None

    @property
    def words(self) -> list[str]:
        """The command's arguments."""
        return self.line.split()

    def was_done(self, message: str) -> bool:
        """Tell whether a command's error means that it had been done before."""
        return self.again is not None and re.search(self.again, message) is not None


def make_files(folder: Path) -> None:
    """Make the checkpoint and the texts of the script: an ingest takes several commits of `campaign.BATCH` rows."""
    save_checkpoint(folder / "base", hidden_size=32, intermediate_size=64)
    write_jsonl(folder / "finetune.jsonl", qa_rows(24))
    write_jsonl(folder / "test.jsonl", qa_rows(4, start=1000))
    write_jsonl(folder / "songs.jsonl", text_rows(26))
    write_jsonl(folder / "more.jsonl", text_rows(46))


def script(files: Path) -> list[Step]:
    """Return the steps; samples are sketched one at a time, so that bytes don't depend on where a kill cuts."""
    ingest = "ingest -c base --sketcher small --batch-tokens 1"
    attribute, index = "attribute -c base --sketcher small --hits 1000", "index build small"
    return [
        Step("add", f"checkpoint add base {files}/base --epoch 1 --metric accuracy=0.5", 1),
        Step("add", f"source add finetune {files}/finetune.jsonl --stage finetune --domain medical", 2),
        Step("add", f"source add test {files}/test.jsonl --stage query", 1),
        Step("add", f"source add songs {files}/songs.jsonl --stage pretrain", 2),
        Step("add", "variant add short --template chatml --max-length 200", 1),
        Step("add", "sketcher add small -k 1024", 1),
        Step("ingest", f"{ingest} -s finetune -s test --variant chatml", 4, goes_on=True),
        Step("ingest", f"{ingest} -s songs --variant raw --variant chatml", 5, goes_on=True),
        Step("optimize", "db optimize", 5),
        Step("score", attribute, 4),
        Step("snapshot", "snapshot create then", 2, again="snapshot `then` already exists"),
        Step("migrate", "db upgrade", 5, older="0002"),
        Step("index", index, 5),
        Step("add", f"source add songs {files}/more.jsonl --stage pretrain", 2),
        Step("ingest", f"{ingest} -s songs --variant raw --variant chatml", 5, goes_on=True),
        Step("score", attribute, 3),
        Step("remove", f"sample remove songs {' '.join(REMOVED)}", 3, again="no sample|there is no sample"),
        Step("score", attribute, 3),
        Step("migrate", "db upgrade", 5, older="0001"),
        Step("index", index, 5),
        Step("optimize", "db optimize --keep-versions-days 0", 5),
    ]


# --- contents of a store -------------------------------------------------------------------------------------------


def rows_of(store: Store, table: str, columns: list[str] | None = None) -> pl.DataFrame:
    """Return a table's rows as they are."""
    return pl.DataFrame(pl.from_arrow(store._db.vectors.table(table).to_lance().to_table(columns=columns)))


def sketches_of(store: Store) -> str | None:
    """Return the name of the one table of sketches, if it is there."""
    return next(iter(store._db.vectors.sketch_tables()), None)


def keys(store: Store) -> Counter[str]:
    """Count the keys of samples, sketches and committed scores; one that is there twice counts 2."""
    result: Counter[str] = Counter()
    samples = rows_of(store, "samples", ["source", "sample_id"])
    result.update(f"sample {source}/{sample_id}" for source, sample_id in samples.iter_rows())
    table = sketches_of(store)
    if table:
        result.update(f"sketch {key}" for key in rows_of(store, table, ["row_key"])["row_key"])
    scores = store.sql("SELECT query_id, source, variant, sample_id FROM influence")
    result.update(f"score {'/'.join(row)}" for row in scores.iter_rows())
    return result


def n_sketches(store: Store) -> int:
    """Return how many sketches there are, committed or not."""
    table = sketches_of(store)
    return 0 if table is None else int(store._db.vectors.table(table).count_rows())


def orphans(store: Store) -> list[str]:
    """Return the files of all tables which belong to no version."""
    vectors = store._db.vectors
    return [f"{name}/{path}" for name in vectors.table_names() for path in files_of(vectors, name, set()).orphans]


def content(store: Store) -> dict[str, Any]:
    """Return the contents and answers of a store, without run numbers and times, sorted."""
    results: dict[str, Any] = {"samples": rows_of(store, "samples").sort("source", "sample_id")}
    table = sketches_of(store)
    assert table is not None
    sketches = store._db.vectors.table(table).to_lance().to_table().sort_by("row_key")
    results["sketches"] = pl.DataFrame(
        pl.from_arrow(sketches.drop_columns(["ingest_run", "checksum", "code", "vector"]))
    )
    for column in ("code", "vector"):
        results[column] = sketches.column(column).combine_chunks().flatten().to_numpy().tobytes()
    for view, (leave_out, order) in _COMPARED.items():
        results[view] = store.sql(f"SELECT * EXCLUDE ({leave_out}) FROM {view} ORDER BY {order}")
    for view in ("all", "influence", "dominance", "comparisons"):
        results[f"metrics {view}"] = in_order(store.metrics(view=view, sketcher="small"))
    return results


def in_order(metrics: pl.DataFrame) -> pl.DataFrame:
    """Sort metrics; of two sources the one that was scored first comes first, here the first in the alphabet."""
    if "metric" in metrics.columns:
        turned = (pl.col("metric") == "difference") & (pl.col("source") > pl.col("against_source"))
        pairs = [("source", "against_source", 1), ("against_source", "source", 1)]
        pairs += [("value", "value", -1), ("low", "high", -1), ("high", "low", -1)]
        metrics = metrics.with_columns(
            pl.when(turned).then(pl.col(other) if sign > 0 else -pl.col(other)).otherwise(pl.col(name)).alias(name)
            for name, other, sign in pairs
        )
    return metrics.sort(polars.selectors.string())


# The views of a store, without values which differ in each run; in an order independent of rounded scores.
_COMPARED = {
    "checkpoints": ("created_at", "name"),
    "checkpoint_metrics": ("value", "ALL"),
    "sources": ("created_at", "name"),
    "variants": ("created_at", "name"),
    "sketchers": ("created_at", "name"),
    "failures": ("ingest_run", "ALL"),
    "influence": ("score_run, rank", "query_id, source, variant, sample_id"),
    "source_influence": ("score_run", "query_id, source, variant"),
}


def differences(left: dict[str, Any], right: dict[str, Any]) -> list[str]:
    """Return the differences of two contents: bytes compared as bytes, figures made of sums to five digits."""
    assert left.keys() == right.keys()
    actual = []
    for name, expected in left.items():
        if isinstance(expected, bytes):
            same = expected == right[name]
        else:
            try:
                polars.testing.assert_frame_equal(
                    expected, right[name], check_exact=name in _EXACT, rel_tol=1e-5, abs_tol=1e-6
                )
                same = True
            except AssertionError as error:
                actual.append(f"{name}: {error}")
                continue
        if not same:
            actual.append(f"{name}: other bytes")
    return actual


_EXACT = {"samples", "sketches", "checkpoints", "checkpoint_metrics", "sources", "variants", "sketchers", "failures"}


def read(place: Place) -> dict[str, Any]:
    """Return the content of the store at a place."""
    with Store.open(place.store) as store:
        return content(store)
