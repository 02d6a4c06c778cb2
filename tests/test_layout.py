"""The layout of package and tests: no import cycles, no long files; helpers are shared, test files stand alone."""

from __future__ import annotations

import ast
import tomllib
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import grimp

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "lark_store"


def test_no_module_imports_itself_through_others():
    """Lazy imports count; imports for type checkers do not. An error lists the modules of a cycle."""
    graph = grimp.build_graph("lark_store", exclude_type_checking_imports=True, cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert len(imports) > 200
    TopologicalSorter(imports).prepare()


def test_files_hold_about_400_lines_at_most():
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in PACKAGE.rglob("*.py")}
    assert {path.name: n for path, n in lengths.items() if n > 420} == {}


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_no_test_file_is_imported():
    modules = {"conftest", *(path.stem for path in TESTS.rglob("test_*.py"))}
    imports = [(path.name, name) for path in TESTS.rglob("*.py") for name in imported_modules(path)]
    assert len(imports) > 1000
    assert not [(file, name) for file, name in imports if modules & set(name.split("."))]


def test_names_of_test_files_are_unique():
    names = Counter(path.name for path in TESTS.rglob("test_*.py"))
    assert not [name for name, n in names.items() if n > 1]


# --- the lists of the mutation tests ----------------------------------------------------------------------------------


def mutation_list(name):
    return tomllib.loads((TESTS / "mutation" / f"{name}.toml").read_text(encoding="utf-8"))


def test_modules_of_the_mutation_tests_and_their_test_files_exist():
    listed = mutation_list("modules")
    assert len(listed) > 100
    assert [name for name in listed if not (PACKAGE / f"{name}.py").is_file()] == []
    files = {path.stem.removeprefix("test_") for path in TESTS.rglob("test_*.py")}
    assert {(name, file) for name, tests in listed.items() for file in tests if file not in files} == set()
    assert [name for name, tests in listed.items() if not tests or len(set(tests)) < len(tests)] == []


def test_excluded_mutants_are_of_lines_that_exist():
    for mutant in mutation_list("equivalent")["mutant"]:
        lines = (TESTS.parent / mutant["module"]).read_text(encoding="utf-8").splitlines()
        assert mutant["before"] in [line.strip() for line in lines], mutant
