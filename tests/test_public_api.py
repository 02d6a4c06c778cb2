"""The public API: exports, errors, and the examples in its documentation."""

from __future__ import annotations

import ast
import doctest
import inspect
import pkgutil
import re
from importlib import import_module
from pathlib import Path

import pytest

import lark_store
from lark_store import errors

ROOT = Path(lark_store.__file__).parent
# Alembic runs these files itself: they can't be imported.
SCRIPTS = sorted([ROOT / "migrations" / "env.py", *(ROOT / "migrations" / "versions").glob("*.py")])
MODULES = sorted(
    {"lark_store"}
    | {module.name for module in pkgutil.walk_packages(lark_store.__path__, "lark_store.")}
    - {"lark_store.migrations.env"}
)


@pytest.mark.parametrize("module", [lark_store, errors], ids=["lark_store", "errors"])
def test_all_is_sorted_unique_and_importable(module):
    assert module.__all__ == sorted(set(module.__all__))
    assert [name for name in module.__all__ if getattr(module, name, None) is None] == []


def test_a_star_import_gives_exactly_the_public_names():
    namespace = {}
    exec("from lark_store import *", namespace)  # noqa: S102
    assert set(namespace) - {"__builtins__"} == set(lark_store.__all__)


def test_type_checkers_see_lazily_imported_names():
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    declared = {alias.name for node in block.body for alias in node.names}
    assert declared == set(lark_store.__all__) - {"__version__"}


def test_unknown_name_is_an_attribute_error_naming_it():
    with pytest.raises(AttributeError, match="`lark_store` has no attribute `Stores`"):
        _ = lark_store.Stores


def test_dir_lists_the_public_names():
    assert set(lark_store.__all__) <= set(dir(lark_store))


def test_package_is_marked_as_typed():
    assert (ROOT / "py.typed").is_file()


def tree_of_the_docstring():
    """Return name → (parent, built-in base) as the module's docstring draws them."""
    lines = re.findall(r"^ {4}([│├└─ ]*)([A-Z]\w+Error)(?: +\((\w+)\))?", errors.__doc__, re.MULTILINE)
    results, path = {}, []
    for drawn, name, builtin in lines:
        del path[len(drawn) // 4 :]
        results[name] = (path[-1] if path else "Exception", builtin or None)
        path.append(name)
    return results


def tree_of_the_classes():
    results = {}
    for name, kind in inspect.getmembers(errors, inspect.isclass):
        parent, *builtin = [base.__name__ for base in kind.__bases__]
        results[name] = (parent, *(builtin or [None]))
    return results


def test_errors_match_the_docstring():
    assert tree_of_the_docstring() == tree_of_the_classes()


def test_every_error_class_is_exported():
    assert sorted(tree_of_the_classes()) == errors.__all__


@pytest.mark.parametrize("name", errors.__all__)
def test_an_error_is_a_fact_a_blank_line_and_a_hint(name):
    error = getattr(errors, name)("it is wrong", "do this")
    assert isinstance(error, lark_store.LarkStoreError)
    assert (str(error), error.fact, error.hint) == ("it is wrong\n\nhint: do this", "it is wrong", "do this")
    assert str(getattr(errors, name)("it is wrong")) == "it is wrong"


@pytest.mark.parametrize(
    ("known", "hint"),
    [
        (["base", "epoch-2"], "did you mean `epoch-2`?"),
        (["base", "last"], "the store has `base`, `last`"),
        ([f"b{i}" for i in range(9)], "the store has `b0`, `b1`, `b2`, `b3`, `b4`, `b5`, `b6`, `b7`, …"),
        ([], "there is none yet; add it"),
    ],
)
def test_unknown_name_hints_the_nearest_or_lists_all(known, hint):
    error = errors.NameUnknownError.of("checkpoint", "epoch2", known, "add it")
    assert (error.fact, error.hint) == ("no checkpoint `epoch2`", hint)


def test_every_file_of_the_package_is_a_module_or_a_script_of_alembic():
    files = {Path(import_module(name).__file__) for name in MODULES}
    assert files | set(SCRIPTS) == set(ROOT.rglob("*.py"))


@pytest.mark.parametrize("name", MODULES)
def test_documentation_examples_are_correct(name):
    assert doctest.testmod(import_module(name), optionflags=doctest.FAIL_FAST).failed == 0


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_of_alembic_hold_no_examples(script):
    assert doctest.DocTestParser().get_examples(script.read_text(encoding="utf-8")) == []
