"""Any order of commands, kills among them, leaves the store that a few sets in plain Python say it must be.

Nothing is faked: a tiny Llama is sketched, a killed ingest is a process that gets SIGKILL (`dying.py`), a snapshot, a
backup and a repair are those that people make. `LARK_FUZZ=N` tries N times as many stores, of more steps each.
"""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from conftest import write_jsonl
from dying import killed_ingest
from golden.make import save_model
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from lark_store import Store
from lark_store.errors import NothingToScoreError

TIMES = int(os.environ.get("LARK_FUZZ", "1"))
SKETCHER, QUERIES = "tiny", "test"
CHECKPOINTS, SOURCES, VARIANTS = ("a", "b"), (QUERIES, "songs", "facts"), ("raw", "chatml")
STAGES = {QUERIES: "query", "songs": "pretrain", "facts": "finetune"}
MUTE = "x"  # one token: raw, it has nothing to predict and fails
Unit = tuple[str, str, str]  # checkpoint, source, variant


@dataclass
class Said:
    """What a store must hold. `hidden` are the rows of runs that were killed, which nobody sees."""

    samples: dict[str, dict[str, str]] = field(default_factory=dict)  # source to id to text
    sketches: dict[Unit, set[str]] = field(default_factory=dict)
    hidden: dict[Unit, set[str]] = field(default_factory=dict)
    scores: dict[Unit, tuple[set[str], set[str]]] = field(default_factory=dict)  # group to queries and samples

    def sketchable(self, unit: Unit) -> set[str]:
        _, source, variant = unit
        return {i for i, text in self.samples[source].items() if variant == "chatml" or text != MUTE}

    def commit(self, unit: Unit, ids: set[str]) -> None:
        self.sketches[unit] = self.sketches.get(unit, set()) | ids
        self.hidden.pop(unit, None)

    def forget(self, source: str, ids: set[str]) -> None:
        """Take from samples all that was made of them; what was scored with one of them is scored no more."""
        for unit in list(self.sketches | self.hidden):
            there = self.sketches.get(unit, set()) | self.hidden.get(unit, set())
            if unit[1] == source and there & ids:
                self.unscore(unit)
                for rows in (self.sketches, self.hidden):
                    if unit in rows:
                        rows[unit] -= ids

    def unscore(self, unit: Unit) -> None:
        at, source, variant = unit
        if source != QUERIES:
            self.scores.pop(unit, None)
        elif variant == "chatml":
            self.scores = {group: rows for group, rows in self.scores.items() if group[0] != at}

    def drop(self, place: int, name: str) -> None:
        """Remove a checkpoint (place 0) or a source (place 1)."""
        for rows in (self.sketches, self.hidden, self.scores):
            for unit in [unit for unit in rows if unit[place] == name]:
                del rows[unit]
        if name == QUERIES and place == 1:
            self.scores.clear()

    def groups(self, at: str) -> dict[Unit, set[str]]:
        return {u: ids for u, ids in self.sketches.items() if u[0] == at and u[1] != QUERIES and ids}

    def queries(self, at: str) -> set[str]:
        return self.sketches.get((at, QUERIES, "chatml"), set())

    def influence(self) -> set[tuple[str, ...]]:
        return {
            (at, query, source, variant, sample)
            for (at, source, variant), (queries, samples) in self.scores.items()
            for query in queries
            for sample in samples
        }


def shown(store: Store) -> dict[str, list[tuple[str, ...]]]:
    """What a reader sees, row by row: one that is there twice is there twice."""
    return {
        "samples": store.sql("SELECT source, sample_id, text FROM samples").rows(),
        "sketches": store.sql("SELECT checkpoint, source, variant, sample_id FROM sketches").rows(),
        "influence": store.sql("SELECT checkpoint, query_id, source, variant, sample_id FROM influence").rows(),
        "sums": store.sql("SELECT checkpoint, source, variant, query_id, n FROM source_influence").rows(),
    }


def told(said: Said) -> dict[str, set[tuple[object, ...]]]:
    """What a reader must see."""
    return {
        "samples": {(source, i, text) for source, rows in said.samples.items() for i, text in rows.items()},
        "sketches": {(*unit, i) for unit, ids in said.sketches.items() for i in ids},
        "influence": said.influence(),
        "sums": {(*unit, query, len(ids)) for unit, (queries, ids) in said.scores.items() for query in queries},
    }


def agree(store: Store, said: Said) -> None:
    seen, expected = shown(store), told(said)
    assert {name: sorted(rows) for name, rows in seen.items()} == {n: sorted(rows) for n, rows in expected.items()}


