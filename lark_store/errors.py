"""Every exception that lark-store raises on purpose.

    LarkStoreError
    ├── StoreError                  the store itself
    │   ├── NotAStoreError          (FileNotFoundError)
    │   ├── StoreExistsError        (FileExistsError)
    │   ├── OlderSchemaError
    │   ├── NewerSchemaError
    │   └── StoreBusyError          another process holds the work
    ├── NameInvalidError            (ValueError)
    ├── NameUnknownError            (LookupError)
    ├── NameTakenError              (ValueError)
    ├── InputError                  (ValueError) a file, row or option that can't be used
    ├── CheckpointError             a checkpoint that can't be loaded
    │   └── CheckpointChangedError  its files are not those that were added
    ├── NothingToScoreError         (LookupError) sketches that the question needs are missing
    └── QueryError                  (ValueError) SQL that is refused or fails

An error is a fact and, after a blank line, a hint that says what to do.
"""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "CheckpointChangedError",
    "CheckpointError",
    "InputError",
    "LarkStoreError",
    "NameInvalidError",
    "NameTakenError",
    "NameUnknownError",
    "NewerSchemaError",
    "NotAStoreError",
    "NothingToScoreError",
    "OlderSchemaError",
    "QueryError",
    "StoreBusyError",
    "StoreError",
    "StoreExistsError",
]


_LOGIN = re.compile(r"(\b[a-z][a-z0-9+.-]*:/{1,2})[^/\s`'\"@]+(?:@[^/\s`'\"@]*)*@", re.IGNORECASE)
_PARAMETER = re.compile(
    r"([?&;][\w.-]*(?:token|secret|passw(?:or)?d|pwd|signature|credential|api_?key|access_?key)[\w.-]*=)[^&\s`'\"]+",
    re.IGNORECASE,
)
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")


def masked(text: str) -> str:
    """Return a text without the secrets in its URLs: logins, tokens in parameters, Hugging Face tokens.

    >>> masked("no `s3://AKIA:secret@bucket/x`, no `https://h/x?token=abc&a=1`")
    'no `s3://***@bucket/x`, no `https://h/x?token=***&a=1`'
    """
    return _TOKEN.sub("hf_***", _PARAMETER.sub(r"\1***", _LOGIN.sub(r"\1***@", text)))


class LarkStoreError(Exception):
    """Base of all: ``fact`` says what is wrong, ``hint`` what to do about it; neither has a URL's secrets.

    ``is_shared``: of several processes all have this error, so one of them says it.
    """

    is_shared = False

    def __init__(self, fact: str, hint: str | None = None) -> None:
        fact, hint = masked(fact), None if hint is None else masked(hint)
        super().__init__(fact if hint is None else f"{fact}\n\nhint: {hint}")
        self.fact = fact
        self.hint = hint


class StoreError(LarkStoreError):
    """The store can't be opened, made or changed."""


class NotAStoreError(StoreError, FileNotFoundError):
    """There is no lark-store at this path."""


class StoreExistsError(StoreError, FileExistsError):
    """A store was to be made where something is already."""


class OlderSchemaError(StoreError):
    """The store was made by an older lark-store."""


class NewerSchemaError(StoreError):
    """The store was made by a newer lark-store."""


class StoreBusyError(StoreError):
    """Another process is doing this work at the moment."""


class NameInvalidError(LarkStoreError, ValueError):
    """A name that is not a slug."""


class NameUnknownError(LarkStoreError, LookupError):
    """A name that the store does not hold."""

    @classmethod
    def of(cls, kind: str, name: str, known: Iterable[str], how_to_add: str) -> NameUnknownError:
        """Build the error, with the nearest known name as its hint.

        >>> print(NameUnknownError.of("checkpoint", "epoch2", ["base", "epoch-2"], "add it"))
        no checkpoint `epoch2`
        <BLANKLINE>
        hint: did you mean `epoch-2`?
        """
        names = sorted(known)
        near = get_close_matches(name, names, n=1, cutoff=0.5)
        if near:
            hint = f"did you mean `{near[0]}`?"
        elif names:
            shown = ", ".join(f"`{n}`" for n in names[:8])
            hint = f"the store has {shown}" + (", …" if len(names) > 8 else "")
        else:
            hint = f"there is none yet; {how_to_add}"
        return cls(f"no {kind} `{name}`", hint)


class NameTakenError(LarkStoreError, ValueError):
    """A name that stands for something else already."""


class InputError(LarkStoreError, ValueError):
    """A file, a row or an option that can't be used."""


class CheckpointError(LarkStoreError):
    """A checkpoint that can't be loaded."""


class CheckpointChangedError(CheckpointError):
    """A checkpoint's files are not the ones that were added."""


class NothingToScoreError(LarkStoreError, LookupError):
    """The sketches that a question needs are not in the store."""


class QueryError(LarkStoreError, ValueError):
    """SQL that is refused or that fails."""
