"""kill -9 anywhere: a store is worked through the script, and processes are killed at random moments of each step."""

from __future__ import annotations

import math
import random
import re
import signal
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import polars as pl
from script import N_REMOVED, REMOVED, Step, keys, n_sketches, orphans, script

from lark_store import Store
from lark_store.errors import OlderSchemaError

if TYPE_CHECKING:
    from pathlib import Path

    from places import Place
    from processes import Process, Runner

BATCH = 16  # rows per commit of an ingest
KINDS = {"add", "ingest", "score", "optimize", "index", "migrate"}
_WORKS_AGAIN = {"optimize", "index", "migrate"}  # also where it was done just before
_FOR_EACH = 2  # kills planned for each that is to land inside the work of one of these
_REPAIR_S = 0.3
_PROGRESS = re.compile(r"^(.+ · .+ · .+): (\d+)/(\d+)$", re.MULTILINE)
REPAIR = Step("repair", "db repair", 0)
# Findings which no repair may touch, as samples and names belong to the user: a rerun of the command mends them.
_MENDED_BY_THE_STEP = {"unknown source"}


@dataclass
class Kill:
    """One kill: the step, the time (seconds after its work began), the place where it landed and the findings."""

    campaign: int
    step: Step
    delay: float
    landed: str  # `inside` the work, `before` or `after` it
    findings: list[str] = field(default_factory=list)
    repaired: bool = False
    rows_again: int = 0  # computed, and not in the store
    rows_lost: int = 0
    rows_doubled: int = 0

    def __str__(self) -> str:
        text = ", ".join(self.findings) or "nothing"
        again = f", {self.rows_again} rows again" if self.rows_again else ""
        return f"{self.step.line[:60]}: killed {self.landed} after {self.delay:.3f} s{again}; found {text}"


def undisturbed(runner: Runner, place: Place, files: Path) -> dict[str, float]:
    """Work a store through the script without a kill; returns how long each kind of step works, by its line."""
    runner.run(place, *place.init)
    seconds = {}
    for number, step in enumerate(script(files)):
        if step.older:
            place.older(step.older)
        process = runner.run(place, *step.words)
        assert process.begun is not None
        assert process.done is not None
        seconds[f"{number} {step.line}"] = process.done - process.begun
    return seconds


