"""The server: its socket, its address, and its end."""

from __future__ import annotations

import secrets
import socket
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from lark_store.errors import InputError
from lark_store.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

LOOPBACK = "127.0.0.1"
_HTTP = 80
_EVERY = ("0.0.0.0", "::")  # noqa: S104  # refused
_SHORTEST = 16  # characters of a token in a file


def serve(
    place: str | None,
    *,
    snapshot: str | None = None,
    host: str = LOOPBACK,
    port: int = 0,
    token_file: Path | None = None,
    started: Callable[[str], None] = print,
) -> None:
    """Serve the explorer of a store until Ctrl-C; `started` gets its address, with the token, once it listens.

    Raises
    ------
    InputError
        Another host than 127.0.0.1 is given without a token file, or the port is in use.
    """
    if host in _EVERY:
        fact = f"`--host {host}` stands for every address of this machine, and no page is served under an unknown one"
        raise InputError(fact, "give the address by which others reach this machine")
    token = _token(host, token_file)
    with Store.open(place, snapshot=snapshot) as store, _listening(host, port) as listener:
        from uvicorn import Config, Server

        from lark_store.ui.app import application
        from lark_store.ui.explorer import Explorer
        from lark_store.ui.jobs import Jobs

        bound = listener.getsockname()[1]
        name = f"[{host}]" if ":" in host else host
        hosts = {f"{each}:{bound}" for each in ({name} if host != LOOPBACK else {LOOPBACK, "localhost"})}
        if bound == _HTTP:  # browsers leave the usual port out
            hosts |= {each.removesuffix(f":{_HTTP}") for each in hosts}
        jobs = Jobs(place, snapshot)
        app = application(
            Explorer(store, jobs, snapshot),
            hosts=hosts,
            token=token,
            cookie=f"lark-store-{bound}",
        )
        config = Config(app, log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=1)
        threading.Thread(target=_warm_up, daemon=True).start()
        started(f"http://{name}:{bound}/" + (f"?token={token}" if token_file is None else ""))
        try:
            with suppress(KeyboardInterrupt):  # Ctrl-C is how the server ends
                Server(config).run(sockets=[listener])
        finally:
            jobs.close()


def _token(host: str, token_file: Path | None) -> str:
    if token_file is None:
        if host != LOOPBACK:
            raise InputError(
                f"`--host {host}` needs a token of your own",
                "write a long random text to a file that only you can read, and give it with `--token-file FILE`",
            )
        return secrets.token_urlsafe(24)
    try:
        token = token_file.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"`{token_file}` can't be read: {error}", "it is a text file with the token") from error
    if len(token) < _SHORTEST or not token.isascii() or not token.isprintable():
        fact = f"the token in `{token_file}` needs at least {_SHORTEST} printable ASCII characters"
        raise InputError(fact, 'make one with `python -c "import secrets; print(secrets.token_hex(24))"`')
    return token


def _listening(host: str, port: int) -> socket.socket:
    """Return a listening socket."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise InputError(
            f"can't listen at {host}:{port}: {error}", "choose another `--port` or `--host`, or leave them out"
        ) from error
    listener.listen(128)
    return listener


def _warm_up() -> None:
    """Import what the first page needs."""
    import lark_store.query.answers.top
    import lark_store.query.sql.engine  # noqa: F401
