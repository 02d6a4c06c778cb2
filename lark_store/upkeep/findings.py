"""What a check finds, and what would mend it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import polars as pl

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from lark_store.schema.database import Database

FINDINGS = {
    "severity": pl.String,
    "what": pl.String,
    "where": pl.String,
    "n": pl.Int64,
    "detail": pl.String,
    "repair": pl.String,
}
SEVERITIES = ("error", "warning", "note")


@dataclass(frozen=True)
class Mend:
    """What mends a finding: in words, and done. `act` may be called when nobody else is at work."""

    words: str
    act: Callable[[Database], None]


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be.

    `error`: an answer is wrong, or data is lost; `warning`: nothing that a reader sees, but it should not be;
    `note`: what a kill leaves, or what is outside the store.
    """

    severity: str
    what: str
    where: str
    n: int
    detail: str
    mend: Mend | None = None

    @property
    def row(self) -> tuple[str, str, str, int, str, str | None]:
        """The finding as a row of `FINDINGS`."""
        words = None if self.mend is None else self.mend.words
        return self.severity, self.what, self.where, self.n, self.detail, words


def frame(findings: Iterable[Finding]) -> pl.DataFrame:
    """Return findings as a frame, the gravest first."""
    rows = [finding.row for finding in findings]
    rows.sort(key=lambda row: (SEVERITIES.index(row[0]), row[1], row[2]))
    return pl.DataFrame(rows, schema=FINDINGS, orient="row")


def shown(names: Iterable[str], most: int = 3) -> str:
    """Return a few names, and that there are more."""
    some = list(names)
    return ", ".join(f"`{name}`" for name in some[:most]) + (", …" if len(some) > most else "")
