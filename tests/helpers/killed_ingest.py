"""An ingest in a process of its own, killed (SIGKILL) at a chosen step of its writing.

The computation is real; the batch of a commit is small, so even a few samples take several.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

from helpers.forked import SERVER

ROWS_PER_COMMIT = 2


def killed_ingest(path: Path, unit: tuple[str, str, str], sketcher: str, step: int, log: Path) -> tuple[bool, set[str]]:
    """Ingest a unit (checkpoint, source, variant), killed at a step, counted from 0, unless it has fewer.

    Returns whether the run was committed before the kill, and the ids of all samples with written sketches.
    """
    log.write_text("", encoding="utf-8")
    process = SERVER.Process(target=_ingest, args=(path, unit, sketcher, step, log))
    process.start()
    process.join(120)
    assert process.exitcode in {0, -signal.SIGKILL}, process.exitcode
    output = log.read_text(encoding="utf-8").splitlines()
    return "done" in output, {line.removeprefix("wrote ") for line in output if line.startswith("wrote ")}


def _ingest(path: Path, unit: tuple[str, str, str], sketcher: str, step: int, log: Path) -> None:
    from lark_store import Store
    from lark_store.ingest import writer
    from lark_store.schema.vectors import VectorStore

    left = [step]
    append, record, begun = VectorStore.append, writer.SketchWriter._record, writer.SketchWriter.__init__

    def point() -> None:
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1

    def say(lines: list[str]) -> None:
        with log.open("a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)

    def appending(self: VectorStore, table: object, rows: object) -> int:
        point()
        version = append(self, table, rows)
        if "vector" in rows.schema.names:
            say([f"wrote {sample_id}" for sample_id in rows.column("sample_id").to_pylist()])
        point()
        return version

    def recording(self: writer.SketchWriter) -> None:
        point()
        record(self)
        if self.run.status == "done":
            say(["done"])
        point()

    def beginning(self: writer.SketchWriter, *args: object) -> None:
        begun(self, *args)
        point()

    VectorStore.append, writer.SketchWriter._record = appending, recording
    writer.SketchWriter.__init__, writer.ROWS_PER_BATCH = beginning, ROWS_PER_COMMIT
    checkpoint, source, variant = unit
    with Store.open(path) as store:
        store.ingest([checkpoint], [source], [variant], sketcher=sketcher)
