"""Run the command-line program, in this process or in another."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from helpers.forked import run_forked
from helpers.stores import store_label
from helpers.texts import text_rows, write_jsonl
from lark_store.cli import main

PROGRAM = Path(sys.executable).with_name("lark-store")


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def rows(self):
        return json.loads(self.out)

    def columns(self, *names):
        return [tuple(row[name] for name in names) for row in self.rows]


def lark(line, *args, store=None):
    """Run the program's `main` in this process: the words of a line, then arguments as they are."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["lark-store", *shlex.split(line), *map(str, args)])
        patch.setenv("LARK_STORE", str(store))  # also where there is none: the program itself sets it
        if store is None:
            patch.delenv("LARK_STORE")
        with pytest.raises(SystemExit) as stopped:
            main()
    return Result(stopped.value.code or 0, out.getvalue(), err.getvalue())


def run_process(*command, **environment):
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)


KILLED = """
import os, signal, sys
from lark_store import Store
def stop(progress):
    if progress.done >= 70:
        os.kill(os.getpid(), signal.SIGKILL)
with Store.open(sys.argv[1]) as store:
    store.ingest(["base"], ["many"], ["raw"], sketcher="small", batch_tokens=128, on_progress=stop)
"""


def add_source_and_kill_its_ingest(store, tmp_path):
    """Add 90 samples and kill (SIGKILL) a process that has sketched 70 of them."""
    store.source_add("many", write_jsonl(tmp_path / "many.jsonl", text_rows(90, "many")), stage="pretrain")
    assert run_forked(KILLED, store_label(store.path)) == -signal.SIGKILL
