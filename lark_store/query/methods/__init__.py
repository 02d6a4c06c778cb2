"""Methods: the score at one checkpoint, and how scores of several checkpoints are combined.

To add a score, write a subclass of `ScoringMethod` in a module of its own and list it in `METHODS`. Options, help,
messages and the reference of SQL views are generated from the registry.

A method's name has both: `cosine` scores at one checkpoint, `cosine-sum` and `cosine-lr-weighted` at several. `tracin`
is the name of `dot-lr-weighted` (Pruthi et al. 2020, TracInCP).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lark_store.core.names import SUM_SEPARATOR
from lark_store.core.text import coded, joined
from lark_store.errors import InputError
from lark_store.query.methods.base import ScoringMethod
from lark_store.query.methods.bm25 import Bm25, Bm25Okapi, Bm25Plus
from lark_store.query.methods.cosine import UNIT_SCALE, Cosine, Dot
from lark_store.query.methods.geometric import Centred, Whitened
from lark_store.query.methods.hybrid import Hybrid

if TYPE_CHECKING:
    from collections.abc import Iterable

METHODS: dict[str, ScoringMethod] = {
    method.name: method
    for method in (Cosine(), Dot(), Whitened(), Centred(), Bm25(), Bm25Okapi(), Bm25Plus(), Hybrid())
}
OVER = ("sum", "lr-weighted")  # combine checkpoints: Σ score, Σ learning rate × score
_TRACIN = "tracin"


@dataclass(frozen=True)
class Method:
    """A score at one checkpoint (`base`, one of `METHODS`) and how checkpoints are combined (`over`; None for one).

    >>> Method.of("cosine", "sum").name
    'cosine-sum'
    >>> Method.of("tracin")
    Method(base='dot', over='lr-weighted')
    """

    base: str = "cosine"
    over: str | None = None

    @classmethod
    def of(cls, name: str | None, over: str | None = None, *, default: str = "cosine") -> Method:
        """Return the method of this name, with checkpoints combined by `over`.

        Raises
        ------
        InputError
            There is no such method, it can't be summed, or its name contradicts `over`.
        """
        if over is not None and over not in OVER:
            options = " or ".join(f"`{option}`" for option in OVER)
            raise InputError(f"checkpoints can't be combined by `{over}`", f"use {options}")
        base, combined = _parsed(default if name is None else name)
        if combined and over and combined != over:
            raise InputError(f"`{name}` combines checkpoints by `{combined}`, not by `{over}`", "leave one of them out")
        method = cls(base, combined or over)
        if method.over and not method.reads_sketches:
            raise InputError(f"`{base}` uses no checkpoint", f"use `{base}` alone")
        return method

    @property
    def name(self) -> str:
        """The method's name, as stored."""
        if (self.base, self.over) == ("dot", "lr-weighted"):
            return _TRACIN
        return f"{self.base}-{self.over}" if self.over else self.base

    @property
    def scoring(self) -> ScoringMethod:
        """The score at one checkpoint."""
        return METHODS[self.base]

    @property
    def is_adding(self) -> bool:
        """Whether a row's score depends only on the row and the query, at one checkpoint."""
        return self.over is None and self.scoring.is_adding

    @property
    def reads_sketches(self) -> bool:
        """Whether the score uses gradients."""
        return self.scoring.reads_sketches

    @property
    def engine(self) -> str | None:
        """The lexical method whose index the score reads, if any."""
        return self.scoring.engine

    @property
    def scale(self) -> str:
        """How to read the score: its sign and unit."""
        is_unit = self.over is not None and self.scoring.scale == UNIT_SCALE
        return f"{ScoringMethod.scale}; summed over the checkpoints" if is_unit else self.scoring.scale

    def label(self, sketcher: str, checkpoints: Iterable[str]) -> str:
        """Return the score's label in outputs.

        >>> Method.of("cosine", "sum").label("adam", ["base", "epoch-1"])
        'adam · cosine, sum over base + epoch-1'
        """
        if not self.reads_sketches:
            return self.name
        summed = SUM_SEPARATOR.join(checkpoints)
        if self.name == _TRACIN:
            return f"{sketcher} · {_TRACIN} over {summed}"
        suffix = {None: "", "sum": f", sum over {summed}", "lr-weighted": f", lr-weighted sum over {summed}"}[self.over]
        return f"{sketcher} · {self.base}{suffix}"


def of_label(label: str) -> Method:
    """Return the method of a score's label.

    >>> [of_label(Method.of(name).label("lark", ["a"])).name for name in ("dot", "tracin", "cosine-sum", "bm25")]
    ['dot', 'tracin', 'cosine-sum', 'bm25']
    """
    name, _, combined = label.rpartition(" · ")[2].partition(", ")
    over = next((over for over in OVER if combined.startswith(over)), None)
    return Method.of(name.partition(" over ")[0], over)


def _parsed(name: str) -> tuple[str, str | None]:
    """Split a method's name into base and combination."""
    if name == _TRACIN:
        return "dot", "lr-weighted"
    for over in OVER:
        base = name.removesuffix(f"-{over}")
        if base != name and base in METHODS:
            return base, over
    if name in METHODS:
        return name, None
    methods = ", ".join(coded(_meanings()))
    raise InputError(
        f"there is no method `{name}`", f"the methods are {methods}; for several checkpoints `cosine-sum` and so on"
    )


def _meanings() -> dict[str, str]:
    """Return all methods with their meanings, `tracin` after those without a lexical part."""
    gradient = {m.name: m.meaning for m in METHODS.values() if m.engine is None}
    return gradient | {_TRACIN: "`dot`, summed by learning rate"} | {m.name: m.meaning for m in METHODS.values()}


def method_help() -> str:
    """Return the help of `--method`: all names with their meanings."""
    return f"{joined((f'`{name}` ({meaning})' for name, meaning in _meanings().items()), 'or')}."
