"""Progress on stderr: a bar in a terminal or a notebook, lines elsewhere.

Methods of `Store` and evaluations show a bar by themselves in a terminal and in a notebook, and nothing in pipes and
CI. `on_progress=` replaces it; the environment variable `LARK_STORE_PROGRESS=0` turns it off.
"""

from __future__ import annotations

import inspect
import os
import sys
import time
from functools import wraps
from html import escape
from importlib import import_module
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, Self, TypeVar

from rich.console import Console

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.progress import Progress as Bar
    from rich.progress import TaskID

ENVIRONMENT = "LARK_STORE_PROGRESS"
_SECONDS_BETWEEN_LINES = 20.0
P = ParamSpec("P")
R = TypeVar("R")


class Step(Protocol):
    """The progress of a step: `lark_store.results.Progress`."""

    @property
    def label(self) -> str: ...  # noqa: D102
    @property
    def done(self) -> int: ...  # noqa: D102
    @property
    def total(self) -> int: ...  # noqa: D102
    @property
    def failed(self) -> int: ...  # noqa: D102


def is_first_rank() -> bool:
    """Tell whether this is the only process, or the first of those a launcher started."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


def shows_progress(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function with the keyword `on_progress`: without it, show a bar where someone watches."""
    if "on_progress" not in inspect.signature(function).parameters:
        return function

    @wraps(function)
    def shown(*args: P.args, **kwargs: P.kwargs) -> R:
        if kwargs.get("on_progress") is not None or not _is_watched():
            return function(*args, **kwargs)
        with ProgressBar() as bar:
            kwargs["on_progress"] = bar
            return function(*args, **kwargs)

    return shown


def _is_watched() -> bool:
    """Tell whether stderr is a terminal, or this is a notebook."""
    is_wanted = os.environ.get(ENVIRONMENT, "1") != "0" and is_first_rank() and not os.environ.get("CI")
    console = Console(stderr=True)
    return is_wanted and (console.is_terminal or console.is_jupyter)


class ProgressBar:
    """Context manager that shows progress: a bar in a terminal or a notebook, else a line every 20 s."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bar: Bar | None = None
        self._cell: _Cell | None = None
        self._task: TaskID | None = None
        self._label = ""
        self._last_line = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, progress: Step) -> None:
        """Show the progress."""
        if self._console.is_jupyter:
            self._cell = self._cell or _Cell()
            self._cell.show(progress)
        elif self._console.is_terminal:
            self._draw(progress)
        else:
            self._write(progress)

    def _write(self, progress: Step) -> None:
        now = time.monotonic()
        recent = now - self._last_line < _SECONDS_BETWEEN_LINES
        if recent and progress.done < progress.total:
            return
        self._last_line = now
        if is_first_rank():
            print(_line(progress), file=sys.stderr)  # noqa: T201

    def _draw(self, progress: Step) -> None:
        if self._bar is None:
            self._bar = _make_bar(self._console)
            self._bar.start()
        if progress.label != self._label or self._task is None:
            self._label = progress.label
            self._task = self._bar.add_task(progress.label, total=progress.total or None, failed="")
        failed = f"{progress.failed} failed" if progress.failed else ""
        self._bar.update(self._task, completed=progress.done, total=progress.total or None, failed=failed)


def _line(progress: Step) -> str:
    failed = f", {progress.failed} failed" if progress.failed else ""
    count = f": {progress.done}/{progress.total}" if progress.total else ""
    return f"{progress.label}{count}{failed}"


class _Cell:
    """The bar below a cell of a notebook, one line that changes; it needs no widgets."""

    def __init__(self) -> None:
        display = import_module("IPython.display").display
        self._handle = display({"text/plain": ""}, raw=True, display_id=True)

    def show(self, progress: Step) -> None:
        """Replace the bar."""
        line = _line(progress)
        total = f" value='{progress.done}' max='{progress.total}'" if progress.total else ""
        html = f"<progress{total} style='width: 20em'></progress> {escape(line)}"
        self._handle.update({"text/plain": line, "text/html": html}, raw=True)


def _make_bar(console: Console) -> Bar:
    from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress
    from rich.text import Text

    class Speed(ProgressColumn):
        def render(self, task: Any) -> Text:
            speed = task.finished_speed or task.speed
            return Text(f"{speed:.2f}/s" if speed else "")

    return RichProgress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Speed(),
        TimeRemainingColumn(),
        TextColumn("[red]{task.fields[failed]}"),
        console=console,
    )