class Campaign:
    """Run one store through the script and kill; `kills` records the events. About `wanted` kills land in `KINDS`."""

    def __init__(
        self, runner: Runner, place: Place, files: Path, seconds: dict[str, float], seed: int, n_kills: int
    ) -> None:
        self.runner, self.place, self.files, self.seconds, self.seed = runner, place, files, seconds, seed
        self.random = random.Random(seed)  # noqa: S311  no secret
        self.kills: list[Kill] = []
        self.computed = 0
        self.known: Counter[str] = Counter()
        self.n_sketches = 0
        self.removing = False
        steps = script(files)
        slots = [number for number, step in enumerate(steps) for _ in range(step.kills)]
        self.n_planned = min(math.ceil(_FOR_EACH * n_kills), len(slots))
        chosen = self.random.sample(slots, self.n_planned)
        self.steps = [(f"{number} {step.line}", step, chosen.count(number)) for number, step in enumerate(steps)]

    @property
    def n_inside(self) -> int:
        """How many kills landed inside the work of a step of `KINDS`."""
        return sum(kill.landed == "inside" and kill.step.kind in KINDS for kill in self.kills)

    def run(self) -> None:
        """Do each step, killed some times and then to its end; at the end the store is clean."""
        self.runner.run(self.place, *self.place.init)
        for name, step, kills in self.steps:
            self._make_older(step)
            for left in range(kills, 0, -1):
                share = left if step.goes_on else 1  # the rest is shorter after each
                if self._kill(name, step, self.random.uniform(0, self.seconds[name] / share)):
                    continue
                if step.kind not in _WORKS_AGAIN:
                    break
                self._make_older(step)
            self._finish(name, step)
        self.runner.run(self.place, "db", "repair")
        self.runner.run(self.place, "db", "optimize", "--keep-versions-days", "0")
        with Store.open(self.place.store) as store:
            assert store.db_check(deep=20).rows() == []
            assert orphans(store) == []
            self.made = n_sketches(store) + N_REMOVED

    def _make_older(self, step: Step) -> None:
        if step.older:
            self.place.older(step.older)

    def _learn(self, name: str, step: Step, process: Process) -> None:
        """Take note of how long a step works now: a busy machine may be idle soon."""
        if not step.goes_on and process.begun and process.done:
            self.seconds[name] = (self.seconds[name] + process.done - process.begun) / 2

    def _finish(self, name: str, step: Step) -> None:
        process = self.runner.run(self.place, *step.words, codes=(0, 1))
        assert process.code == 0 or step.was_done(process.err), process.err
        if step.kind in _WORKS_AGAIN:
            self._learn(name, step, process)
        self.computed += _computed(process)
        with Store.open(self.place.store) as store:
            assert self._lost(step, store) == 0

    def _kill(self, name: str, step: Step, delay: float) -> bool:
        """Start a step, kill it, and check the store; returns whether the step is unfinished."""
        process = self.runner.start(self.place, *step.words)
        process.wait_for_work()
        process.wait(delay)
        process.kill()
        self._learn(name, step, process)
        kill = Kill(self.seed, step, delay, _landed(process))
        self.kills.append(kill)
        assert process.code in {0, -signal.SIGKILL} or step.was_done(process.err), process.err
        try:
            with Store.open(self.place.store) as store:
                self._look(kill, store, process)
        except OlderSchemaError:  # its hint is `db upgrade`, the step itself
            assert step.kind == "migrate"
            kill.findings.append("note: older schema")
            return True
        return kill.landed == "inside" and step.kind != "migrate"

    def _look(self, kill: Kill, store: Store, process: Process) -> None:
        """Compare a store with its contents before the kill, check it, and repair it or not, by chance."""
        if kill.step.kind == "ingest":
            result, stored = _computed(process), n_sketches(store) - self.n_sketches
            self.computed += result
            in_hand = kill.landed == "inside" and "loading the model" in process.err
            kill.rows_again = max(0, result + in_hand - stored)
        kill.rows_lost = self._lost(kill.step, store)
        kill.rows_doubled = sum(n - 1 for n in self.known.values())
        findings = store.db_check()
        kill.findings += [
            f"{row['severity']}: {row['what']} ({row['where']})" for row in findings.iter_rows(named=True)
        ]
        left = set(findings.filter(pl.col("repair").is_null())["what"])
        assert left <= _MENDED_BY_THE_STEP, findings
        if findings.is_empty() or kill.step is REPAIR or self.random.random() < 0.5:
            return  # as most people do: the next step meets the store as the kill left it
        if self.random.random() < 0.5:
            self._kill("repair", REPAIR, self.random.uniform(0, self.seconds.setdefault("repair", _REPAIR_S)))
        self.runner.run(self.place, "db", "repair")
        kill.repaired = True
        assert set(store.db_check()["what"]) == left
        assert self._lost(kill.step, store) == 0

    def _lost(self, step: Step, store: Store) -> int:
        """Count the known keys which are gone; the present keys become the known ones."""
        known, self.known, self.n_sketches = self.known, keys(store), n_sketches(store)
        gone = known - self.known
        if self.removing or step.kind == "remove":  # removed rows stay away until the next scoring
            self.removing = step.kind != "score"
            gone = Counter({key: n for key, n in gone.items() if not _may_go(key)})
        return gone.total()


def _may_go(key: str) -> bool:
    """Tell whether the script removes this key: a sample, its sketches, or scores of the groups that had it."""
    return key.startswith("score ") or key.endswith(tuple(f"/{sample_id}" for sample_id in REMOVED))


def _landed(process: Process) -> str:
    if process.done is not None or process.code != -signal.SIGKILL:
        return "after"
    return "inside"


def _computed(process: Process) -> int:
    """Return how many rows an ingest computed, by its own progress."""
    return sum({unit: int(n_done) for unit, n_done, _ in _PROGRESS.findall(process.err)}.values())


def table(kills: list[Kill]) -> pl.DataFrame:
    """Return the outcomes of kills by step, with their sums."""
    rows = []
    for kind in [*dict.fromkeys(kill.step.kind for kill in kills), "all"]:
        mine = [kill for kill in kills if kind in {kill.step.kind, "all"}]
        inside = [kill for kill in mine if kill.landed == "inside"]
        rows.append(
            {
                "step": kind,
                "kills": len(mine),
                "inside the work": len(inside),
                "after its end": len(mine) - len(inside),
                "left a finding": sum(bool(kill.findings) for kill in inside),
                "repaired": sum(kill.repaired for kill in inside),
                "batches again": sum(kill.rows_again > 0 for kill in inside),
                "most rows again": max((kill.rows_again for kill in inside), default=0),
                "rows again": sum(kill.rows_again for kill in inside),
                "rows lost": sum(kill.rows_lost for kill in mine),
                "rows doubled": sum(kill.rows_doubled for kill in mine),
            }
        )
    return pl.DataFrame(rows)


def findings(kills: list[Kill]) -> pl.DataFrame:
    """Return how many kills left which kind of finding."""
    counts = Counter(
        (kill.step.kind, name) for kill in kills for name in {finding.split(" (")[0] for finding in kill.findings}
    )
    rows = [{"step": kind, "finding": name, "kills": n} for (kind, name), n in sorted(counts.items())]
    return pl.DataFrame(rows, schema={"step": pl.String, "finding": pl.String, "kills": pl.Int64})
