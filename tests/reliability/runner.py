"""A server that runs the command line in processes of its own, each at once: torch is imported once, then forked.

A kill of a fresh `lark-store` would mostly meet its imports, which take seconds. Here each command is a real process,
which runs the real `main`, and whose work begins within tenths of a second.

    python runner.py SOCKET [ROWS_PER_COMMIT]

A connection is one command: a line of JSON in (arguments, environment, files for stdout and stderr); out come the
process's id, `work` when it has the store open (or begins an upgrade), `conflict` when a commit met another, `done`
when it lets go of the store, and its status.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import pkgutil
import re
import signal
import socket
import sys
import time
import warnings
from pathlib import Path

import lark_store

_NOT_NEEDED = re.compile(r"\.(study|shell|gpu|versions|env)\b")


def serve(path: str, rows_per_commit: str | None = None) -> None:
    """Answer connections until the parent is gone; each is looked after by a process of its own."""
    import lance.fragment  # noqa: F401  imports of the commands, ahead of their work
    import lancedb.index  # noqa: F401
    import numba
    import rich.progress  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    numba.njit(lambda x: x)(1)  # loads the runtime of compiled functions
    for module in pkgutil.walk_packages(lark_store.__path__, "lark_store."):
        if not _NOT_NEEDED.search(module.name):
            importlib.import_module(module.name)

    if rows_per_commit is not None:
        from lark_store.ingest import writer

        writer.ROWS_PER_BATCH = int(rows_per_commit)
    warnings.filterwarnings("ignore", message=".*fork")
    gc.freeze()  # else each process copies the memory of all modules when it collects
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the process of a connection
    server = socket.socket(socket.AF_UNIX)
    server.bind(f"{path}.draft")
    server.listen(64)
    Path(f"{path}.draft").rename(path)  # whoever sees it can connect
    server.settimeout(1)
    parent = os.getppid()
    while os.getppid() == parent:
        try:
            connection, _ = server.accept()
        except TimeoutError:
            continue
        if os.fork() == 0:
            server.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _look_after(connection)
        connection.close()


def _look_after(connection: socket.socket) -> None:
    connection.settimeout(None)
    request = json.loads(connection.makefile().readline())
    pid = os.fork()
    if pid == 0:
        _run(request, connection)
    connection.sendall(f"{pid}\n".encode())
    _, status = os.waitpid(pid, 0)
    connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def _run(request: dict[str, object], connection: socket.socket) -> None:
    """Be the program."""
    os.setpgid(0, 0)
    for number, name in ((0, os.devnull), (1, request["out"]), (2, request["err"])):
        file = os.open(str(name), os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(file, number)
        os.close(file)
    os.environ.update(request["env"])
    sys.argv = ["lark-store", *request["arguments"]]
    _tell_of_work(connection)
    _tell_of_conflicts(connection)
    from lark_store.cli import output
    from lark_store.cli.app import main

    output._SECONDS_BETWEEN_LINES = 0.0  # each step of the progress is a line: how many rows were computed
    code = 1
    try:
        main()
    except SystemExit as stopped:
        code = stopped.code or 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _tell_of_work(connection: socket.socket) -> None:
    """Say `work` when the program has the store open, `done` when it closes it; the same of an upgrade."""
    from lark_store.store import Store

    opened, closed, upgrade = Store.open, Store.close, Store.db_upgrade

    def open_and_tell(*arguments, **options):
        store = opened(*arguments, **options)
        connection.sendall(b"work\n")
        return store

    def close_and_tell(store):
        closed(store)
        connection.sendall(b"done\n")

    def upgrade_and_tell(*arguments, **options):
        connection.sendall(b"work\n")
        result = upgrade(*arguments, **options)
        connection.sendall(b"done\n")
        return result

    Store.open, Store.close, Store.db_upgrade = open_and_tell, close_and_tell, staticmethod(upgrade_and_tell)


def _tell_of_conflicts(connection: socket.socket) -> None:
    """Say `conflict` when a commit met another and the program waits before it tries again."""
    from lark_store.core import retry
    from lark_store.schema import vectors

    class Clock:
        @staticmethod
        def sleep(seconds: float) -> None:
            connection.sendall(b"conflict\n")
            time.sleep(seconds)

    retry.time = vectors.time = Clock


if __name__ == "__main__":
    serve(*sys.argv[1:])
