"""`db repair`: run the repairs of a check's findings until a check finds nothing more to repair.

Wrong rows that can be recomputed (sketches, scores) are deleted; then runs are recounted, and inconsistent score runs
superseded. Samples and user entries in the catalog are never changed, except for identical duplicate samples.

It runs under `maintenance` and the gate, so no other work runs or starts. A killed repair is finished by the next one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lark_store.errors import StoreBusyError, StoreError
from lark_store.maintenance.check.findings import Finding, Row, frame
from lark_store.maintenance.check.run import check_alone
from lark_store.results import RepairReport
from lark_store.schema.faults import FAULTS, first_line
from lark_store.schema.locks import maintenance, paused

if TYPE_CHECKING:
    from lark_store.results import OnProgress
    from lark_store.schema.database import Database
    from lark_store.schema.locks import Pause

_PASSES = 6  # rows, then counts, then scores, then their rows, then indices and files


def repair(db: Database, *, dry_run: bool, on_progress: OnProgress | None = None) -> RepairReport:
    """Run all possible repairs; see `Store.db_repair`."""
    repaired: list[Finding] = []
    failed: dict[Row, Finding] = {}
    with maintenance(db.location):
        for attempt in range(_PASSES + 1):
            with paused(db.location) as pause:
                _require_idle(pause)
                findings = check_alone(db, pause, on_progress=on_progress)
                todo = [finding for finding in findings if finding.repair is not None]
                if dry_run:
                    return RepairReport(frame(todo), frame(finding for finding in findings if finding.repair is None))
                if not todo or attempt == _PASSES:
                    break
                succeeded, failed = _run_repairs(db, todo)
                repaired += succeeded
                if any(finding.repair and finding.repair.is_last for finding in succeeded):
                    findings = check_alone(db, pause)
                    break
    findings = [failed.get(finding.row, finding) for finding in findings]
    remaining = {finding.row for finding in findings}
    return RepairReport(frame({f.row: f for f in repaired if f.row not in remaining}.values()), frame(findings))


def _run_repairs(db: Database, todo: list[Finding]) -> tuple[list[Finding], dict[Row, Finding]]:
    """Run the repairs of findings; returns the repaired findings, and the others with the reason, by their rows."""
    succeeded: list[Finding] = []
    failed: dict[Row, Finding] = {}
    for finding in sorted(todo, key=lambda f: f.repair is None or not f.repair.is_first):
        assert finding.repair is not None
        try:
            finding.repair.run(db)
        except (*FAULTS, StoreError) as error:
            if isinstance(error, StoreBusyError):
                raise
            detail = f"{finding.detail}; the repair failed: {first_line(error)}"
            failed[finding.row] = replace(finding, detail=detail, repair=None)
        else:
            succeeded.append(finding)
    return succeeded, failed


def _require_idle(pause: Pause) -> None:
    if pause.doing:
        raise StoreBusyError(
            f"the store is in use: another process is {pause.doing[0]}",
            "wait for it, then run the command again; nothing was repaired",
        )
