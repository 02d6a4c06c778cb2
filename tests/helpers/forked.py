"""Scripts in processes of their own, started in a moment: to be killed, or to kill themselves (SIGKILL).

A server which has loaded torch and transformers and never started a thread forks each process: a fork of the tests'
own process would lack Lance's threads, and hang; a new interpreter would import for seconds.
"""

from __future__ import annotations

import multiprocessing
import os
import sys

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["transformers.models.llama.modeling_llama", "lark_store.ingest.run"])
_PATIENCE_S = 300


def run_forked(script: str, *arguments: object) -> int | None:
    """Run a script with these `sys.argv[1:]`; returns its exit status, or minus the signal that ended it."""
    process = SERVER.Process(target=_run, args=(script, [str(each) for each in arguments], dict(os.environ)))
    process.start()
    process.join(_PATIENCE_S)
    return process.exitcode


def _run(script: str, arguments: list[str], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    sys.argv = ["-c", *arguments]
    exec(script, {"__name__": "__main__"})  # noqa: S102  a test's own script
