"""Tables for people, as text of a given width.

A table has three parts: lines above it with the values that every row shares, the rows, and lines below it that explain
scores and name everything that was left out. Text columns take the remaining width. If it is too small, the columns
with the least information are hidden; a single row is printed as a list of its values instead.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rich.cells import cell_len

from lark_store.display.draw import draw
from lark_store.display.texts import lines, shortened, starts
from lark_store.display.values import Column, exact, rounded

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    import polars as pl

SEPARATOR = " · "
GAP = 2  # between two columns
_WIDTH = 100  # where the terminal's is not known
_LABEL = 24  # a longer cell makes its column a text
_NARROWEST = 16  # a narrower text column says nothing
_READABLE = 40  # a text gets this width before names of columns stay on one line
_LINES = 2  # of a shortened text
_LINES_OF_RECORD = 8
_SHORTENED = "… shortened"
# Hidden first, in this order; then from the right.
_LEAST = (
    "scored_by",
    "score_run",
    "ingest_runs",
    "stage",
    "sketch_error",
    "noise",
    "cosine_rank",
    "bm25_rank",
    "n_cut",
)
_MEANINGS = {
    "noise": "noise: the score's standard deviation from sketching",
    "sketch_error": "sketch_error: bound of the value's change under another seed of the sketcher",
    "r_median": "r_median, r_q1, r_q3: median and quartiles of single queries' ratios (n_ratio queries have one)",
}
_RATIOS = ("ft_pt_ratio", "format_effect")
_RATIO_TEST = "p_value: a test of the difference, not of the ratio"


@dataclass(frozen=True)
class About:
    """What to say about a table besides its rows.

    `facts` are further values that every row shares, `legend` explains the values, `whole` names the columns whose
    texts are never shortened, `complete` tells where to find everything that a table leaves out.
    """

    facts: Mapping[str, str] = field(default_factory=dict)
    legend: Sequence[str] = ()
    whole: Collection[str] = ()
    complete: str = "`--wide` prints everything"


NOTHING = About()


def terminal_width() -> int:
    """Return the width of the terminal, or `COLUMNS`, or 100."""
    return shutil.get_terminal_size((_WIDTH, 24)).columns


def full_table(frame: pl.DataFrame, *, markdown: bool = False) -> str:
    """Return a table with all columns, all digits and complete texts, of any width."""
    columns = [exact(series) for series in frame]
    return draw(columns, [column.name for column in columns], markdown=markdown)


def table(frame: pl.DataFrame, width: int, about: About = NOTHING, *, n_more: int = 0) -> str:
    """Return a frame as a table of at most `width` characters, if its words allow it.

    `n_more` rows of the result are not in the frame.
    """
    columns = [rounded(series) for series in frame]
    shared = take_shared(columns, about) if len(frame) > 1 and not n_more else {}
    above = _joined(shared_facts(shared, about.facts), width)
    below = _joined([*legend(frame, about), *more_rows(n_more)], width)
    if len(frame) == 1 and _total([_natural(column) for column in columns]) > width:
        return "\n".join([*above, *_record(columns, width, about), *below])
    layout = _Layout(columns, width, about.whole)
    rows = draw(layout.cells(), layout.headers())
    return "\n".join([*above, rows, *below, *_joined(_left_out(layout, frame.columns, about), width)])


# --- above and below -----------------------------------------------------------------------------------------------


def take_shared(columns: list[Column], about: About) -> dict[str, str]:
    """Take the columns with one short value out of the table, but not all of them."""
    taken = [
        column
        for column in columns
        if column.is_constant and cell_len(column.cells[0]) <= _READABLE and column.name not in about.whole
    ]
    if len(taken) == len(columns):
        return {}
    for column in taken:
        columns.remove(column)
    return {column.name: column.cells[0] for column in sorted(taken, key=lambda column: column.is_number)}


def shared_facts(shared: dict[str, str], facts: Mapping[str, str]) -> list[str]:
    """Return facts as `name value`; the names of empty columns come last."""
    named: dict[str, str] = {}
    for name, value in [*facts.items(), *shared.items()]:
        if name == "scored_by" and SEPARATOR in value:  # two facts
            named["sketcher"], named["method"] = value.split(SEPARATOR, 1)
        elif value:
            named[name] = value
    empty = [name for name, value in shared.items() if not value]
    return [f"{name} {value}" for name, value in named.items()] + ([f"empty: {', '.join(empty)}"] if empty else [])


def _joined(facts: Sequence[str], width: int) -> list[str]:
    """Join facts to lines, broken between facts, or between words of a long one."""
    done: list[str] = []
    for fact in facts:
        if done and cell_len(done[-1] + SEPARATOR + fact) <= width:
            done[-1] += SEPARATOR + fact
        else:
            done.append(fact)
    return [line for text in done for line in lines(text, width)]


def legend(frame: pl.DataFrame, about: About) -> list[str]:
    """Return the explanations of a table's scores."""
    names = frame.columns
    texts = [*about.legend, *(text for name, text in _MEANINGS.items() if name in names and frame[name].count())]
    is_ratio = "ratio" in names or ("metric" in names and frame["metric"].is_in(_RATIOS).any())
    if is_ratio and "p_value" in names:
        texts.append(_RATIO_TEST)
    return texts if len(frame) else []


