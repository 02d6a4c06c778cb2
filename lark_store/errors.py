"""Exceptions of lark-store.

    LarkStoreError
    ├── StoreError                  the store itself
    │   ├── NotAStoreError          (FileNotFoundError)
    │   ├── StoreExistsError        (FileExistsError)
    │   ├── OlderSchemaError
    │   ├── NewerSchemaError
    │   └── StoreBusyError          another process is doing this work
    ├── NameInvalidError            (ValueError)
    ├── NameUnknownError            (LookupError)
    ├── NameTakenError              (ValueError)
    ├── InputError                  (ValueError) an invalid file, row or option
    ├── CheckpointError             a checkpoint that can't be loaded
    │   └── CheckpointChangedError  its files changed after it was added
    ├── NothingToScoreError         (LookupError) required sketches are missing
    └── QueryError                  (ValueError) refused or failed SQL

The message is a fact and, after a blank line, a hint with an action.
"""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

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
    """Mask secrets in a text: logins and tokens in URLs, and Hugging Face tokens.

    >>> masked("no `s3://AKIA:secret@bucket/x`, no `https://h/x?token=abc&a=1`")
    'no `s3://***@bucket/x`, no `https://h/x?token=***&a=1`'
    """
    return _TOKEN.sub("hf_***", _PARAMETER.sub(r"\1***", _LOGIN.sub(r"\1***@", text)))


class LarkStoreError(Exception):
    """Base class. ``fact`` states the problem, ``hint`` the solution; secrets in URLs are masked.

    Messages are written for the command line, and ``command_line`` keeps this form. ``respell`` converts the error once
    to another form. ``is_shared``: all processes of a group raise this error, so only one prints it.
    """

    is_shared = False

    def __init__(self, fact: str, hint: str | None = None) -> None:
        self.fact = masked(fact)
        self.hint = None if hint is None else masked(hint)
        self.command_line = self._joined()
        self.is_respelled = False
        super().__init__(self.command_line)

    def _joined(self) -> str:
        return self.fact if self.hint is None else f"{self.fact}\n\nhint: {self.hint}"

    def respell(self, spelling: Callable[[str], str], *, everywhere: bool = False) -> None:
        """Convert fact and hint to another spelling, once. `everywhere`: change `command_line` too; not counted."""
        if not self.is_respelled:
            self.fact = spelling(self.fact)
            self.hint = None if self.hint is None else spelling(self.hint)
            self.args = (self._joined(),)
            if everywhere:
                self.command_line = self._joined()
            else:
                self.is_respelled = True


class StoreError(LarkStoreError):
    """The store can't be opened, created or changed."""


class NotAStoreError(StoreError, FileNotFoundError):
    """There is no lark-store at this path."""


class StoreExistsError(StoreError, FileExistsError):
    """The location of a new store is not empty."""


class OlderSchemaError(StoreError):
    """The store has an older schema."""


class NewerSchemaError(StoreError):
    """The store has a newer schema."""


class StoreBusyError(StoreError):
    """Another process is doing this work."""


class NameInvalidError(LarkStoreError, ValueError):
    """The name is not a slug."""


class NameUnknownError(LarkStoreError, LookupError):
    """The name is not in the store."""

    @classmethod
    def of(cls, kind: str, name: str, known: Iterable[str], how_to_add: str, n: int = 1) -> NameUnknownError:
        """Return the error, with the nearest known name (at most `n`) as its hint.

        >>> print(NameUnknownError.of("checkpoint", "epoch2", ["base", "epoch-2"], "add it"))
        no checkpoint `epoch2`
        <BLANKLINE>
        hint: did you mean `epoch-2`?
        """
        names = sorted(known)
        near = [f"`{name}`" for name in get_close_matches(name, names, n=n, cutoff=0.5)]
        if near:
            hint = f"did you mean {' or '.join(part for part in (', '.join(near[:-1]), near[-1]) if part)}?"
        elif names:
            examples = ", ".join(f"`{n}`" for n in names[:8])
            hint = f"the store has {examples}" + (", …" if len(names) > 8 else "")
        else:
            hint = f"there is none yet; {how_to_add}"
        return cls(f"no {kind} `{name}`", hint)


class NameTakenError(LarkStoreError, ValueError):
    """The name is in use for something else."""


class InputError(LarkStoreError, ValueError):
    """A file, row or option is invalid."""


class CheckpointError(LarkStoreError):
    """The checkpoint can't be loaded."""


class CheckpointChangedError(CheckpointError):
    """The checkpoint's files changed after it was added."""


class NothingToScoreError(LarkStoreError, LookupError):
    """The required sketches are missing."""


class QueryError(LarkStoreError, ValueError):
    """The SQL was refused or failed."""
