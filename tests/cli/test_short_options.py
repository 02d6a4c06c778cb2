"""`-h` works everywhere, and a short option means the same in every command."""

from __future__ import annotations

import pytest
import typer.main
from helpers.program import lark

from lark_store.cli import app
from lark_store.store.spelling import in_python


def tree(group, *path):
    yield path, group
    for name, command in getattr(group, "commands", {}).items():
        yield from tree(command, *path, name)


COMMANDS = dict(tree(typer.main.get_command(app)))
SHORT = {
    "--checkpoint": "-c",
    "--format": "-f",
    "--limit": "-n",
    "--method": "-m",
    "--queries": "-q",
    "--source": "-s",
    "--variant": "-v",
    "--where": "-w",
}


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: " ".join(path) or "lark-store")
def test_h_prints_the_help(path):
    result = lark(" ".join([*path, "-h"]))
    assert (result.code, result.err) == (0, "")
    assert result.out == lark(" ".join([*path, "--help"])).out
    assert "Usage: " in result.out


def test_a_frequent_option_has_its_short_form_in_every_command():
    options = [(path, option.opts) for path, command in COMMANDS.items() for option in command.params]
    lacking = [(path, names) for path, names in options for name in names if not {SHORT.get(name, name)} <= {*names}]
    assert lacking == []


def test_a_short_form_means_one_thing():
    options = [option.opts for command in COMMANDS.values() for option in command.params]
    others = {(name, short) for names in options for short in SHORT.values() if short in names for name in names[:1]}
    assert others == set(SHORT.items())


def test_messages_spell_short_options_in_python():
    assert in_python("try `-n 5`", "ingest") == "try `limit=5`"
    assert in_python("try `-v raw`", "ingest") == 'try `variants=["raw"]`'
    assert in_python("try `-w SQL`", "top") == "try `where=SQL`"
