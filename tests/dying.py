"""An ingest in a process of its own that is killed (SIGKILL) at a chosen step of its writing.

The process is forked by a server that has torch and transformers loaded and has never started a thread: a fork of the
tests' own process would have Lance's threads missing, and hang. What is computed is real; the batch of a commit is
made small so that even a few samples take several.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

ROWS_PER_COMMIT = 2
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["transformers.models.llama.modeling_llama", "lark_store.ingest.run"])


def killed_ingest(path: Path, unit: tuple[str, str, str], sketcher: str, step: int, log: Path) -> tuple[bool, set[str]]:
    """Ingest a unit (checkpoint, source, variant) and be killed at a step, from 0, unless it has fewer.

    Returns whether the run was committed before that, and the ids of all samples whose sketches were written.
    """
    log.write_text("", encoding="utf-8")
    process = _SERVER.Process(target=_ingest, args=(path, unit, sketcher, step, log))
    process.start()
    process.join(120)
    assert process.exitcode in {0, -signal.SIGKILL}, process.exitcode
    said = log.read_text(encoding="utf-8").splitlines()
    return "done" in said, {line.removeprefix("wrote ") for line in said if line.startswith("wrote ")}


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
