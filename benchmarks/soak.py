"""Work on one store for an hour, and tell what grows that should not.

    OMP_NUM_THREADS=1 python benchmarks/soak.py OUT --minutes 60

One process adds, ingests, scores, asks, removes and optimizes, over and over; another asks all the while. The store
holds as much at the end of a round as at its start, so whatever rises is a leak: memory, open files, files and bytes of
the store, the time of an answer. The model is a tiny random Llama: the gradients cost next to nothing, and what is
measured is the store. Lance may keep --caches MiB of what it has read of a table's versions, twice: a store's own limit
is 32, which an hour of this does not fill, and what is still filling looks like a leak. OUT must not exist; the table
is printed and is in OUT/soak.json too. The exit status is 1 if `db check` finds something at the end or the reader met
an error.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched

import numpy as np
import psutil
from stores import save_tokenizer

from lark_store import Store
from lark_store.errors import LarkStoreError
from lark_store.schema import vectors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HELD, SHARE, QUERIES = 512, 8, 16  # samples that are held, that come and go in a round, queries
SKETCHER, CHECKPOINT = "tiny", "base"
WARM = 0.2  # the share of the time that no line is fitted to
TEXT = "is the kidney affected by this disease a song about the sea and the night train to the old harbour"
WORDS = TEXT.split()
COLUMNS = ("minute", "round", "rss", "reader", "fds", "reader fds", "files", "MB", "catalog MB", "top", "top CPU")


@dataclass(frozen=True)
class Sample:
    """What was seen at one moment; memory and sizes in MB, times in ms (medians since the sample before)."""

    minute: float
    round: int
    rss: float
    reader_rss: float
    fds: int
    reader_fds: int
    files: int
    store: float
    catalog: float
    top_wall: float
    top_cpu: float


def texts(ids: Iterator[int], n: int) -> list[dict[str, Any]]:
    """Make the next n samples: any few words, never the same twice."""
    return [
        {"id": f"s{i}", "text": " ".join([*np.random.default_rng(i).choice(WORDS, 12), str(i)])}
        for i in itertools.islice(ids, n)
    ]


class Soak:
    """A store and the rounds that are done on it."""

    def __init__(self, home: Path, minutes: float) -> None:
        self.home, self.seconds = home, minutes * 60
        self.rows, self.ids = home / "rows.jsonl", itertools.count()
        self.held: list[str] = []
        self.round = 0
        self.tops: list[tuple[float, float, float]] = []  # when, wall and CPU seconds
        self.keep_days = max(5.0, min(60.0, self.seconds / 10)) / 86_400  # longer than any answer takes
        self.store = Store.create(home / "lark.store")
        self._fill()

    def _fill(self) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        model = self.home / "model"
        save_tokenizer(model, [TEXT], 300)
        shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = LlamaConfig(vocab_size=300, max_position_embeddings=128, tie_word_embeddings=True, **shape)
        LlamaForCausalLM(config).save_pretrained(model)
        self.store.checkpoint_add(CHECKPOINT, model, learning_rate=1e-3)
        self.store.sketcher_add(SKETCHER, k=256)
        self._add("queries", QUERIES, "query")
        self._add("stays", HELD // 4, "pretrain")
        self.held += self._add("flows", HELD, "finetune")
        self._ingest("queries", "stays")

    def _add(self, source: str, n: int, stage: str) -> list[str]:
        rows = texts(self.ids, n)
        self.rows.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        self.store.source_add(source, self.rows, stage=stage)
        return [row["id"] for row in rows]

    def _ingest(self, *sources: str) -> None:
        report = self.store.ingest([CHECKPOINT], sources, ["raw"], sketcher=SKETCHER)
        assert report.n_failed == 0, report.failures

    def work(self) -> None:
        """Do one round: as much comes as goes; at times what is done more seldom."""
        self.round += 1
        self.held += self._add("flows", SHARE, "finetune")
        self._ingest("flows")
        self.store.attribute([CHECKPOINT], sketcher=SKETCHER)
        for number in range(5):
            self._ask(f"s{(self.round + number) % QUERIES}")
        going, self.held = self.held[:SHARE], self.held[SHARE:]
        self.store.sample_remove("flows", going)
        seldom: list[tuple[int, Callable[[], object]]] = [
            (5, self._read),
            (10, self._visit),
            (20, lambda: self.store.db_optimize(keep_versions_days=self.keep_days)),
            (30, self._snapshot),
        ]
        for every, do in seldom:
            if self.round % every == 0:
                do()

    def _ask(self, query: str) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        hits = self.store.top(query, checkpoint=CHECKPOINT, sketcher=SKETCHER)
        self.tops.append((time.perf_counter(), time.perf_counter() - wall, time.process_time() - cpu))
        assert hits.n_searched == HELD + SHARE + HELD // 4, hits.how

    def _read(self) -> None:
        """Ask in the other ways; a second handle is opened and closed."""
        self.store.metrics(sketcher=SKETCHER)
        self.store.top("s1", checkpoint=CHECKPOINT, sketcher=SKETCHER, method="bm25")
        with Store.open(self.store.path) as other:
            assert other.sql("SELECT count(*) FROM sketches").item() == HELD + HELD // 4 + QUERIES
            other.show()

    def _visit(self) -> None:
        """Let a source come and go, each time under another name."""
        name = f"visitor-{self.round}"
        self._add(name, SHARE, "query")
        self._ingest(name)
        self.store.top(f"s{next(self.ids) - 1}", checkpoint=CHECKPOINT, sketcher=SKETCHER, queries=name)
        self.store.source_remove(name)

    def _snapshot(self) -> None:
        """Make a snapshot, read it and remove it."""
        self.store.snapshot_create("now")
        with Store.open(self.store.path, snapshot="now") as then:
            then.sql("SELECT count(*) FROM influence")
        self.store.snapshot_remove("now")

    def sample(self, start: float, reader: psutil.Process, since: int) -> Sample:
        """Look at both processes and at the store's files."""
        mine = psutil.Process()
        sizes = [path.stat().st_size for path in self.store.path.rglob("*") if path.is_file()]
        catalog = (self.store.path / "catalog.sqlite").stat().st_size
        walls, cpus = ([top[part] * 1e3 for top in self.tops[since:]] for part in (1, 2))
        return Sample(
            (time.perf_counter() - start) / 60, self.round,
            mine.memory_info().rss / 1e6, reader.memory_info().rss / 1e6, mine.num_fds(), reader.num_fds(),
            len(sizes), sum(sizes) / 1e6, catalog / 1e6, statistics.median(walls), statistics.median(cpus),
        )  # fmt: skip


