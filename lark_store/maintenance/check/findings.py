"""Findings of a check and their repairs."""

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
Row = tuple[str, str, str, int, str, str | None]
SEVERITIES = ("error", "warning", "note")


@dataclass(frozen=True)
class Repair:
    """The repair of a finding. Call `run` only while no other process works on the store.

    `is_first`: other repairs may depend on it. `is_last`: it loses data, so `db repair` stops after it and reports.
    """

    description: str
    run: Callable[[Database], None]
    is_first: bool = False
    is_last: bool = False


@dataclass(frozen=True)
class Finding:
    """A problem of a store.

    Severity `error`: wrong results or lost data. `warning`: a problem that readers don't notice. `note`: remains of a
    killed process, or a problem outside the store.
    """

    severity: str
    what: str
    where: str
    n: int
    detail: str
    repair: Repair | None = None

    @property
    def row(self) -> Row:
        """The finding as a row of `FINDINGS`."""
        description = None if self.repair is None else self.repair.description
        return self.severity, self.what, self.where, self.n, self.detail, description


def frame(findings: Iterable[Finding]) -> pl.DataFrame:
    """Return findings as a frame, the most severe first."""
    rows = [finding.row for finding in findings]
    rows.sort(key=lambda row: (SEVERITIES.index(row[0]), row[1], row[2]))
    return pl.DataFrame(rows, schema=FINDINGS, orient="row")


def name_list(names: Iterable[str], limit: int = 3) -> str:
    """Return the first names, with an ellipsis for the rest."""
    names = list(names)
    return ", ".join(f"`{name}`" for name in names[:limit]) + (", …" if len(names) > limit else "")