class Machine(RuleBasedStateMachine):
    """A store, and what it must hold."""

    home: Path  # of this test
    models: dict[str, Path]

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(dir=self.home))
        self.store = Store.open(shutil.copytree(self.home / "fresh.store", self.folder / "0.store"))
        self.said, self.snapshots = Said(), {}
        self.checkpoints: set[str] = set(CHECKPOINTS)
        self.number, self.killed = 0, False

    def next(self) -> int:
        self.number += 1
        return self.number

    def rows(self, rows: dict[str, str]) -> Path:
        return write_jsonl(self.folder / "rows.jsonl", [{"id": i, "text": text} for i, text in rows.items()])

    def fresh(self, n: int, *, mute: bool = False) -> dict[str, str]:
        numbers = [self.next() for _ in range(n)]
        texts = {f"s{i}": f"Song {i} of the sea" for i in numbers}
        return texts | ({f"m{self.next()}": MUTE} if mute else {})

    # --- rules ---

    @initialize(ingested=st.booleans())
    def begin(self, ingested):
        for source in SOURCES:
            self.add(source, 3, mute=False)
        if ingested:
            self.ingest([*CHECKPOINTS], [*SOURCES], [*VARIANTS])

    @rule(source=st.sampled_from(SOURCES), n=st.integers(1, 4), mute=st.booleans())
    def add(self, source, n, mute):
        rows = self.fresh(n, mute=mute)
        report = self.store.source_add(source, self.rows(rows), stage=STAGES[source])
        assert (report.n_added, report.n_existing, report.n_changed) == (len(rows), 0, 0)
        self.said.samples.setdefault(source, {}).update(rows)

    @rule(source=st.sampled_from(SOURCES), pick=st.integers(0, 9), replace=st.booleans())
    def add_again(self, source, pick, replace):
        """New samples among those that are there, one of them twice in the file, one changed."""
        there = self.said.samples.get(source, {})
        if not there:
            return
        names = sorted(there)
        changed = names[pick % len(names)]
        rows = self.fresh(2) | there | {changed: f"Song {self.next()}, another one"}
        report = self.store.source_add(source, self.rows(rows), stage=STAGES[source], replace=replace)
        assert (report.n_added, report.n_existing) == (2, len(there) - 1)
        assert (report.n_replaced, report.n_changed) == ((1, 0) if replace else (0, 1))
        if replace:
            self.said.forget(source, {changed})
        else:
            rows[changed] = there[changed]
        there.update(rows)

    @rule(
        at=st.lists(st.sampled_from(CHECKPOINTS), min_size=1, unique=True),
        sources=st.lists(st.sampled_from(SOURCES), min_size=1, unique=True),
        variants=st.lists(st.sampled_from(VARIANTS), min_size=1, unique=True),
    )
    def ingest(self, at, sources, variants):
        at, sources = [c for c in at if c in self.checkpoints], [s for s in sources if s in self.said.samples]
        report = self.store.ingest(at, sources, variants, sketcher=SKETCHER)
        units = [(c, s, v) for c in at for s in sources for v in variants]
        done = dict(zip(units, report.units.iter_rows(named=True), strict=True))
        for unit in units:
            wanted, had = self.said.sketchable(unit), self.said.sketches.get(unit, set())
            there = had | self.said.hidden.get(unit, set())
            assert done[unit]["n_sketched"] == len(wanted - there), unit
            assert done[unit]["n_failed"] == len(self.said.samples[unit[1]]) - len(wanted), unit
            self.said.commit(unit, wanted)

    @rule(
        at=st.sampled_from(CHECKPOINTS),
        source=st.sampled_from(SOURCES),
        variant=st.sampled_from(VARIANTS),
        step=st.integers(0, 9),
    )
    def killed_ingest(self, at, source, variant, step):
        unit = (at, source, variant)
        if at not in self.checkpoints or not self.said.samples.get(source):
            return
        committed, wrote = killed_ingest(self.store.path, unit, SKETCHER, step, self.folder / "log")
        self.killed = True
        there = self.said.hidden.get(unit, set()) | wrote
        assert there <= self.said.sketchable(unit)
        if committed:
            self.said.commit(unit, there)
        else:
            self.said.hidden[unit] = there

    @rule(at=st.sampled_from(CHECKPOINTS))
    def attribute(self, at):
        groups, queries = self.said.groups(at), self.said.queries(at)
        if at not in self.checkpoints:
            return
        if not groups or not queries:
            with pytest.raises((NothingToScoreError, LookupError)):
                self.store.attribute([at], queries=QUERIES, query_variant="chatml", sketcher=SKETCHER)
            return
        done = self.store.attribute([at], queries=QUERIES, query_variant="chatml", sketcher=SKETCHER)
        scored = {(r["checkpoint"], r["source"], r["variant"]): r["status"] for r in done.iter_rows(named=True)}
        now = {unit: (set(queries), set(ids)) for unit, ids in groups.items()}
        assert scored == {u: "current" if self.said.scores.get(u) == rows else "scored" for u, rows in now.items()}
        self.said.scores |= now
        self.same_scores(at)

    def same_scores(self, at):
        """What was scored is what is computed on the spot."""
        query = min(self.said.queries(at))
        hits = self.store.top(query, checkpoint=at, k=1000, query_variant="chatml", sketcher=SKETCHER).frame
        now = {tuple(key): score for *key, score in hits.select("source", "variant", "sample_id", "score").rows()}
        kept = "SELECT source, variant, sample_id, score FROM influence WHERE checkpoint = ? AND query_id = ?"
        assert {tuple(key): pytest.approx(s, abs=1e-5) for *key, s in self.store.sql(kept, [at, query]).rows()} == now

    @rule(source=st.sampled_from(SOURCES), picks=st.lists(st.integers(0, 20), min_size=1, max_size=3))
    def remove_samples(self, source, picks):
        names = sorted(self.said.samples.get(source, {}))
        if not names:
            return
        ids = {names[pick % len(names)] for pick in picks}
        self.store.sample_remove(source, sorted(ids))
        self.said.forget(source, ids)
        for name in ids:
            del self.said.samples[source][name]

    @rule(source=st.sampled_from(SOURCES))
    def remove_source(self, source):
        if source in self.said.samples:
            self.store.source_remove(source)
            self.said.drop(1, source)
            del self.said.samples[source]

    @rule(at=st.sampled_from(CHECKPOINTS))
    def remove_or_add_checkpoint(self, at):
        if at in self.checkpoints:
            self.store.checkpoint_remove(at)
            self.said.drop(0, at)
        else:
            self.store.checkpoint_add(at, self.models[at])
        self.checkpoints ^= {at}

    @precondition(lambda self: len(self.snapshots) < 2)
    @rule()
    def snapshot(self):
        name = f"n{self.next()}"
        self.store.snapshot_create(name)
        self.snapshots[name] = copy.deepcopy(self.said)

    @precondition(lambda self: self.snapshots)
    @rule(pick=st.integers(0, 9))
    def remove_snapshot(self, pick):
        name = sorted(self.snapshots)[pick % len(self.snapshots)]
        self.store.snapshot_remove(name)
        del self.snapshots[name]

    @rule(days=st.sampled_from([0, 7]))
    def optimize(self, days):
        self.store.db_optimize(keep_versions_days=days)

    @rule()
    def reopen(self):
        path = self.store.path
        self.store.close()
        self.store = Store.open(path)

    @rule()
    def check(self):
        found = self.store.db_check()
        if self.killed:  # notes of what it left: a stale run, its lock, a table without its indices
            assert "error" not in set(found["severity"]), found.rows()
        else:
            assert found.is_empty(), found.rows()

    @rule()
    def repair(self):
        self.store.db_repair()
        for unit, ids in list(self.said.hidden.items()):
            self.said.commit(unit, ids)
        self.killed = False
        assert self.store.db_check().is_empty()

    @rule()
    def move_to_a_backup(self):
        """The store goes on as what a backup gives back."""
        n = self.next()
        self.store.db_backup(self.folder / f"{n}.backup")
        self.store.close()
        shutil.rmtree(self.store.path)
        Store.db_restore(self.folder / f"{n}.backup", to=self.folder / f"{n}.store")
        shutil.rmtree(self.folder / f"{n}.backup")
        self.store = Store.open(self.folder / f"{n}.store")

    # --- what always holds ---

    @invariant()
    def the_store_holds_what_it_must(self):
        agree(self.store, self.said)

    @invariant()
    def top_answers_of_committed_rows_alone(self):
        for at in self.checkpoints:
            groups, queries = self.said.groups(at), self.said.queries(at)
            if not groups or not queries:
                continue
            hits = self.store.top(max(queries), checkpoint=at, k=1000, query_variant="chatml", sketcher=SKETCHER)
            found = sorted(hits.frame.select("source", "variant", "sample_id").rows())
            assert found == sorted((s, v, i) for (_, s, v), ids in groups.items() for i in ids)

    @invariant()
    def snapshots_show_what_they_showed(self):
        assert set(self.store.snapshot_list()["name"]) == set(self.snapshots)
        for name, said in self.snapshots.items():
            with Store.open(self.store.path, snapshot=name) as then:
                agree(then, said)

    def teardown(self):
        self.repair()
        agree(self.store, self.said)
        if any(self.said.sketches.values()):
            assert self.store.verify(sketches=10)["ok"].all()  # of a replaced sample it is the new text's sketch
        self.store.close()
        shutil.rmtree(self.folder)


def test_any_order_of_commands_leaves_what_it_must(tmp_path):
    Machine.home = tmp_path
    Machine.models = {name: save_model(tmp_path / name, seed) for seed, name in enumerate(CHECKPOINTS)}
    with Store.create(tmp_path / "fresh.store") as store:
        for name, model in Machine.models.items():
            store.checkpoint_add(name, model)
        store.sketcher_add(SKETCHER, k=256)
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=5 * TIMES,
            stateful_step_count=14 if TIMES == 1 else 30,
            deadline=None,
            derandomize=TIMES == 1,
            suppress_health_check=list(HealthCheck),
            print_blob=False,
        ),
    )
