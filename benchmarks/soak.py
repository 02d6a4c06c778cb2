"""Work on one store for an hour and report leaks.

    OMP_NUM_THREADS=1 python benchmarks/soak.py OUT --minutes 60

One process adds, ingests, scores, queries, removes and optimizes in a loop; another queries throughout. A round leaves
the store at its size, so any growth is a leak: memory, open files, files and bytes of the store, query time. The model
is a tiny random Llama whose gradients cost almost nothing, so the benchmark measures the store. Lance may cache up to
--caches MiB of a table's versions, twice. A store's own limit is 32, which an hour does not fill, and a filling cache
looks like a leak. OUT must not exist; the table is printed and saved to OUT/soak.json. The exit status is 1 if `db
check` finds something at the end or the reader met an error.
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

HELD, SHARE, QUERIES = 512, 8, 16  # samples in the store, samples replaced per round, queries
SKETCHER, CHECKPOINT = "tiny", "base"
WARM = 0.2  # the warm-up's share of the time, excluded from the fits
TEXT = "is the kidney affected by this disease a song about the sea and the night train to the old harbour"
WORDS = TEXT.split()
COLUMNS = ("minute", "round", "rss", "reader", "fds", "reader fds", "files", "MB", "catalog MB", "top", "top CPU")


@dataclass(frozen=True)
class Sample:
    """A measurement; memory and sizes in MB, times in ms (medians since the previous sample)."""

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
    """Return the next n samples: a few random words, each sample unique."""
    return [
        {"id": f"s{i}", "text": " ".join([*np.random.default_rng(i).choice(WORDS, 12), str(i)])}
        for i in itertools.islice(ids, n)
    ]


class Soak:
    """A store and its rounds of work."""

    def __init__(self, home: Path, minutes: float) -> None:
        self.home, self.seconds = home, minutes * 60
        self.rows, self.ids = home / "rows.jsonl", itertools.count()
        self.held: list[str] = []
        self.round = 0
        self.tops: list[tuple[float, float, float]] = []  # time, wall and CPU seconds
        self.keep_days = max(5.0, min(60.0, self.seconds / 10)) / 86_400  # longer than any query
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
        """Do one round: add and remove the same number of samples, plus the work due at intervals."""
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
        """Query by other methods; open and close a second handle."""
        self.store.metrics(sketcher=SKETCHER)
        self.store.top("s1", checkpoint=CHECKPOINT, sketcher=SKETCHER, method="bm25")
        with Store.open(self.store.path) as second:
            assert second.sql("SELECT count(*) FROM sketches").item() == HELD + HELD // 4 + QUERIES
            second.show()

    def _visit(self) -> None:
        """Add and remove a source, each time under a new name."""
        name = f"visitor-{self.round}"
        self._add(name, SHARE, "query")
        self._ingest(name)
        self.store.top(f"s{next(self.ids) - 1}", checkpoint=CHECKPOINT, sketcher=SKETCHER, queries=name)
        self.store.source_remove(name)

    def _snapshot(self) -> None:
        """Create a snapshot, read it and remove it."""
        self.store.snapshot_create("now")
        with Store.open(self.store.path, snapshot="now") as then:
            then.sql("SELECT count(*) FROM influence")
        self.store.snapshot_remove("now")

    def sample(self, start: float, reader: psutil.Process, since: int) -> Sample:
        """Measure both processes and the store's files."""
        process = psutil.Process()
        sizes = [path.stat().st_size for path in self.store.path.rglob("*") if path.is_file()]
        catalog = (self.store.path / "catalog.sqlite").stat().st_size
        walls, cpus = ([top[part] * 1e3 for top in self.tops[since:]] for part in (1, 2))
        return Sample(
            (time.perf_counter() - start) / 60, self.round,
            process.memory_info().rss / 1e6, reader.memory_info().rss / 1e6, process.num_fds(), reader.num_fds(),
            len(sizes), sum(sizes) / 1e6, catalog / 1e6, statistics.median(walls), statistics.median(cpus),
        )  # fmt: skip


def read(path: Path, stop: Path) -> None:
    """Query one open store until the file `stop` exists; print the number of answers and all errors."""
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
    """Work for `minutes` and print the table; return whether there were no errors."""
    home.mkdir(parents=True)
    run = Soak(home, minutes)
    run.work()  # so that both processes have rows to read
    stop = home / "stop"
    caches = str(vectors.CACHES["index_cache_size_bytes"] >> 20)
    command = [sys.executable, __file__, str(run.store.path), "--reader", str(stop), "--caches", caches]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as reader:  # noqa: S603
        samples = list(watch(run, psutil.Process(reader.pid)))
        stop.touch()
        output, _ = reader.communicate(timeout=120)
    run.store.db_optimize(keep_versions_days=0)
    issues = run.store.db_check()
    run.store.close()
    answers = json.loads(output)
    summary = summarize(run, samples) | {"answers": answers["answers"], "errors": len(answers["errors"])}
    print("\n" + "\n".join(f"{name}: {value}" for name, value in summary.items()))
    print(f"reader's errors: {answers['errors'][:3]}" if answers["errors"] else "the reader met no error")
    print(issues if len(issues) else "db check found nothing")
    (home / "soak.json").write_text(json.dumps({"samples": [asdict(s) for s in samples], "summary": summary}, indent=1))
    return not answers["errors"] and not len(issues)


def watch(run: Soak, reader: psutil.Process) -> Iterator[Sample]:
    """Do rounds until the time is over; yield up to 240 samples and print every tenth."""
    print("  ".join(f"{name:>10}" for name in COLUMNS), flush=True)
    start, n_samples, since = time.perf_counter(), 0, len(run.tops)
    while (passed := time.perf_counter() - start) < run.seconds:
        run.work()
        if passed < run.seconds * n_samples / 240:
            continue
        sample = run.sample(start, reader, since)
        if n_samples % 10 == 0:
            print("  ".join(f"{value:>10.1f}" for value in asdict(sample).values()), flush=True)
        n_samples, since = n_samples + 1, len(run.tops)
        yield sample


def summarize(run: Soak, samples: list[Sample]) -> dict[str, Any]:
    """Fit lines to the samples after the warm-up, and compare the first and last tenth of the answers."""
    late = [s for s in samples if s.minute >= WARM * run.seconds / 60] or samples
    hours = [s.minute / 60 for s in late]

    def slope(name: str) -> float:
        return round(float(np.polyfit(hours, [getattr(s, name) for s in late], 1)[0]), 2)

    tenth = max(1, len(run.tops) // 10)
    parts = {"first": run.tops[:tenth], "last": run.tops[-tenth:]}
    of_tops = {
        f"top in the {part_name} tenth, ms {clock}": round(statistics.median(top[part] for top in tops) * 1e3, 1)
        for part_name, tops in parts.items()
        for part, clock in ((1, "wall"), (2, "CPU"))
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
