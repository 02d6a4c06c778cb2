"""Parse JSON strictly: no repeated keys, no halves of surrogate pairs."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

from lark_store.errors import InputError

_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")


class RepeatedKeyError(Exception):
    """A JSON object repeats a key, which is the message."""


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object's dict; refuse repeated keys, of which Python would keep the last."""
    row = dict(pairs)
    if len(row) < len(pairs):
        seen: set[str] = set()
        raise RepeatedKeyError(next(key for key, _ in pairs if key in seen or seen.add(key)))  # type: ignore[func-returns-value]
    return row


def parse(text: str, location: str, hint: str) -> Any:
    """Parse one JSON value. `location` begins the fact of an error; `hint` is for text that is not JSON.

    Raises
    ------
    InputError
    """
    try:
        value = json.loads(text, object_pairs_hook=unique_keys)
        check_pairs(text, value)
    except json.JSONDecodeError as error:
        raise InputError(f"{location} is not JSON: {error.msg} at column {error.colno}", hint) from error
    except (RepeatedKeyError, RecursionError, ValueError) as error:
        raise fault(error, location) from error
    return value


def check_pairs(text: str, value: Any) -> None:
    """Refuse a value parsed from a text with half a surrogate pair.

    Raises
    ------
    UnicodeEncodeError
    """
    if _HALF_PAIR.search(text):
        json.dumps(value, ensure_ascii=False).encode()


def fault(error: Exception, location: str) -> InputError:
    """Return the error of JSON that Python can't keep as it is."""
    if isinstance(error, RepeatedKeyError):
        return InputError(f"{location} repeats the key `{error}`", "remove or rename one of them")
    if isinstance(error, UnicodeEncodeError):
        return InputError(
            rf"{location} holds `\u{ord(error.object[error.start]):04x}`, an unpaired surrogate",
            r"write both halves, such as `\ud83d\ude42`, or remove it",
        )
    if isinstance(error, RecursionError):
        return InputError(f"{location} is nested too deeply", "remove that part or write it as a string")
    return InputError(  # Python's limit on integer digits
        f"{location} holds an integer of more than {sys.get_int_max_str_digits()} digits", "write it as a string"
    )
