"""Every way to read, while another process ingests: answers are made of committed runs alone, and never fail."""

from __future__ import annotations

import itertools
import subprocess

import polars as pl
from helpers.program import PROGRAM
from helpers.reference_scores import SEARCH
from helpers.stores import copy_store, store_label
from helpers.texts import text_rows, write_jsonl

from lark_store import Store

TOP = "top_influence(checkpoint := 'base', query := 'q100', sketcher := 'small', k := 1000)"
COUNT = (
    "select count(*) from sketches join sources s on s.name = source where checkpoint = 'base' and s.stage <> 'query'"
)


def top(query, **how):
    """A search; its answer must hold all rows of the named runs."""

    def ask(store):
        hits = store.top(query, k=1000, **how, **SEARCH)
        assert len(hits) == hits.n_searched
        assert hits.frame.select("source", "variant", "sample_id").is_unique().all()
        return hits.n_searched, set(hits.ingest_runs)

    return ask


def attribute(store):
    n = int(store.attribute(["base"], queries="test", sketcher="small")["n_samples"].sum())
    phi = store.sql("select distinct source, variant, n from source_influence where checkpoint = 'base'")
    assert phi["n"].sum() == n
    return n


def metrics(store):
    assert set(store.metrics(sketcher="small", checkpoint="base")["checkpoint"]) == {"base"}


def compared(store):
    assert (
        store.ft_pt("base", sketcher="small").select("query_id", "against_source", "against_variant").is_unique().all()
    )
    assert set(store.trajectory("q100", "sea-1", sketcher="small")["checkpoint"]) == {"base", "epoch-1"}


def similar(store):
    assert store.similar_text("q100", k=5)["rank"].to_list() == [1, 2, 3, 4, 5]


# Each returns how many rows it saw, and maybe which runs they are of.
WAYS = [
    top("q100"),
    top("q101", where="n_tokens > 0 and meta is not null"),
    lambda store: len(store.sql(f"from {TOP}")),
    attribute,
    lambda store: store.sql(COUNT).item(),
    top("q102", method="hybrid"),
    metrics,
    top("q103", approximate=True),
    lambda store: len(store.self_influence(checkpoints=["base"], sketcher="small", k=1000)),
    compared,
    top("q101", method="dot", opponents=True, null="signs"),
    similar,
]


def committed(store):
    """How many sketches that are no query each committed run has, by its number."""
    runs = store.sql(
        "select r.ingest_run, r.n_sketched from ingest_runs r join sources s on s.name = r.source "
        "where r.status = 'done' and r.checkpoint = 'base' and s.stage <> 'query' and r.n_sketched > 0 order by 1"
    )
    return dict(runs.iter_rows())


def check(store, way):
    """Query; the answer must come from the committed runs, maybe with the next ones. Returns the committed runs."""
    before = committed(store)
    answer = way(store)
    after = committed(store)
    assert before.items() <= after.items()
    runs = [*after]
    possible = [set(runs[:n]) for n in range(len(before), len(after) + 1)]
    n_rows, made_of = answer if isinstance(answer, tuple) else (answer, None)
    if made_of is not None:
        assert made_of in possible
        assert n_rows == sum(after[run] for run in made_of)
    elif n_rows is not None:
        assert n_rows in [sum(after[run] for run in subset) for subset in possible]
    return len(after)


def test_reads_during_an_ingest_see_only_committed_runs(scored_path, tmp_path):
    path = copy_store(scored_path, tmp_path / "lark.store")
    with Store.open(path) as store:
        store.index_build("small")
        names = [f"harbour-{i}" for i in range(6)]
        for name in names:
            store.source_add(name, write_jsonl(tmp_path / f"{name}.jsonl", text_rows(50, name)), stage="pretrain")
        seen = [check(store, way) for way in WAYS]  # the first query takes longer
        command = [
            PROGRAM,
            "ingest",
            "--store",
            store_label(path),
            "-c",
            "base",
            "--sketcher",
            "small",
            "--variant",
            "chatml",
        ]
        command += [word for name in names for word in ("-s", name)] + ["--batch-tokens", "64"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as ingest:
            for way in itertools.cycle(WAYS):
                seen.append(check(store, way))
                if ingest.poll() is not None:
                    break
            assert ingest.stderr is not None
            assert ingest.returncode == 0, ingest.stderr.read()
        seen += [check(store, way) for way in WAYS]
        assert (seen[0], seen[-1]) == (5, 11)
        assert len(set(seen)) > 2, "no answer was given while some runs were committed"
        assert store.sql(COUNT).item() == 26 + 300
        vectors = pl.from_arrow(store._db.vectors.table("influence").to_arrow().select(["score_run"]))
        rows = store.sql("select score_run from score_runs where status = 'done'")["score_run"]
        assert set(vectors["score_run"]) == set(rows)
