r"""Convert command-line spelling in error messages to Python: callers of `Store` type no options.

Messages are written once, with commands and options in backticks, as the command line prints them. When an error leaves
a public method of `Store`, each command and option becomes its Python equivalent:

    `lark-store source add`          `store.source_add(...)`
    `lark-store init --store PATH`   `Store.create(path=PATH)`
    `--checkpoint NAME`              `checkpoint=NAME`, or `checkpoints=`, whichever the method has
    `-k 10`                          `k=10`
    `--overwrite`                    `overwrite=True`

Commands without a Python method (`lark-store study run`, `lark-store evaluate`) stay commands.
"""

from __future__ import annotations

import inspect
import re
import shlex
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

_QUOTED = re.compile(r"`(lark-store [^`]+|-{1,2}[a-z][^`]*)`")
_PLACEHOLDER = re.compile(r"[A-Z][A-Z0-9_.:/-]*|\{.*\}|…|\.\.\.")
_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?")
_COMMANDS = {"init": "create"}  # other commands are named like their method
# Options whose parameter has another name. `_PARTS` are the fields of `NewText`.
_PARAMETERS = {"store": "path", "column": "columns", "map": "columns", "metric": "metrics"}
_PARAMETERS |= {
    "c": "checkpoint",
    "s": "source",
    "q": "queries",
    "v": "variant",
    "n": "limit",
    "m": "method",
    "w": "where",
}
_PARTS = {"prompt", "response", "text", "file"}
Parameters = dict[str, str]  # name to type hint


def in_python(text: str, method: str | None = None) -> str:
    """Return a message in Python spelling; `method` is the method whose options it mentions.

    >>> in_python("make one with `lark-store source add --stage query`")
    'make one with `store.source_add(stage="query", ...)`'
    >>> in_python("give it with `--checkpoint NAME`", "top"), in_python("try `-k 10`", "top")
    ('give it with `checkpoint=NAME`', 'try `k=10`')
    >>> in_python("try `lark-store study run`")
    'try `lark-store study run`'
    """
    parameters = _METHODS.get(method or "", {})
    return _QUOTED.sub(lambda match: f"`{_translate(match[1], parameters)}`", text)


_METHODS: dict[str, Parameters] = {}  # the public methods of `Store`, with their parameters


def register(method: Callable[..., Any]) -> None:
    """Make a method of `Store` known to messages."""
    parameters = inspect.signature(method).parameters.items()
    _METHODS[method.__name__] = {key: str(p.annotation) for key, p in parameters if key not in {"self", "cls"}}


def _translate(code: str, parameters: Parameters) -> str:
    """Return a command, or options alone, in Python spelling; unchanged if there is no equivalent."""
    try:
        words = shlex.split(code)
    except ValueError:
        return code
    if words[0] != "lark-store":
        option = words[0].lstrip("-").partition("=")[0]
        if option not in _PARTS and not any(_name(option, candidates) for candidates in _METHODS.values()):
            return code  # another program's option
        return ", ".join(_merged(_arguments(words, parameters))) or code
    words = words[1:]
    for n_words in (2, 1):
        name = "_".join(words[:n_words]).replace("-", "_")
        name = _COMMANDS.get(name, name)
        if len(words) >= n_words and name in _METHODS:
            return _call(name, words[n_words:])
    return code


def _call(name: str, words: list[str]) -> str:
    """Return the method call equivalent to a command with its options and arguments."""
    parameters = _METHODS[name]
    if words == ["--schema"]:
        return 'store.sql("FROM information_schema.columns")'
    arguments = _merged(_arguments(words, parameters))
    required = [key for key in parameters if f"{key}=" not in ", ".join(arguments)]
    ellipsis = ["..."] if required and arguments[-1:] != ["..."] else []
    receiver = "Store" if name in {"create", "open"} or name in _STATIC else "store"
    return f"{receiver}.{name}({', '.join([*arguments, *ellipsis])})"


_STATIC = {"db_restore", "db_status", "db_upgrade", "doctor"}


def _arguments(words: list[str], parameters: Mapping[str, str]) -> Iterator[str]:
    """Yield a command's options and arguments as Python arguments."""
    i = 0
    while i < len(words):
        word = words[i]
        i += 1
        if not re.match(r"-{1,2}[a-z]", word):
            yield "..." if word in {"…", "..."} else _value(word)
            continue
        option, equals, value = word.lstrip("-").partition("=")
        has_value = bool(equals)
        if not has_value and i < len(words) and not re.match(r"-{1,2}[a-z]", words[i]) and words[i] != "…":
            value, has_value = words[i], True
            i += 1
        yield _argument(option, value if has_value else None, parameters)


def _merged(arguments: Iterator[str]) -> list[str]:
    """Return the arguments, with repeated options merged into one list.

    >>> _merged(iter(['checkpoints=["a"]', 'k=1', 'checkpoints=["b"]']))
    ['checkpoints=["a", "b"]', 'k=1']
    """
    merged: dict[str, str] = {}
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name in merged and value.startswith("["):
            merged[name] = f"{merged[name][:-1]}, {value[1:]}"
        else:
            merged[name] = argument
    return list(merged.values())


def _name(option: str, parameters: Mapping[str, str]) -> str | None:
    """Return the name of an option's parameter; None if the method has no such parameter."""
    name = _PARAMETERS.get(option, option.replace("-", "_"))
    return next((candidate for candidate in (name, f"{name}s") if candidate in parameters), None)


def _argument(option: str, value: str | None, parameters: Mapping[str, str]) -> str:
    """Return one option as a keyword argument."""
    name = _name(option, parameters) or _PARAMETERS.get(option, option.replace("-", "_"))
    hint = parameters.get(name, "")
    if option == "snapshot" and name not in parameters:
        return "snapshot" if value is None else f"Store.open(path, snapshot={_value(value)})"
    if name in _PARTS and name not in parameters and "new" in parameters:
        return f"new=NewText({name}=...)"
    if value is None:
        return f"{name}=True" if hint == "bool" else name
    if hint.startswith(("dict", "Mapping")):
        key, _, item = value.partition("=")
        return f"{name}={{{_value(key)}: {_value(item)}}}"
    literal = f"[{_value(value)}]" if hint.startswith("Sequence") else _value(value)
    return f"{name}={literal}"


def _value(word: str) -> str:
    if _PLACEHOLDER.fullmatch(word) or _NUMBER.fullmatch(word):
        return word
    return '"' + word.replace('"', '\\"') + '"'