def more_rows(n: int) -> list[str]:
    """Return what to say about rows that are not shown."""
    return [f"{n:,} more rows"] if n else []


def _left_out(layout: _Layout, order: Sequence[str], about: About) -> list[str]:
    """Name the hidden columns and, if texts were shortened too, where everything is."""
    hidden = [name for name in order if name in {column.name for column in layout.hidden}]
    if not hidden and not layout.is_shortened:
        return []
    return [f"hidden: {', '.join(hidden)}" if hidden else _SHORTENED, about.complete]


def _record(columns: Sequence[Column], width: int, about: About) -> list[str]:
    """Return one row as a list of its values; only long texts are shortened."""
    names = max(cell_len(column.name) for column in columns)
    room = max(_NARROWEST, width - names - GAP)
    done = []
    is_shortened = False
    for column in columns:
        whole = lines(column.cells[0], room)
        is_long = len(whole) > _LINES_OF_RECORD and column.name not in about.whole
        first, *rest = shortened(column.cells[0], room, _LINES_OF_RECORD) if is_long else whole
        done.append(f"{column.name}{' ' * (names - cell_len(column.name) + GAP)}{first}".rstrip())
        done += [f"{' ' * (names + GAP)}{line}" for line in rest]
        is_shortened |= is_long
    return done + (_joined([_SHORTENED, about.complete], width) if is_shortened else [])


# --- widths --------------------------------------------------------------------------------------------------------


def _natural(column: Column) -> int:
    return max(map(cell_len, [column.name, *column.cells]))


def _total(widths: Collection[int]) -> int:
    return sum(widths) + GAP * max(0, len(widths) - 1)


def _header(name: str, width: int) -> str:
    """Break a column's name after underscores."""
    parts = name.replace("_", "_\0").split("\0")
    done = [parts[0]]
    for part in parts[1:]:
        if len(done[-1] + part) <= width:
            done[-1] += part
        else:
            done.append(part)
    return "\n".join(done)


def _differ(fitted: Sequence[str], cell: str) -> bool:
    return "".join(fitted).replace(" ", "") != cell.replace(" ", "")


class _Layout:
    """The columns that fit into a width, and the width of each."""

    def __init__(self, columns: Sequence[Column], width: int, whole: Collection[str]) -> None:
        self.columns = list(columns)
        self.hidden: list[Column] = []
        self.is_shortened = False
        self._whole = whole
        self._natural = {column.name: _natural(column) for column in columns}
        self._texts = {column.name for column in columns if self._is_text(column)}
        self._narrowest = {column.name: self._least_width(column) for column in columns}
        while _total([self._narrowest[column.name] for column in self.columns]) > width and self._hide():
            pass
        self.widths = self._divide(width)

    def cells(self) -> list[Column]:
        """Return the columns with texts that fit into their widths."""
        return [self._fitted(column) if column.name in self._texts else column for column in self.columns]

    def headers(self) -> list[str]:
        """Return the names of the columns, on several lines where needed."""
        return [_header(column.name, self.widths[column.name]) for column in self.columns]

    def _is_text(self, column: Column) -> bool:
        return not column.is_number and max(map(cell_len, column.cells), default=0) > _LABEL

    def _least_width(self, column: Column) -> int:
        header = max(map(len, _header(column.name, 1).split("\n")))
        if column.name not in self._texts:
            return max(header, *map(cell_len, column.cells), 0)
        if column.name not in self._whole:
            return max(header, _NARROWEST)
        return max(header, *(cell_len(word) for cell in column.cells for word in lines(cell, _NARROWEST)))

    def _hide(self) -> bool:
        """Hide the column that tells least; the first one and the last text stay."""
        texts = [column.name for column in self.columns if column.name in self._texts]
        candidates = {column.name: column for column in self.columns[1:] if column.name not in texts[-1:]}
        if not candidates:
            return False
        name = next((name for name in _LEAST if name in candidates), [*candidates][-1])
        self.hidden.append(candidates[name])
        self.columns = [column for column in self.columns if column.name != name]
        return True

    def _divide(self, width: int) -> dict[str, int]:
        """Divide the width: texts to a readable width first, then the names of columns, then the rest to texts."""
        names = [column.name for column in self.columns]
        widths = {name: self._narrowest[name] for name in names}
        texts = [name for name in names if name in self._texts]
        goals = [
            {name: min(_READABLE, self._natural[name]) for name in texts},
            {name: self._natural[name] for name in names if name not in texts},
            {name: self._natural[name] for name in texts},
        ]
        spare = width - _total(widths.values())
        for goal in goals:
            while spare > 0 and (growing := [name for name in goal if widths[name] < goal[name]]):
                widths[min(growing, key=widths.__getitem__)] += 1
                spare -= 1
        return widths

    def _fitted(self, column: Column) -> Column:
        width = self.widths[column.name]
        if column.name in self._whole:
            return Column(column.name, ["\n".join(lines(cell, width)) for cell in column.cells], is_number=False)
        pairs = zip(column.cells, starts(column.cells), strict=True)
        fitted = [shortened(cell, width, _LINES, start) for cell, start in pairs]
        self.is_shortened |= any(_differ(new, old) for new, old in zip(fitted, column.cells, strict=True))
        return Column(column.name, ["\n".join(cell) for cell in fitted], is_number=False)
