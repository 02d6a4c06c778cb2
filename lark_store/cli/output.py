"""Rows to stdout, in the format asked for; messages and progress to stderr."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console

if TYPE_CHECKING:
    import polars as pl
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

    from lark_store.schema.records import Progress

_LONGEST_CELL = 60
_END_OF_CELL = 12  # a response stands at the end of its text
_SECONDS_BETWEEN_LINES = 20.0


def is_first_rank() -> bool:
    """Tell whether this process speaks: of several that a launcher started, the first does."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


def say(message: str, *, everywhere: bool = False) -> None:
    """Print a message on stderr; of several processes the first does, or each of them, `everywhere`, with its rank."""
    if is_first_rank():
        print(message, file=sys.stderr)  # noqa: T201
    elif everywhere:
        print(f"rank {os.environ['RANK']}: {message}", file=sys.stderr)  # noqa: T201


def say_coverage(coverage: pl.DataFrame, shown: pl.DataFrame) -> None:
    """Say which of the groups shown were searched in part, and whether others beside them were searched whole."""
    keys = ["checkpoint", "source", "variant"]
    groups = shown.select(keys)
    if "against_source" in shown.columns:
        others = shown.select("checkpoint", source="against_source", variant="against_variant")
        groups = groups.vstack(others.select(keys))
    of = coverage.join(groups, on=keys, how="semi", maintain_order="left")
    for note in of["note"].drop_nulls():
        say(f"note: {note}")
    part = of["chosen"].is_not_null()
    if part.any() and not part.all():
        whole = ", ".join(f"`{name}`" for name in of.filter(~part)["source"].unique(maintain_order=True))
        say(f"note: of {whole} all was searched: comparisons favour it over the sources that were searched in part")


def _number(value: float, *, integral: bool) -> str:
    if isinstance(value, int) or (integral and abs(value) < 1e15):
        return f"{int(value):,}"
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.3g}"


def _cell(value: object, *, integral: bool, whole: bool) -> str:
    if value is None:
        return ""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return _number(value, integral=integral)
    text = " ".join(str(value).split())
    if whole or len(text) <= _LONGEST_CELL:
        return text
    return f"{text[: _LONGEST_CELL - _END_OF_CELL - 3]} … {text[-_END_OF_CELL:]}"


def print_table(frame: pl.DataFrame, title: str | None = None, *, markdown: bool = False) -> None:
    """Print a frame as a table for people; numbers are rounded, long texts cut in the middle (not in Markdown)."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        box=box.MARKDOWN if markdown else box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold"
    )
    for name, kind in frame.schema.items():
        header = Text(name.replace("|", "\\|") if markdown else name)
        table.add_column(
            header, justify="right" if kind.is_numeric() else "left", no_wrap=kind.is_numeric() or markdown
        )
    integral = [c.dtype.is_numeric() and all(v is None or float(v).is_integer() for v in c) for c in frame]
    for row in frame.iter_rows():
        cells = [_cell(value, integral=i, whole=markdown) for value, i in zip(row, integral, strict=True)]
        table.add_row(*[Text(cell.replace("|", "\\|") if markdown else cell) for cell in cells])
    console = Console(width=100_000)  # a narrow terminal wraps lines; no column is ever squeezed away
    with console.capture() as captured:
        console.print(table)
    print("\n".join(line.rstrip() for line in captured.get().splitlines() if line.strip()))  # noqa: T201
    if not markdown:
        print()  # noqa: T201


def emit(frame: pl.DataFrame, form: str) -> None:
    """Print a frame on stdout as `table`, `json`, `jsonl`, `csv` or `md`; all but `table` and `md` unrounded."""
    from lark_store.schema.frames import writable

    if form in {"table", "md"}:
        print_table(frame, markdown=form == "md")
    elif form == "json":
        print(writable(frame, nested=True).write_json())  # noqa: T201
    elif form == "jsonl":
        print(writable(frame, nested=True).write_ndjson(), end="")  # noqa: T201
    else:
        print(writable(frame, nested=False).write_csv(), end="")  # noqa: T201


def emit_frames(frames: dict[str, pl.DataFrame], form: str) -> None:
    """Print several named frames: titled tables, or one JSON object with a list of rows for each."""
    import json

    if form in {"json", "jsonl"}:
        rows = {name: json.loads(frame.write_json()) for name, frame in frames.items()}
        print(json.dumps(rows, indent=2 if form == "json" else None, ensure_ascii=False))  # noqa: T201
        return
    for name, frame in frames.items():
        if form == "table":
            print_table(frame, title=f"{name} ({len(frame)})")
        else:
            print(f"## {name}\n" if form == "md" else f"# {name}")  # noqa: T201
            emit(frame, form)
            print()  # noqa: T201


class ProgressBar:
    """Shows `Progress` on stderr: a bar on a terminal, else a line now and then. A context manager."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self._label = ""
        self._last_line = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, progress: Progress) -> None:
        """Show where the work is."""
        if self._console.is_terminal:
            self._draw(progress)
        else:
            self._write(progress)

    def _write(self, progress: Progress) -> None:
        now = time.monotonic()
        recent = now - self._last_line < _SECONDS_BETWEEN_LINES
        if recent and progress.done < progress.total:
            return
        self._last_line = now
        failed = f", {progress.failed} failed" if progress.failed else ""
        count = f": {progress.done}/{progress.total}" if progress.total else ""
        say(f"{progress.label}{count}{failed}")

    def _draw(self, progress: Progress) -> None:
        if self._bar is None:
            self._bar = _make_bar(self._console)
            self._bar.start()
        if progress.label != self._label or self._task is None:
            self._label = progress.label
            self._task = self._bar.add_task(progress.label, total=progress.total or None, failed="")
        failed = f"{progress.failed} failed" if progress.failed else ""
        self._bar.update(self._task, completed=progress.done, total=progress.total or None, failed=failed)


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
