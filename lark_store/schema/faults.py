"""Translate faults of the machine (a full disk, no permission, a damaged file) into errors of lark-store.

SQLite, Lance, Arrow and polars raise different types for the same fault, but share the system's message.
Damaged files are recognised by the origin of the error: Lance, Arrow or DuckDB while reading the store's tables.
"""

from __future__ import annotations

import errno
import re
from typing import TYPE_CHECKING

from sqlalchemy.exc import DBAPIError

from lark_store.errors import LarkStoreError, StoreBusyError, StoreError, masked

if TYPE_CHECKING:
    from collections.abc import Iterator

_FULL = re.compile(
    r"no space left on device|storagefull|(database or )?disk is full|disk quota exceeded", re.IGNORECASE
)
# Must not match DuckDB's "Permission Error" for forbidden SQL.
_DENIED = re.compile(
    r"permission ?denied|operation not permitted|read-only file ?system|readonly database|unable to open database file",
    re.IGNORECASE,
)
_LOCKED = re.compile(r"database (table )?is locked", re.IGNORECASE)
_DAMAGED = re.compile(r"database disk image is malformed|file is not a database", re.IGNORECASE)
_SERVER = re.compile(
    r"server closed the connection|terminating connection|remaining connection slots|the database system is"
    r"|connection (failed|is lost|is closed|refused|timed out|to server)|could not translate host",
    re.IGNORECASE,
)
_BUCKET = re.compile(
    r'generic (s3|gcs|microsoftazure) error|store: "(s3|gcs|microsoftazure)"|failed to get aws cred', re.IGNORECASE
)
_BUCKET_REASONS = {
    r"nosuchbucket": "there is no such bucket",
    r"credential|accessdenied|access denied|invalidaccesskey|signaturedoesnotmatch|forbidden|unauthorized"
    r"|status(?: code)?:? 40[13]\b": ("the keys are missing or wrong"),
    r"connect|sending request|timed? ?out|dns": "the server does not respond",
}
_OPEN = re.compile(r"too many open files", re.IGNORECASE)
_LANCE = re.compile(r"lance ?error|lance[- ]file|lancedb|reading the stream registered as", re.IGNORECASE)
_CONFLICT = re.compile(r"conflict", re.IGNORECASE)
_READERS = ("lance", "lancedb", "pyarrow")  # packages that read table files
_RUST_SOURCE = re.compile(r",? */[^\s,]+\.rs(:\d+)*")
FAULTS = (OSError, RuntimeError, ValueError)  # raised by Lance for unreadable files
CHECK_HINT = "`lark-store db check` lists the damage; `lark-store db repair` fixes what can be recomputed"
_RESUME = "committed work is saved; run the command again to resume"


def fault_of(error: BaseException) -> LarkStoreError | None:
    """Return the LarkStoreError for a machine fault or damaged file behind an error, else None."""
    return machine_fault_of(error) or damage_of(error)


def machine_fault_of(error: BaseException) -> LarkStoreError | None:
    """Return the LarkStoreError for a machine fault behind an error, else None.

    >>> print(machine_fault_of(OSError(28, "No space left on device", "/data/lark.store")))
    no space left on the disk: `/data/lark.store` can't be written
    <BLANKLINE>
    hint: free disk space; committed work is saved; run the command again to resume
    """
    if isinstance(error, LarkStoreError):
        return error
    for cause in _chain(error):
        fault = _server_fault(cause) or _fault(cause)
        if fault is not None:
            return fault
    return None


def damage_of(error: BaseException) -> StoreError | None:
    """Return the StoreError for an unreadable file, None if the error is not from a library that reads tables."""
    if not any(_is_unreadable(cause) for cause in _chain(error)):
        return None
    return StoreError(f"the store can't be read: {first_line(error)}", CHECK_HINT)


def is_panic(error: BaseException) -> bool:
    """Tell whether a Rust library panicked; the error is not an `Exception`."""
    return type(error).__name__ == "PanicException"


def _is_unreadable(error: BaseException) -> bool:
    """Tell whether an error comes from a library that reads table files and is not a commit conflict."""
    if is_panic(error):
        return True
    if not isinstance(error, Exception) or _CONFLICT.search(str(error)):
        return False
    return _LANCE.search(str(error)) is not None or (
        isinstance(error, OSError | RuntimeError | ValueError) and _origin(error) in _READERS
    )


def _origin(error: BaseException) -> str | None:
    """Return the package that raised an error."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return None if trace is None else str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0]


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, without Rust source locations."""
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return _RUST_SOURCE.sub("", line)[:200]


def failure_reason(error: BaseException) -> str:
    """Return the reason of a failed run for its record: one line, without secrets."""
    fault = fault_of(error)
    return fault.fact if fault else masked(f"{type(error).__name__}: {error}")


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and its causes."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _fault(error: BaseException) -> LarkStoreError | None:
    text = str(error)
    number = error.errno if isinstance(error, OSError) else None
    path = error.filename if isinstance(error, OSError) else None
    if number in {errno.ENOSPC, errno.EDQUOT} or _FULL.search(text):
        detail = f": `{path}` can't be written" if path else ""
        return StoreError(f"no space left on the disk{detail}", f"free disk space; {_RESUME}")
    if number in {errno.EACCES, errno.EPERM, errno.EROFS} or _DENIED.search(text):
        file = f"`{path}`" if path else "a file of the store"
        return StoreError(
            f"{file} can't be read or written: permission denied",
            "check the owner of the folder, and whether the disk is read-only",
        )
    if number in {errno.EMFILE, errno.ENFILE} or _OPEN.search(text):
        return StoreError("this process has too many open files", f"raise the limit with `ulimit -n 4096`; {_RESUME}")
    if _LOCKED.search(text):
        return StoreBusyError("the catalog is locked by other processes", "run the command again")
    if _DAMAGED.search(text):
        return StoreError("the catalog is damaged: it is not an intact SQLite file", "restore the store from a backup")
    return None


def _server_fault(error: BaseException) -> LarkStoreError | None:
    """Return the fault of a bucket or of PostgreSQL."""
    text = str(error)
    if _BUCKET.search(text):
        reasons = (reason for pattern, reason in _BUCKET_REASONS.items() if re.search(pattern, text, re.IGNORECASE))
        reason = next(reasons, " ".join(text.split())[:200])
        return StoreError(
            f"the bucket of the vectors can't be used: {reason}",
            f"check AWS_ENDPOINT_URL, AWS_REGION and the keys (docs/deploy.md); {_RESUME}",
        )
    if isinstance(error, DBAPIError) and _SERVER.search(text):
        reason = " ".join(str(error.orig).split())
        return StoreError(f"the catalog can't be reached: {reason}", f"is PostgreSQL running? {_RESUME}")
    return None
