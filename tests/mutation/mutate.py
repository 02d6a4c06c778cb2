"""Mutation tests of the core modules: change one token of a module, expect its tests to fail.

    make mutate SEED=7 N=40

cosmic-ray finds and applies the mutations. This script draws them by a seed, runs the test files that `modules.toml`
names for the module, up to the first failure, and adds up. A mutant counts as killed only if the test that failed
passes without the mutation. Those in `equivalent.toml`, each with its reason, are not run and do not count.

All work is done in a copy of the checkout. Tests run in forks of this process, which has loaded torch already.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import traceback
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from cosmic_ray import plugins
from cosmic_ray.ast import ast_nodes, get_ast_from_path
from cosmic_ray.mutating import mutate_code, use_mutation
from cosmic_ray.work_item import MutationSpec

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
TARGET = 0.95
# `==` and `is` agree wherever Python shares a value: such mutants say nothing about the tests.
LEFT_OUT = ("Eq_Is", "Eq_IsNot", "NotEq_Is", "NotEq_IsNot")
# `zip(…, strict=True)` and `dataclass(frozen=True)` guard against mistakes in the module itself.
GUARDS = ("strict=", "frozen=")
# Loaded once. Not the package itself, nor libraries that start threads when loaded: a fork would lack them.
PRELOADED = (
    "torch",
    "transformers",
    "polars",
    "duckdb",
    "numba",
    "scipy.stats",
    "hypothesis",
    "sqlalchemy.orm",
    "pytest",
)
IMPORTED = "pytest.PytestAssertRewriteWarning"  # pytest's plugins are loaded before it is
OUTCOMES = ("killed", "timeout", "survived", "equivalent")


@dataclass
class Result:
    """A mutant: where it is, the changed lines, and how its tests ended."""

    module: str
    line: int
    operator: str
    before: str
    after: str
    outcome: str = "survived"
    by: str = ""


def unevaluated(tree: ast.AST) -> Iterator[ast.AST | None]:
    """Yield annotations, and blocks and protocols for the type checker: Python never evaluates them here."""
    for node in ast.walk(tree):
        if isinstance(node, ast.arg | ast.AnnAssign):
            yield node.annotation
        elif isinstance(node, ast.FunctionDef):
            yield node.returns
        elif (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING") or (
            isinstance(node, ast.ClassDef) and "Protocol" in map(ast.unparse, node.bases)
        ):
            yield node


def positions(module: str) -> dict[tuple[int, int], list[MutationSpec]]:
    """Return the mutations of a module by the position that they change."""
    path = Path(module)
    spans = [
        ((node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset))
        for node in unevaluated(ast.parse(path.read_text(encoding="utf-8")))
        if node is not None
    ]
    nodes = list(ast_nodes(get_ast_from_path(path)))
    mutations = defaultdict(list)
    for name in plugins.operator_names():
        kind = plugins.get_operator(name)
        if kind.arguments() or name.endswith(LEFT_OUT):
            continue
        places = (place for node in nodes for place in kind().mutation_positions(node))
        for occurrence, (start, end) in enumerate(places):
            if not any(first <= start < last for first, last in spans):
                mutations[start].append(MutationSpec(path, name, occurrence, start, end))
    return mutations


def draw(modules: Sequence[str], seed: int, n: int) -> list[MutationSpec]:
    """Draw positions among all modules, each as likely as another, and one mutation at each that is valid Python."""
    every = {(module, place): specs for module in modules for place, specs in positions(module).items()}
    chance = random.Random(seed)
    places = sorted(every)
    chance.shuffle(places)
    drawn = (chance.choice(every[place]) for place in places)
    return list(islice(filter(counts, drawn), n))


def counts(spec: MutationSpec) -> bool:
    """Tell whether a mutant is valid Python, and not only without a guard against the module's own mistakes.

    The `*` before keyword-only parameters is such a guard.
    """
    source = spec.module_path.read_text(encoding="utf-8")
    line = source.splitlines()[spec.start_pos[0] - 1]
    before, after = line[: spec.start_pos[1]], line[spec.start_pos[1] :]
    try:
        ast.parse(mutate_code(source, plugins.get_operator(spec.operator_name)(), spec.occurrence))
    except (SyntaxError, AttributeError):  # cosmic-ray can't replace an exception of a module, such as `json.Error`
        return False
    return not before.endswith(GUARDS) and not after.startswith("*,")


def run_tests(targets: Sequence[str], limit: float) -> str:
    """Run tests in a fork up to the first failure; returns `passed`, `timeout` or pytest's output."""
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if child == 0:
            os.setsid()
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            import pytest

            code = 1
            try:
                code = pytest.main(
                    ["-x", "-q", "-p", "no:cacheprovider", "--tb=line", "-W", f"ignore::{IMPORTED}", *targets]
                )
            except BaseException:  # noqa: BLE001 - nothing of the parent may run on here
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        ends = time.monotonic() + limit
        while not (ended := os.waitpid(child, os.WNOHANG))[0]:
            if time.monotonic() > ends:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return "timeout"
            time.sleep(0.05)
        output.seek(0)
        return "passed" if ended[1] == 0 else output.read().decode(errors="replace")


def failing(output: str) -> str:
    """Return the test, or the file, that pytest says failed."""
    match = re.search(r"^(?:FAILED|ERROR) (tests/.+?)(?: - .*)?$", output, re.MULTILINE)
    return match[1] if match else ""


