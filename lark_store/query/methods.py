"""Methods: what a score is made of at one checkpoint, and how the scores of several checkpoints are joined.

A method's name says both: `cosine` looks at one checkpoint, `cosine-sum` and `cosine-lr-weighted` at several. `tracin`
is the name of `dot-lr-weighted` (Pruthi et al. 2020, TracInCP).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lark_store.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable

GRADIENT = ("cosine", "dot")
LEXICAL = ("bm25", "bm25-okapi", "bm25plus")
BASES = (*GRADIENT, *LEXICAL, "hybrid")
OVER = ("sum", "lr-weighted")  # how checkpoints are joined: Σ score, Σ learning rate × score
BETWEEN = " + "  # the names of checkpoints that are summed over; no name has a space
_TRACIN = "tracin"


@dataclass(frozen=True)
class Method:
    """A score at one checkpoint (`base`, one of `BASES`) and how checkpoints are joined (`over`; None: there is one).

    >>> Method.of("cosine", "sum").name
    'cosine-sum'
    >>> Method.of("tracin")
    Method(base='dot', over='lr-weighted')
    """

    base: str = "cosine"
    over: str | None = None

    @classmethod
    def of(cls, name: str | None, over: str | None = None, *, default: str = "cosine") -> Method:
        """Return the method of this name, its checkpoints joined as `over` says.

        Raises
        ------
        InputError
            There is no such method, it can't be summed, or its name says another way to join checkpoints.
        """
        if over is not None and over not in OVER:
            named = " or ".join(f"`{each}`" for each in OVER)
            raise InputError(f"checkpoints can't be joined by `{over}`", f"the ways are {named}")
        base, joined = _parsed(name or default)
        if joined and over and joined != over:
            raise InputError(f"`{name}` joins checkpoints by `{joined}`, not by `{over}`", "leave one of them out")
        found = cls(base, joined or over)
        if found.over and base in LEXICAL:
            raise InputError(f"`{base}` looks at no checkpoint", "leave out `--over-checkpoints`")
        return found

    @property
    def name(self) -> str:
        """The method's name, as it is kept."""
        if (self.base, self.over) == ("dot", "lr-weighted"):
            return _TRACIN
        return f"{self.base}-{self.over}" if self.over else self.base

    @property
    def is_adding(self) -> bool:
        """Whether a row's score depends on nothing but the row and the query, at one checkpoint."""
        return self.over is None and self.base in {"cosine", "dot"}

    @property
    def reads_sketches(self) -> bool:
        """Whether it looks at gradients."""
        return self.base not in LEXICAL

    @property
    def engine(self) -> str | None:
        """The lexical engine that it reads texts with, if any."""
        return "bm25" if self.base == "hybrid" else self.base if self.base in LEXICAL else None

    @property
    def gradient(self) -> str:
        """The score of gradients that it is made of, one of `GRADIENT`."""
        return "cosine" if self.base == "hybrid" else self.base

    def label(self, sketcher: str, checkpoints: Iterable[str]) -> str:
        """Return how outputs call the score.

        >>> Method.of("cosine", "sum").label("adam", ["base", "epoch-1"])
        'adam · cosine, sum over base + epoch-1'
        """
        if not self.reads_sketches:
            return self.name
        over = BETWEEN.join(checkpoints)
        if self.name == _TRACIN:
            return f"{sketcher} · {_TRACIN} over {over}"
        how = {None: "", "sum": f", sum over {over}", "lr-weighted": f", lr-weighted sum over {over}"}[self.over]
        return f"{sketcher} · {self.base}{how}"


def _parsed(name: str) -> tuple[str, str | None]:
    """Return what a name says: base and join."""
    if name == _TRACIN:
        return "dot", "lr-weighted"
    for over in OVER:
        base = name.removesuffix(f"-{over}")
        if base != name and base in BASES:
            return base, over
    if name in BASES:
        return name, None
    named = ", ".join(f"`{each}`" for each in (*GRADIENT, _TRACIN, *LEXICAL, "hybrid"))
    raise InputError(
        f"`{name}` is no method", f"the methods are {named}; of several checkpoints `cosine-sum` and so on"
    )
