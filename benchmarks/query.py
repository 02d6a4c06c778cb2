"""The cost of queries: the scoring pass, baselines, growth with rows, and approximate search.

    python benchmarks/query.py REAL_STORE --work FOLDER --parts pass
    python benchmarks/query.py REAL_STORE --work FOLDER --parts others --faiss PYTHON --bergson PYTHON
    python benchmarks/query.py REAL_STORE --work FOLDER --parts growth --grow STORE STORE …
    python benchmarks/query.py REAL_STORE --work FOLDER --parts approximate --large STORE

Stores come from benchmarks/stores.py. Every method answers in its own process, in turn and round by round, after a
first read of its files for a warm page cache; tables give medians of the rounds, ranges and ratios. Stores are not
changed: each method gets a copy whose big files are hard links. FOLDER, on the same file system, keeps the vectors as
plain arrays and the tables of the baselines for later runs; remove it to start over.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as in the command line, for every method

import numpy as np
from ingest import table
from probe import read_all
from stores import groups_of

from lark_store import Store

HERE = Path(__file__).parent
HITS = 10
Figures = dict[str, Any]
Key = tuple[str, str, str]  # source, variant, sample_id
SCRIPTS = {"bergson": "bergson_query.py", "lark": "lark_query.py"}  # default: rivals_query.py


# --- processes -----------------------------------------------------------------------------------------------------


class Bench:
    """One store's vectors as plain arrays, its copies, and the processes answering queries."""

    def __init__(self, store: Path, work: Path, options: argparse.Namespace) -> None:
        self.store, self.options = store, options
        self.home = work / store.name
        self.home.mkdir(parents=True, exist_ok=True)
        with Store.open(store) as opened:
            groups = groups_of(opened)
            vectors = opened._db.vectors  # noqa: SLF001 - internal access
            queries = sorted((g for g in groups if g.source.stage == "query"), key=lambda g: int(g.source.name[8:]))
            self.groups = [g for g in groups if g.source.stage != "query"]
            self.queries = queries[-1]
            ids = [id_ for g in queries for id_ in sorted(vectors.read(g.table, ["sample_id"], g.filter)["sample_id"])]
            self.ids = list(dict.fromkeys(ids))  # the source `queries-n` has the first n
            sizes = [vectors.table(g.table).count_rows(g.filter) for g in self.groups]
        self.n = sum(sizes)
        self.threads = str(options.threads)

    @property
    def flat(self) -> Path:
        """The folder with rows.npy, queries.npy and keys.json, created on first use."""
        folder = self.home / "flat"
        if not (folder / "keys.json").is_file():
            folder.mkdir(exist_ok=True)
            self._export(folder)
        return folder

    def _export(self, folder: Path) -> None:
        """Write the vectors as stored, with queries in the order of their file."""
        k = self.queries.sketcher.k
        rows = np.lib.format.open_memmap(folder / "rows.npy", "w+", np.float16, (self.n, k))
        queries = np.empty((len(self.ids), k), np.float16)
        place = {sample_id: i for i, sample_id in enumerate(self.ids)}
        keys: list[Key] = []
        with Store.open(self.store) as opened:
            for group in [*self.groups, self.queries]:
                columns = ["sample_id", "vector"]
                for batch in opened._db.vectors.scan(group.table, columns, group.filter, 64):  # noqa: SLF001
                    vectors = batch.column("vector").flatten().to_numpy(zero_copy_only=True).reshape(-1, k)
                    ids = batch.column("sample_id").to_pylist()
                    if group is self.queries:
                        queries[[place[sample_id] for sample_id in ids]] = vectors
                    else:
                        rows[len(keys) : len(keys) + len(ids)] = vectors
                        keys += [(group.source.name, group.variant.name, sample_id) for sample_id in ids]
        rows.flush()
        np.save(folder / "queries.npy", queries)
        (folder / "keys.json").write_text(json.dumps(keys), encoding="utf-8")

    def copy(self, name: str) -> Path:
        """Return a working copy of the store, with hard links for the immutable vector files."""
        path = self.home / name
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(self.store, path, copy_function=_link)
        return path

    @property
    def data(self) -> Path:
        """The folder of the sketches' data files."""
        return self.store / "vectors" / f"{self.queries.table}.lance" / "data"

    def run(self, way: str, python: Path | None = None, **spec: Any) -> Figures:
        """Run one method in its own process and return its figures."""
        spec = {"way": way, **{name: str(v) if isinstance(v, Path) else v for name, v in spec.items()}}
        script = HERE / SCRIPTS.get(way.split("-", maxsplit=1)[0], "rivals_query.py")
        if not way.startswith("lark"):
            spec["flat"] = str(self.flat)
        command = [str(python or sys.executable), str(script), json.dumps(spec)]
        if "home" in spec and Path(spec["home"]).exists():
            read_all(Path(spec["home"]))
        environment = os.environ | {"OMP_NUM_THREADS": self.threads, "LANCE_CPU_THREADS": self.threads}
        environment |= {"LANCE_DEFAULT_BATCH_SIZE": "256"} if way == "lancedb-rq-build" else {}
        ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)  # noqa: S603 - ours
        figures: Figures = json.loads(ran.stdout.splitlines()[-1])
        self._say(way, spec, figures)
        return figures

    def _say(self, way: str, spec: Figures, figures: Figures) -> None:
        medians = {name: round(statistics.median(all_), 3) for name, all_ in figures["seconds"].items()}
        print(f"{self.n} rows, {spec.get('queries', '–')} queries, {way}: {medians}", file=sys.stderr, flush=True)

    def ours(self, way: str, home: Path, n: int, *, repeats: int = 1) -> Figures:
        """Run a lark-store method on the first n queries."""
        spec = {"source": f"queries-{n}", "ids": self.ids[:n], "calls": self.options.calls, "repeats": repeats}
        return self.run(way, home=home, queries=n, **spec)

    def made(self, name: str, way: str, python: Path | None = None) -> Path:
        """Return the folder of a baseline's files, created on first use."""
        folder = self.home / name
        if not (folder / "made.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            figures = self.run(way, python, home=folder)
            (folder / "made.json").write_text(json.dumps(figures), encoding="utf-8")
        return folder

    def numbers(self, top: list[list[Any]]) -> list[list[int]]:
        """Return an answer's rows as numbers, from keys or numbers."""
        if top and top[0] and not isinstance(top[0][0], int):
            keys = json.loads((self.flat / "keys.json").read_text(encoding="utf-8"))
            place = {tuple(key): i for i, key in enumerate(keys)}
            return [[place[tuple(key)] for key in answer] for answer in top]
        return top


def _link(source: str, target: str) -> None:
    if source.endswith(".lance"):
        os.link(source, target)
    else:
        shutil.copy2(source, target)


# --- figures -------------------------------------------------------------------------------------------------------


def seconds(figures: Figures, n: int) -> float:
    """Return seconds for n queries: the median call, scaled to n queries."""
    return float(statistics.median(figures["seconds"]["answer"])) * n / figures.get("per_call", n)


def recall(answers: list[list[Any]], true: list[list[Any]]) -> float:
    """Return the mean share of true rows in a top 10; rows are numbers, or keys from JSON."""
    shares = [sum(row in best for row in top) / min(HITS, len(best)) for top, best in zip(answers, true, strict=False)]
    return sum(shares) / len(shares)


def middle(rounds: list[Figures], name: str) -> float:
    """Return the median over rounds of a step's seconds, 0 without such a step."""
    return float(statistics.median(statistics.median(figures["seconds"].get(name, [0.0])) for figures in rounds))


def gib(rounds: list[Figures], name: str) -> float:
    """Return the largest peak over rounds, in GiB."""
    return max(float(figures[name]) for figures in rounds) / 2**30


def span(values: list[float]) -> str:
    """Format the smallest and the largest value."""
    return f"{min(values):.3g} – {max(values):.3g}"


MEMORY = ["imports, s", "opens, s", "first answer, s", "peak RSS, GiB", "peak RssAnon, GiB", "of it imports"]


def memory(rounds: list[Figures]) -> list[Any]:
    """Return the cells under `MEMORY`."""
    steps = [middle(rounds, name) for name in ("imports", "open", "first")]
    return [*steps, *(gib(rounds, name) for name in ("rss", "anon", "imported"))]


# --- the parts -----------------------------------------------------------------------------------------------------


def scoring_pass(bench: Bench) -> None:
    """Compare the scoring pass with its two floors: bare products and bare reads."""
    n = len(bench.ids)
    runs: dict[str, list[Figures]] = {"gemm": [], "bytes": [], "lark-attribute": []}
    for _ in range(bench.options.rounds):
        runs["gemm"].append(bench.run("gemm", queries=n))
        runs["bytes"].append(bench.run("bytes", home=bench.data))
        runs["lark-attribute"].append(bench.ours("lark-attribute", bench.copy("pass"), n))
    times = {name: [seconds(figures, n) for figures in rounds] for name, rounds in runs.items()}
    floor = max(statistics.median(times[name]) for name in ("gemm", "bytes"))
    labels = {
        "gemm": "bare products, float32 in memory",
        "bytes": f"bare reading of the table's files, {runs['bytes'][0]['bytes'] / 2**30:.3g} GiB",
        "lark-attribute": "**lark-store, attribute** (reads, multiplies, ranks, writes)",
    }
    rows = []
    for name, values in times.items():
        peaks = [gib(runs[name], key) for key in ("rss", "anon", "imported")]
        rows.append([labels[name], statistics.median(values), span(values), statistics.median(values) / floor, *peaks])
    title = f"The scoring pass: {n} queries × {bench.n:,} rows × {bench.queries.sketcher.k:,}"
    table(title, ["", "s, median", "range", "over the larger floor", *MEMORY[3:]], rows)
    shutil.rmtree(bench.home / "pass")


def others(bench: Bench) -> None:
    """Compare with the baselines, for each number of queries."""
    options = bench.options
    homes = {"lancedb-flat": bench.made("lancedb", "lancedb-make")}
    if options.faiss:
        folder = bench.made("faiss", "faiss-make", options.faiss)
        homes |= {name: folder / name for name in ("faiss-flat", "faiss-sq16")}
    if options.bergson:
        homes["bergson"] = bench.made("bergson", "bergson-make", options.bergson)
    pythons = {"bergson": options.bergson} | dict.fromkeys(("faiss-flat", "faiss-sq16"), options.faiss)
    for n in options.queries:
        repeats = 5 if n == 1 else 1
        runs: dict[str, list[Figures]] = {}
        batch = {"lancedb-batch": homes["lancedb-flat"]} if n > 1 else {}
        for _ in range(options.rounds):
            for way in ("lark-top", "lark-attribute"):
                runs.setdefault(way, []).append(bench.ours(way, bench.copy("others"), n, repeats=repeats))
            runs.setdefault("gemm", []).append(bench.run("gemm", queries=n, repeats=repeats))
            for way, home in (homes | batch).items():
                spec = {"home": home, "queries": n, "calls": options.calls, "repeats": repeats}
                runs.setdefault(way, []).append(bench.run(way, pythons.get(way), **spec))
        _others_table(bench, n, runs)
    shutil.rmtree(bench.home / "others", ignore_errors=True)


LABELS = {
    "lark-top": "**lark-store, `top`**, one call a query",
    "lark-attribute": "**lark-store, `attribute`**",
    "gemm": "bare products, float32 in memory",
    "lancedb-flat": "LanceDB, flat search, one call a query",
    "lancedb-batch": "LanceDB, flat search, many queries a call",
    "faiss-flat": "FAISS, IndexFlatIP, float32 in memory",
    "faiss-sq16": "FAISS, scalar quantizer float16 in memory",
    "bergson": "bergson 2.5, Attributor.search, float32 in memory",
    "lark-approximate": "**lark-store, `top` approximate**",
    "lancedb-rq": "LanceDB, IVF_RQ, refine_factor 5",
}


def _others_table(bench: Bench, n: int, runs: dict[str, list[Figures]]) -> None:
    true = runs["gemm"][0]["top"]
    first = "lark-top" if n == 1 else "lark-attribute"
    order = [first, *(way for way in runs if way != first)]
    base_time = statistics.median(seconds(figures, n) for figures in runs[first])
    rows = []
    for way in order:
        rounds = runs[way]
        values = [seconds(figures, n) for figures in rounds]
        measured = len(rounds[0]["top"])
        scaled = f"{measured} of {n}, scaled up" if measured < n else "all"
        share = "–" if way == "gemm" else recall(bench.numbers(rounds[0]["top"]), true)
        middle_ = statistics.median(values)
        rows.append([LABELS[way], scaled, middle_, span(values), middle_ / base_time, share, *memory(rounds)])
    header = ["way", "measured", "s, median", "range", "over the first row", "same top 10", *MEMORY]
    table(f"{n} {'query' if n == 1 else 'queries'}, {bench.n:,} rows", header, rows)


def growth(work: Path, options: argparse.Namespace) -> None:
    """Show time and memory by rows and queries."""
    benches = sorted((Bench(path, work, options) for path in options.grow), key=lambda bench: bench.n)
    runs: dict[tuple[int, int, str], list[Figures]] = {}
    for _ in range(options.rounds):
        for number, bench in enumerate(benches):
            for n in (1, 16, 64, 500):
                if n > len(bench.ids) or (n == 500 and bench.n > options.most_rows_at_500):
                    continue
                for way in ("lark-attribute", "lark-top") if n == 1 else ("lark-attribute",):
                    figures = bench.ours(way, bench.copy("growth"), n)
                    runs.setdefault((number, n, way), []).append(figures)
                shutil.rmtree(bench.home / "growth")
    rows = []
    for (number, n, way), rounds in runs.items():
        size = benches[number].n
        values = [seconds(figures, n) for figures in rounds]
        median = statistics.median(values)
        peaks = [gib(rounds, key) for key in ("rss", "anon", "imported")]
        rows.append([f"{size:,}", n, f"`{way}`", median, span(values), median / size / n * 1e6, *peaks])
    header = ["rows", "queries", "way", "s, median", "range", "µs per row and query", *MEMORY[3:]]
    table("Growth", header, rows)


def approximate(bench: Bench) -> None:
    """Compare approximate with exact search: time, recall, and the cost of building."""
    options, n = bench.options, bench.options.recall_queries
    source = {"queries": n, "source": f"queries-{len(bench.ids)}", "ids": bench.ids[:n], "calls": n}
    home = bench.copy("approximate")
    builds = {"lark-store, `index_build`": bench.run("lark-index", home=home)}
    others_here = bench is options.first  # a large store's vectors are not exported for the baselines
    if others_here:
        lance = bench.made("lancedb-rq", "lancedb-make")
        built = lance / "built.json"
        if not built.is_file():
            built.write_text(json.dumps(bench.run("lancedb-rq-build", home=lance)), encoding="utf-8")
        builds["LanceDB, IVF_RQ"] = json.loads(built.read_text(encoding="utf-8"))
    runs: dict[str, list[Figures]] = {}
    for _ in range(options.rounds):
        runs.setdefault("lark-top", []).append(bench.run("lark-top", home=home, **source | {"calls": options.calls}))
        runs.setdefault("lark-approximate", []).append(bench.run("lark-approximate", home=home, **source))
        if others_here:
            flat = bench.made("lancedb", "lancedb-make")
            for way, folder in (("lancedb-rq", lance), ("lancedb-flat", flat)):
                calls = n if way == "lancedb-rq" else options.calls
                runs.setdefault(way, []).append(bench.run(way, home=folder, queries=n, calls=calls))
    _approximate_tables(bench, runs, builds, _truth(bench, n, home))
    shutil.rmtree(home)


def _truth(bench: Bench, n: int, home: Path) -> list[list[Any]]:
    """Return the true top 10: from bare products, or from our exact pass if those take too much memory."""
    if bench is bench.options.first:
        return list(bench.run("gemm", queries=n)["top"])
    return list(bench.ours("lark-attribute", home, n)["top"])


def _approximate_tables(
    bench: Bench, runs: dict[str, list[Figures]], builds: dict[str, Figures], true: list[list[Any]]
) -> None:
    exact = statistics.median(seconds(figures, 1) for figures in runs["lark-top"])
    by_name = bench is not bench.options.first
    rows = []
    for way, rounds in runs.items():
        values = [seconds(figures, 1) for figures in rounds]
        top = rounds[0]["top"] if by_name else bench.numbers(rounds[0]["top"])
        share = recall(top, true)
        median = statistics.median(values)
        rows.append([LABELS[way], len(top), median, span(values), exact / median, share, *memory(rounds)])
    header = ["way", "queries", "s per query, median", "range", "exact over it", "recall@10", *MEMORY]
    table(f"Approximate, {bench.n:,} rows", header, rows)
    rows = []
    for name, figures in builds.items():
        peaks = [gib([figures], key) for key in ("rss", "anon", "imported")]
        spent = figures["seconds"]["build"][0], figures["cpu"]["build"][0]
        rows.append([name, *spent, figures["bytes"] / bench.n / 1024, *peaks])
    table(f"Building, {bench.n:,} rows", ["", "s", "CPU s", "KiB a row", *MEMORY[3:]], rows)


PARTS = ("pass", "others", "growth", "approximate")


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", nargs="?", type=Path, help="a store made by stores.py")
    parser.add_argument("--work", type=Path, help="a folder for arrays and tables, on the store's file system")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["pass", "others"])
    parser.add_argument("--grow", type=Path, nargs="+", default=[], help="stores of other sizes")
    parser.add_argument("--large", type=Path, help="a large store, for approximate search")
    parser.add_argument("--faiss", type=Path, help="the Python of an environment with faiss-cpu")
    parser.add_argument("--bergson", type=Path, help="the Python of an environment with bergson")
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 64, 500])
    parser.add_argument("--calls", type=int, default=16, help="maximum of one-query calls; times are scaled up")
    parser.add_argument("--recall-queries", type=int, default=64)
    parser.add_argument("--most-rows-at-500", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    if options.store is None or options.work is None:
        parser.error("give a store and --work FOLDER")
    names = ("torch", "lancedb", "lark-store")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    print(f"CPU, {options.threads} threads, {versions}, {time.strftime('%Y-%m-%d')}")
    bench = options.first = Bench(options.store, options.work, options)
    if "pass" in options.parts:
        scoring_pass(bench)
    if "others" in options.parts:
        others(bench)
    if "growth" in options.parts:
        growth(options.work, options)
    if "approximate" in options.parts:
        approximate(bench)
        if options.large:
            approximate(Bench(options.large, options.work, options))


if __name__ == "__main__":
    main()