class Clean:
    """Results of tests without any mutation, each run once."""

    def __init__(self, limit: float) -> None:
        self.limit, self._known = limit, {}
        self.left_out: list[str] = []  # options of pytest

    def passes(self, *targets: str) -> bool:
        """Tell whether tests pass well within the time limit."""
        if targets not in self._known:
            self._known[targets] = run_tests(targets, self.limit / 2) == "passed"
        return self._known[targets]


def mutant_of(spec: MutationSpec) -> Result:
    """Return the change which a mutation makes."""
    before = spec.module_path.read_text(encoding="utf-8")
    after = mutate_code(before, plugins.get_operator(spec.operator_name)(), spec.occurrence)
    changed = list(difflib.ndiff(before.splitlines(), after.splitlines()))
    lines = [" ".join(line[2:].strip() for line in changed if line.startswith(s)).strip() for s in ("- ", "+ ")]
    return Result(str(spec.module_path), spec.start_pos[0], spec.operator_name.removeprefix("core/"), *lines)


def attempt(spec: MutationSpec, result: Result, files: list[str], clean: Clean) -> None:
    """Apply one mutation and run the tests of its module; a test that fails without it too is left out."""
    operator = plugins.get_operator(spec.operator_name)()
    with use_mutation(spec.module_path, operator, spec.occurrence):
        outcome = run_tests([*files, *clean.left_out], clean.limit)
    if outcome == "timeout":
        result.outcome = "timeout" if clean.passes(*files) else "survived"
    elif outcome != "passed":
        result.by = failing(outcome)
        if result.by and not clean.passes(result.by):
            clean.left_out.append(f"--deselect={result.by}")
            attempt(spec, result, files, clean)
            return
        result.outcome = "killed"
        result.by = result.by or outcome.strip()[-200:]


def copy_checkout(folder: str) -> None:
    """Copy tracked and new files to a folder."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True, text=True).stdout.split("\0")
    for source, target in ((ROOT / name, Path(folder) / name) for name in names):
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)


def report(results: list[Result]) -> bool:
    """Print the counts by module and the survivors; returns whether enough were killed."""
    table = defaultdict(Counter)
    for result in results:
        table[result.module][result.outcome] += 1
    total = sum(table.values(), Counter())
    print(f"\n{'module':36}" + "".join(f"{item:>12}" for item in OUTCOMES))
    for module, counts in [*sorted(table.items()), ("all", total)]:
        print(f"{module:36}" + "".join(f"{counts[item]:12}" for item in OUTCOMES))
    for result in results:
        if result.outcome == "survived":
            print(f"\nsurvived: {described(result)}")
    killed = total["killed"] + total["timeout"]
    counted = killed + total["survived"]
    print(f"\n{killed} of {counted} killed ({killed / max(counted, 1):.1%}), {total['equivalent']} equivalent")
    return killed >= TARGET * counted


def described(result: Result) -> str:
    """Return a mutant's place and change as text."""
    return f"{result.module}:{result.line} {result.operator} {result.by}\n  - {result.before}\n  + {result.after}"


def is_excluded(result: Result, equivalent: dict[str, list[dict[str, str]]]) -> bool:
    """Tell whether a mutant is listed as one that does not count."""
    of_module = {(item["module"], item["before"], item.get("after", "")) for item in equivalent["mutant"]}
    everywhere = any(item["after"] in result.after for item in equivalent["everywhere"])
    return everywhere or bool(of_module & {(result.module, result.before, after) for after in (result.after, "")})


def main() -> int:
    """Draw, run, report."""
    parser = argparse.ArgumentParser(description="Mutation tests of the core modules.")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6), help="of the draw")
    parser.add_argument("-n", type=int, default=40, help="how many mutants")
    parser.add_argument("--pick", type=int, nargs="*", help="numbers of the draw to run, instead of all")
    parser.add_argument("--only", default="", help="regular expression that the module's path must hold")
    parser.add_argument("--limit", type=float, default=600, help="seconds for the tests of a mutant")
    arguments = parser.parse_args()
    tests = tomllib.loads((HERE / "modules.toml").read_text(encoding="utf-8"))
    paths = {path.stem: str(path.relative_to(ROOT)) for path in HERE.parent.rglob("test_*.py")}
    files = {f"lark_store/{name}.py": [paths[f"test_{t}"] for t in names] for name, names in tests.items()}
    equivalent = tomllib.loads((HERE / "equivalent.toml").read_text(encoding="utf-8"))
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    for name in PRELOADED:
        __import__(name)
    results, clean = [], Clean(arguments.limit)
    with tempfile.TemporaryDirectory() as folder:
        copy_checkout(folder)
        os.chdir(folder)
        os.environ["PYTHONPATH"] = folder
        sys.path[:0] = [folder]
        drawn = draw([name for name in files if re.search(arguments.only, name)], arguments.seed, arguments.n)
        print(f"seed {arguments.seed}: {len(drawn)} mutants", flush=True)
        for i, spec in enumerate(drawn, 1):
            if arguments.pick and i not in arguments.pick:
                continue
            start = time.monotonic()
            result = mutant_of(spec)
            if is_excluded(result, equivalent):
                result.outcome = "equivalent"
            else:
                attempt(spec, result, files[result.module], clean)
            results.append(result)
            print(f"{i:3} {result.outcome} ({time.monotonic() - start:.0f} s) {described(result)}", flush=True)
    return 0 if report(results) else 1


if __name__ == "__main__":
    sys.exit(main())
