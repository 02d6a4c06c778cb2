"""The ingest runs of a score run by checkpoint, and the samples which they have in common."""

from __future__ import annotations

from types import SimpleNamespace

import polars as pl
import pytest

from lark_store.schema.score_inputs import (
    ALL_KEYS,
    GROUP_KEYS,
    has_rows,
    has_valid_inputs,
    inputs,
    n_common,
    query_groups,
    scored_groups,
)
from lark_store.schema.table_schemas import sketch_table

SAMPLES = {1: "abc", 2: "de", 3: "bcdx", 4: "cd", 5: "", 6: "bz"}  # sample ids by ingest run


def ingest(number, checkpoint, *, source=1, variant=1, status="done", fingerprint="f" * 64):
    return SimpleNamespace(
        id=number,
        checkpoint_id=checkpoint,
        source_id=source,
        variant_id=variant,
        status=status,
        fingerprint=fingerprint,
        n_sketched=len(SAMPLES[number]),
    )


RUNS = {
    1: ingest(1, 1),
    2: ingest(2, 1, fingerprint="g" * 64),
    3: ingest(3, 2),
    4: ingest(4, 3),
    5: ingest(5, 1, source=2),
    6: ingest(6, 2, variant=2),
}


class Vectors:
    """Tables of rows, read by ingest run."""

    def __init__(self):
        self.rows = {}
        for number, samples in SAMPLES.items():
            self.rows.setdefault(sketch_table(RUNS[number].fingerprint), {})[number] = list(samples)

    def read(self, table, columns, condition):
        assert columns == ["sample_id"]
        return pl.DataFrame({"sample_id": self._found(table, condition)}, schema={"sample_id": pl.String})

    def table(self, name):
        return SimpleNamespace(count_rows=lambda condition: len(self._found(name, condition)))

    def _found(self, table, condition):
        numbers = [int(n) for n in condition.removeprefix("ingest_run IN (").removesuffix(")").split(", ")]
        return [sample for n in numbers for sample in self.rows[table].get(n, [])]


def scored(over=None, **recipe):
    return SimpleNamespace(over_checkpoints=over, recipe=recipe, source_id=1, variant_id=1)


def numbers(groups):
    return [[run.id for run in runs] for runs in groups]


def test_inputs_are_all_runs_of_the_recipe():
    run = scored(ingest_runs=[1, 2], query_ingest_runs=[5], **{"with": [1, 6]})
    assert inputs(run) == inputs(run, ALL_KEYS) == {1, 2, 5, 6}
    assert inputs(run, GROUP_KEYS) == {1, 2, 5}
    assert inputs(scored()) == frozenset()


@pytest.mark.parametrize(("status", "is_valid"), [("done", True), ("superseded", False), (None, False)])
def test_inputs_must_be_committed(status, is_valid):
    ingests = {1: RUNS[1]} | ({2: ingest(2, 1, status=status)} if status else {})
    run = scored(ingest_runs=[1], query_ingest_runs=[2])
    assert has_valid_inputs(run, ingests) == is_valid
    assert has_valid_inputs(scored(ingest_runs=[1], **{"with": [2]}), ingests, GROUP_KEYS)


def test_group_is_by_checkpoint():
    assert numbers(scored_groups(scored(ingest_runs=[1, 2]), RUNS)) == [[1, 2]]
    assert numbers(scored_groups(scored(), RUNS)) == []
    assert numbers(query_groups(scored(query_ingest_runs=[1, 3, 2, 4]), RUNS)) == [[1, 2], [3], [4]]


def test_group_of_a_sum_has_its_own_runs_of_all_searched_ones():
    weights = {"base": 1.0, "epoch-1": 1.0, "epoch-2": 1.0}
    recipe = {"ingest_runs": [3], "with": [1, 2, 3, 5, 6, 99], "weights": weights}
    assert numbers(scored_groups(scored("base + epoch-1 + epoch-2", **recipe), RUNS)) == [[1, 2], [3], []]
    recipe["with"].append(4)
    assert numbers(scored_groups(scored("base + epoch-1 + epoch-2", **recipe), RUNS)) == [[1, 2], [3], [4]]
    assert scored_groups(scored("base + epoch-1", ingest_runs=[3]), RUNS) == []  # of an older version
    assert scored_groups(scored("base + epoch-1", weights=weights, **{"with": [5, 6]}), RUNS) == []


@pytest.mark.parametrize(
    ("groups", "n"),
    [
        ([], 0),
        ([[]], 0),
        ([[1]], 3),
        ([[1, 2]], 5),  # two tables
        ([[1, 2], [3]], 3),  # b, c, d
        ([[3], [1, 2]], 3),
        ([[1, 2], [3], [4]], 2),  # c, d
        ([[1, 2], [3], []], 0),
        ([[5]], 0),
        ([[1], [5]], 0),
    ],
)
def test_common_samples_have_a_sketch_in_every_group(groups, n):
    groups = [[RUNS[number] for number in runs] for runs in groups]
    assert n_common(Vectors(), groups) == n
    assert has_rows(Vectors(), groups, n)
    assert not has_rows(Vectors(), groups, n + 7)
    assert not has_rows(Vectors(), groups, -1)


def test_rows_are_counted_if_the_catalogs_counts_disagree():
    changed = SimpleNamespace(**vars(RUNS[1]) | {"n_sketched": 9})
    assert has_rows(Vectors(), [[changed]], 3)
    assert has_rows(None, [[changed]], 9)  # the catalog's count is enough
    assert has_rows(None, [[changed], [RUNS[3]]], 4)  # the least of all
    assert not has_rows(Vectors(), [[changed]], 4)
    assert not has_rows(Vectors(), [], 1)
    assert has_rows(None, [], 0)
