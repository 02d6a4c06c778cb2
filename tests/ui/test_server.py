"""`lark-store ui`: the program, its address, its end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import urllib.error
import urllib.request

import pytest
from helpers.program import PROGRAM, lark


def started(*words):
    """Start the program; return it and its first line."""
    command = [PROGRAM, "ui", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
    return process, process.stdout.readline().strip()


def ended(process, number=signal.SIGINT):
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_program_serves_until_it_is_stopped(explored_path, number):
    process, address = started("--store", str(explored_path))
    try:
        assert address.startswith("http://127.0.0.1:")
        opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        with opener.open(address) as response:
            assert (response.url.endswith("/"), "finetune" in response.read().decode()) == (True, True)
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.build_opener().open(address.split("?")[0])
    finally:
        code, out, err = ended(process, number)
    assert (code, out, "Traceback" in err) == (0, "", False)


def test_token_comes_from_a_file(explored_path, tmp_path):
    (tmp_path / "token").write_text("s" * 32 + "\n")
    process, address = started("--store", str(explored_path), "--token-file", str(tmp_path / "token"))
    try:
        assert "s" * 32 not in address
        opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        with opener.open(f"{address}?token={'s' * 32}") as response:
            assert response.status == 200
    finally:
        code, *_ = ended(process)
    assert code == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--host 203.0.113.1", "`--host 203.0.113.1` needs a token of your own"),
        ("--host 0.0.0.0 --token-file long", "`--host 0.0.0.0` stands for every address"),
        ("--token-file nowhere", "`nowhere` can't be read"),
        ("--token-file short", "needs at least 16 printable ASCII characters"),
        ("--snapshot none", "no snapshot `none`"),
        ("--port {taken}", "can't listen at 127.0.0.1:"),
        ("--host 203.0.113.1 --token-file long", "can't listen at 203.0.113.1:"),
    ],
)
def test_wrong_options_are_clear(explored_path, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short").write_text("a")
    (tmp_path / "long").write_text("a" * 40)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = lark(f"ui {words.format(taken=taken.getsockname()[1])}", store=explored_path)
    assert (result.code, said in result.err, "hint: " in result.err) == (1, True, True)


def test_no_store_is_clear(tmp_path):
    result = lark("ui", store=tmp_path / "none")
    assert (result.code, "hint: " in result.err) == (1, True)
