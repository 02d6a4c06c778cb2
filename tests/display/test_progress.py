"""Progress bars appear in terminals and notebooks, and nowhere else."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
from rich.console import Console

from lark_store.display import progress as shown
from lark_store.results import Progress


@pytest.fixture
def watched(monkeypatch):
    """Make stderr a terminal, in a process that no CI and no launcher started."""
    for name in ("CI", "RANK", "WORLD_SIZE", shown.ENVIRONMENT, "TERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Console, "is_terminal", property(lambda _: True))


@shown.shows_progress
def work(*, on_progress=None):
    if on_progress:
        on_progress(Progress("sketching", 1, 2))
    return on_progress


@pytest.mark.usefixtures("watched")
def test_a_terminal_has_a_bar(capsys):
    assert isinstance(work(), shown.ProgressBar)
    assert "sketching" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "value"), [("CI", "true"), (shown.ENVIRONMENT, "0"), ("RANK", "1")])
@pytest.mark.usefixtures("watched")
def test_ci_other_ranks_and_the_variable_turn_it_off(monkeypatch, capsys, name, value):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(name, value)
    assert work() is None
    assert capsys.readouterr().err == ""


def test_a_pipe_has_none(monkeypatch, capsys):
    monkeypatch.delenv("CI", raising=False)
    assert work() is None
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("watched")
def test_a_given_function_replaces_it(capsys):
    steps = []
    work(on_progress=steps.append)
    assert steps == [Progress("sketching", 1, 2)]
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("watched")
def test_methods_of_the_store_show_it(scored, monkeypatch):
    steps = []
    monkeypatch.setattr(shown.ProgressBar, "__call__", lambda _self, step: steps.append(step.label))
    scored.db_check()
    assert steps[-1] == "checked"


@pytest.mark.usefixtures("watched")
def test_a_notebook_has_one_line_that_changes(monkeypatch):
    updates = []
    handle = SimpleNamespace(update=lambda data, **options: updates.append((data, options)))
    notebook = SimpleNamespace(display=lambda *_, **__: handle)
    monkeypatch.setitem(sys.modules, "IPython.display", notebook)
    monkeypatch.setattr(Console, "is_terminal", property(lambda _: False))
    init = Console.__init__
    monkeypatch.setattr(Console, "__init__", lambda self, **options: init(self, force_jupyter=True, **options))
    monkeypatch.setenv("JUPYTER_COLUMNS", "100")
    work()
    (data, options), *rest = updates
    assert (options, rest) == ({"raw": True}, [])
    assert data["text/plain"] == "sketching: 1/2"
    assert "<progress value='1' max='2'" in data["text/html"]
