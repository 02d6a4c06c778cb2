"""Run the program as a user without rights."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import subprocess
from pathlib import Path

import pytest

from helpers.program import PROGRAM

AS_NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")


def run_as_nobody(line, store, folder):
    """Run the program as a user who owns nothing."""
    home = {"HOME": str(folder), "LARK_STORE": str(store), "NUMBA_CACHE_DIR": str(folder)}
    completed = subprocess.run(
        [*AS_NOBODY, str(PROGRAM), *line.split()],
        env=os.environ | home,
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
    )
    return completed.returncode, completed.stdout, completed.stderr


@pytest.fixture
def open_to_all(scored_path):
    """A copy of the scored store, in a folder open to every user."""
    import tempfile

    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("only root can be another user")
    with tempfile.TemporaryDirectory(dir="/tmp") as root:  # pytest's own folders are closed to others
        Path(root).chmod(0o755)
        shutil.copytree(scored_path, Path(root) / "lark.store")
        with contextlib.closing(sqlite3.connect(Path(root) / "lark.store" / "catalog.sqlite")) as catalog:
            catalog.execute("SELECT * FROM store_meta")  # merges the write-ahead log copied from a store in use
        yield Path(root)
