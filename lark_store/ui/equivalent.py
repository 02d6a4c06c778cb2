"""The command and the Python line that give a page's answer."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lark_store.ui.explorer import Explorer

_FLAGS = {"checkpoints": "checkpoint", "sources": "source", "variants": "variant"}
_LARGE = 1 << 16
_GROUP = "sample_"  # methods whose commands have two words


@dataclass(frozen=True)
class Lines:
    """A command for a shell, and lines of Python."""

    command: str
    python: str


def lines(explorer: Explorer, name: str, /, *arguments: str, **options: Any) -> Lines:
    """Return the lines that call a method of the store; options that are None, false or empty are left out.

    The option `new`, a new text, is spelled as its parts.
    """
    given = {name: value for name, value in options.items() if value not in (None, False, (), [], "")}
    words = ["lark-store", *_command(name)]
    words += [argument for argument in arguments if not argument.startswith("-")]
    words += [word for name, value in given.items() for word in _flags(name, value)]
    words += ["--store", explorer.store.place]
    words += ["--snapshot", explorer.snapshot] if explorer.snapshot else []
    late = [argument for argument in arguments if argument.startswith("-")]
    words += ["--", *late] if late else []
    call = ", ".join([*map(repr, arguments), *(f"{name}={_python(name, value)}" for name, value in given.items())])
    snapshot = f", snapshot={explorer.snapshot!r}" if explorer.snapshot else ""
    opened = f"store = lark_store.Store.open({explorer.store.place!r}{snapshot})"
    return Lines(_joined(words), f"import lark_store\n\n{opened}\nstore.{name}({call})")


def _joined(words: list[str]) -> str:
    """Return words as a command for bash or zsh, with control characters escaped; none can pass a NUL."""
    if any("\0" in word for word in words):
        return "# no command can name this id: use the lines of Python"
    return " ".join(shlex.quote(word) if all(map(_is_plain, word)) else f"$'{_escaped(word)}'" for word in words)


def _is_plain(letter: str) -> bool:
    return letter.isprintable() or letter == "\n"


def _escaped(word: str) -> str:
    spelled = (
        f"\\{letter}"
        if letter in "\\'"
        else letter
        if _is_plain(letter)
        else f"\\x{ord(letter):02x}"
        if letter.isascii()
        else f"\\u{ord(letter):04x}"
        if ord(letter) < _LARGE
        else f"\\U{ord(letter):08x}"
        for letter in word
    )
    return "".join(spelled)


def both_lines(first: Lines, second: Lines) -> Lines:
    """Return the lines of two calls, one after the other."""
    return Lines(f"{first.command}\n{second.command}", f"{first.python}\n{second.python.splitlines()[-1]}")


def _command(method: str) -> list[str]:
    if method.startswith(_GROUP):
        return method.split("_", 1)
    return [method.replace("_", "-")]


def _flags(name: str, value: Any) -> Iterator[str]:
    """Yield an option as words of a command."""
    if name == "new":
        for part, text in value.items():
            yield from _flags(part, text)
        return
    flag = "-k" if name == "k" else "--" + _FLAGS.get(name, name).replace("_", "-")
    if value is True:
        yield flag
        return
    for one in value if isinstance(value, list | tuple) else [value]:
        yield from (f"{flag}={one}",) if str(one).startswith("-") else (flag, str(one))


def _python(name: str, value: Any) -> str:
    if name == "new":
        return f"lark_store.NewText({', '.join(f'{part}={text!r}' for part, text in value.items())})"
    return repr(value)
