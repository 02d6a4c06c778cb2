"""Questions to a model: one at a time, in a second process, which keeps the model loaded between questions."""

from __future__ import annotations

import itertools
import multiprocessing
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lark_store.errors import InputError, LarkStoreError, NameUnknownError, StoreBusyError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess

_KEPT = 50  # finished jobs


@dataclass
class Job:
    """A question: its name in `QUESTIONS` and its arguments, and later its answer or its error."""

    number: int
    name: str
    options: dict[str, Any]
    started: float = field(default_factory=time.monotonic)
    state: str = "running"  # or done, failed, cancelled
    answer: Any = None
    error: LarkStoreError | None = None

    @property
    def seconds(self) -> int:
        """Seconds since it began."""
        return int(time.monotonic() - self.started)


class Jobs:
    """The questions of an explorer, and the process that answers them."""

    def __init__(self, place: str | None, snapshot: str | None) -> None:
        self._place, self._snapshot = place, snapshot
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._jobs: dict[int, Job] = {}
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None

    def start(self, name: str, **options: Any) -> Job:
        """Begin a question of `QUESTIONS`.

        Raises
        ------
        StoreBusyError
            Another question is being answered.
        """
        with self._lock:
            running = next((job for job in self._jobs.values() if job.state == "running"), None)
            if running is not None:
                page = f"/{'ask' if running.name == 'ask' else 'tokens'}/{running.number}"
                raise StoreBusyError(
                    "another question is being answered", f"wait for it, or cancel it on the page {page}"
                )
            job = Job(next(self._numbers), name, options)
            self._jobs[job.number] = job
            for old in list(self._jobs)[:-_KEPT]:
                del self._jobs[old]
            pipe = self._connected()
            threading.Thread(target=self._wait, args=(job, pipe), daemon=True).start()
        return job

    def find(self, number: int, name: str) -> Job:
        """Return a question by its number.

        Raises
        ------
        NameUnknownError
        """
        job = self._jobs.get(number)
        if job is None or job.name != name:
            raise NameUnknownError(f"there is no question {number}", "ask it again; answers are lost when this ends")
        return job

    def cancel(self, number: int) -> None:
        """End a question, and with it the process and its model."""
        with self._lock:
            job = self._jobs.get(number)
            if job is not None and job.state == "running":
                job.state = "cancelled"
                self._end()

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._end()

    def _connected(self) -> Connection:
        """Return the pipe to the process, which is started if there is none."""
        if self._pipe is None or self._process is None or not self._process.is_alive():
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_answer_all, args=(theirs,), daemon=True)
            self._process.start()
            theirs.close()
            self._pipe.send((self._place, self._snapshot))
        return self._pipe

    def _wait(self, job: Job, pipe: Connection) -> None:
        try:
            pipe.send((job.name, job.options))
            state, value = pipe.recv()
        except (EOFError, OSError):
            state, value = "failed", InputError("the process with the model ended", "it may have run out of memory")
        with self._lock:
            if job.state != "running":
                return
            if state == "done":
                job.answer = value
            else:
                job.error = value
            job.state = state

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
        if self._pipe is not None:
            self._pipe.close()
        self._process = self._pipe = None


def _answer_all(pipe: Connection) -> None:
    """Answer questions until the other end closes. Errors go back as errors; they end nothing."""
    import signal

    from lark_store.modeling.loading import kept_loaded
    from lark_store.store import Store
    from lark_store.ui.questions import QUESTIONS

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which ends this process
    place, snapshot = pipe.recv()
    with kept_loaded():
        while True:
            try:
                name, options = pipe.recv()
            except EOFError:
                return
            try:
                with Store.open(place, snapshot=snapshot) as store:
                    pipe.send(("done", QUESTIONS[name](store, **options)))
            except LarkStoreError as error:
                pipe.send(("failed", InputError(error.fact, error.hint)))
