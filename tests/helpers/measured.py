"""Probes and measured influence, written by hand into the scored store."""

from __future__ import annotations

import itertools
import math

import pyarrow as pa
from sqlalchemy import select

from helpers.corruption import lance_table, take_rows
from lark_store.schema.catalog import Checkpoint, EifRun, FormatVariant, ProbeRun, Source
from lark_store.schema.checksums import with_checksums
from lark_store.schema.table_schemas import EIF, PROBES

FACTS = ("q100", "q101", "q102", "q103")
SAMPLES = ("q0", "q1", "q2")
ENVIRONMENT = {"recipe": {}, "versions": {}, "device": "cpu", "status": "done"}


def ids(store):
    """Return the ids of the named rows of the catalog."""
    with store._db.session() as session:
        return {
            row.name: row.id for kind in (Checkpoint, Source, FormatVariant) for row in session.scalars(select(kind))
        }


def probe_row(run, checkpoint, sample_id, **values):
    names = {"probe_run": run, "checkpoint": checkpoint, "source": "test", "variant": "chatml", "sample_id": sample_id}
    measured = {"is_correct": False, "n_correct": 0, "n_samples": 0, "answer_logprob": math.log(0.25), "n_tokens": 2}
    return names | measured | {"output": "no", "reason": None} | values


def write(store, table, schema, rows):
    vectors = store._db.vectors
    blank = {"checksum": 0}
    vectors.append(vectors.table(table), with_checksums(pa.Table.from_pylist([r | blank for r in rows], schema=schema)))
    vectors.refresh_indices(vectors.table(table))


def add_probes(store, known, n_samples=0, **values):
    """Add probes of the facts: `known` maps checkpoints to the facts that they know. Return the runs' ids."""
    number, runs = ids(store), []
    for checkpoint, facts in known.items():
        run = ProbeRun(
            checkpoint_id=number[checkpoint], source_id=number["test"], variant_id=number["chatml"],
            n_samples=n_samples, decoding="sampled" if n_samples else "greedy", temperature=1.0 if n_samples else None,
            seed=0 if n_samples else None, n_probed=len(FACTS), n_failed=0, **ENVIRONMENT,
        )  # fmt: skip
        with store._db.session() as session:
            session.add(run)
        rows = [probe_row(run.id, checkpoint, f, is_correct=f in facts, n_samples=n_samples, **values) for f in FACTS]
        write(store, "probes", PROBES, rows)
        runs.append(run.id)
    return runs


def add_eif(store, source="finetune", queries="test", value=lambda sample, query: 0.5):  # noqa: ARG005
    """Add a matrix of measured influence at `base`. Return the run's id."""
    number = ids(store)
    query_ids = FACTS if queries == "test" else SAMPLES
    run = EifRun(
        checkpoint_id=number["base"], source_id=number[source], queries_id=number[queries],
        variant_id=number["chatml"], query_variant_id=number["chatml"], mode="finetune", optimizer="sgd",
        learning_rate=1e-3, draw=None, n_samples=len(SAMPLES), n_queries=len(query_ids), **ENVIRONMENT,
    )  # fmt: skip
    with store._db.session() as session:
        session.add(run)
    names = {"eif_run": run.id, "checkpoint": "base", "source": source, "queries": queries}
    rows = [
        names | {"sample_id": s, "query_id": q, "loss_before": 2.0, "loss_after": 2.0 - v, "value": v}
        for s, q in itertools.product(SAMPLES, query_ids)
        for v in [float(value(s, q))]
    ]
    write(store, "eif", EIF, rows)
    return run.id


def change(store, table, condition, **columns):
    """Change rows behind the store's back: their checksums stay."""
    rows = take_rows(store, table, condition).to_pylist()
    lance_table(store, table).delete(condition)
    schema = lance_table(store, table).schema
    lance_table(store, table).add(pa.Table.from_pylist([row | columns for row in rows], schema=schema))
    store._db.vectors.refresh_indices(lance_table(store, table))