def read(path: Path, stop: Path) -> None:
    """Ask one open store until there is a file `stop`; prints what was answered, and every error."""
    answers, errors = 0, []
    with Store.open(path) as store:
        while not stop.exists():
            try:
                store.top(f"s{answers % QUERIES}", checkpoint=CHECKPOINT, sketcher=SKETCHER)
                store.sql("SELECT source, avg(score) FROM influence GROUP BY ALL")
            except (LarkStoreError, OSError, RuntimeError, ValueError) as error:
                errors.append(f"{type(error).__name__}: {error}")
            answers += 1
            time.sleep(0.2)
    print(json.dumps({"answers": answers, "errors": errors}))


def soak(home: Path, minutes: float) -> bool:
    """Work for so long, print the table; returns whether all is well."""
    home.mkdir(parents=True)
    run = Soak(home, minutes)
    run.work()  # both have something to read
    stop = home / "stop"
    caches = str(vectors.CACHES["index_cache_size_bytes"] >> 20)
    command = [sys.executable, __file__, str(run.store.path), "--reader", str(stop), "--caches", caches]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as reader:  # noqa: S603
        samples = list(watch(run, psutil.Process(reader.pid)))
        stop.touch()
        said, _ = reader.communicate(timeout=120)
    run.store.db_optimize(keep_versions_days=0)
    found = run.store.db_check()
    run.store.close()
    told = json.loads(said)
    summary = summarize(run, samples) | {"answers": told["answers"], "errors": len(told["errors"])}
    print("\n" + "\n".join(f"{name}: {value}" for name, value in summary.items()))
    print(f"reader's errors: {told['errors'][:3]}" if told["errors"] else "the reader met no error")
    print(found if len(found) else "db check found nothing")
    (home / "soak.json").write_text(json.dumps({"samples": [asdict(s) for s in samples], "summary": summary}, indent=1))
    return not told["errors"] and not len(found)


def watch(run: Soak, reader: psutil.Process) -> Iterator[Sample]:
    """Do rounds until the time is over; yields a sample now and then, and prints every tenth."""
    print("  ".join(f"{name:>10}" for name in COLUMNS), flush=True)
    start, taken, since = time.perf_counter(), 0, len(run.tops)
    while (passed := time.perf_counter() - start) < run.seconds:
        run.work()
        if passed < run.seconds * taken / 240:
            continue
        sample = run.sample(start, reader, since)
        if taken % 10 == 0:
            print("  ".join(f"{value:>10.1f}" for value in asdict(sample).values()), flush=True)
        taken, since = taken + 1, len(run.tops)
        yield sample


def summarize(run: Soak, samples: list[Sample]) -> dict[str, Any]:
    """Fit lines to what was seen after the warm-up, and compare the first and the last tenth of the answers."""
    late = [s for s in samples if s.minute >= WARM * run.seconds / 60] or samples
    hours = [s.minute / 60 for s in late]

    def slope(name: str) -> float:
        return round(float(np.polyfit(hours, [getattr(s, name) for s in late], 1)[0]), 2)

    tenth = max(1, len(run.tops) // 10)
    parts = {"first": run.tops[:tenth], "last": run.tops[-tenth:]}
    of_tops = {
        f"top in the {which} tenth, ms {what}": round(statistics.median(top[part] for top in tops) * 1e3, 1)
        for which, tops in parts.items()
        for part, what in ((1, "wall"), (2, "CPU"))
    }
    kinds = ("rss", "reader_rss", "fds", "reader_fds", "files", "store", "catalog")
    return (
        {"rounds": run.round, "answers of the worker": len(run.tops)}
        | {f"{kind} per hour": slope(kind) for kind in kinds}
        | {f"most {kind}": max(getattr(s, kind) for s in late) for kind in ("files", "store", "fds")}
        | of_tops
    )


def main() -> None:
    """Read the options and work."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--caches", type=int, default=4)
    parser.add_argument("--reader", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    vectors.CACHES.update(dict.fromkeys(vectors.CACHES, options.caches << 20))
    if options.reader:
        read(options.out, options.reader)
        return
    raise SystemExit(0 if soak(options.out, options.minutes) else 1)


if __name__ == "__main__":
    main()
