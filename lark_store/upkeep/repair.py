"""`db repair`: does what a check's findings name, until a check finds nothing more that can be mended.

Rows that can be made again (sketches, scores) are deleted where they are wrong; then runs are counted again, and score
runs that no longer agree superseded. Samples and what people added to the catalog are never touched, but for one of
two samples that are the same in all.

Behind `maintenance` and the gate: nobody else is at work, and no work begins. A repair that was killed is done by the
next.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lark_store.errors import StoreBusyError
from lark_store.schema.locks import maintenance, paused
from lark_store.schema.records import RepairReport
from lark_store.upkeep.check import check_alone
from lark_store.upkeep.findings import Finding, frame

if TYPE_CHECKING:
    from lark_store.schema.database import Database
    from lark_store.schema.locks import Pause
    from lark_store.schema.records import OnProgress

_PASSES = 6  # rows go, then counts change, then scores, then their rows, then indices and files


def repair(db: Database, *, dry_run: bool, on_progress: OnProgress | None = None) -> RepairReport:
    """Mend what can be mended; see `Store.db_repair`."""
    mended: list[Finding] = []
    with maintenance(db.location):
        for attempt in range(_PASSES + 1):
            with paused(db.location) as pause:
                _check_alone(pause)
                found = check_alone(db, pause, on_progress=on_progress)
                todo = [finding for finding in found if finding.mend is not None]
                if dry_run:
                    return RepairReport(frame(todo), frame(finding for finding in found if finding.mend is None))
                if not todo or attempt == _PASSES:
                    break
                for finding in todo:
                    assert finding.mend is not None
                    finding.mend.act(db)
                    mended.append(finding)
    left = {finding.row for finding in found}  # what could not be mended after all
    return RepairReport(frame({f.row: f for f in mended if f.row not in left}.values()), frame(found))


def _check_alone(pause: Pause) -> None:
    if pause.doing:
        raise StoreBusyError(
            f"the store is in use: another process is {pause.doing[0]}",
            "wait for it, then run the command again; nothing was repaired",
        )
