"""Faults of the machine (a full disk, no permission, a catalog that is held) as errors of ours.

SQLite, Lance, Arrow and polars each raise a kind of their own for one fault; what they share is the system's words.
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
# DuckDB's own "Permission Error", of what SQL may not do, is another thing.
_DENIED = re.compile(
    r"permission ?denied|operation not permitted|read-only file ?system|readonly database|unable to open database file",
    re.IGNORECASE,
)
_HELD = re.compile(r"database (table )?is locked", re.IGNORECASE)
_DAMAGED = re.compile(r"database disk image is malformed|file is not a database", re.IGNORECASE)
_SERVER = re.compile(
    r"server closed the connection|terminating connection|remaining connection slots|the database system is"
    r"|connection (failed|is lost|is closed|refused|timed out|to server)|could not translate host",
    re.IGNORECASE,
)
_BUCKET = re.compile(
    r'generic (s3|gcs|microsoftazure) error|store: "(s3|gcs|microsoftazure)"|failed to get aws cred', re.IGNORECASE
)
_BUCKET_SAYS = {
    r"nosuchbucket": "there is no such bucket",
    r"credential|accessdenied|access denied|invalidaccesskey|signaturedoesnotmatch|forbidden|\b40[13]\b": (
        "the keys are missing or wrong"
    ),
    r"connect|sending request|timed? ?out|dns": "the server does not answer",
}
_OPEN = re.compile(r"too many open files", re.IGNORECASE)
_AFTER = "what was committed is kept; run the command again to go on"


def fault_of(error: BaseException) -> LarkStoreError | None:
    """Return the machine's fault behind an error as one of ours, None if there is none known.

    >>> print(fault_of(OSError(28, "No space left on device", "/data/lark.store")))
    there is no space left on the disk: `/data/lark.store` can't be written
    <BLANKLINE>
    hint: make room; what was committed is kept; run the command again to go on
    """
    if isinstance(error, LarkStoreError):
        return error
    for one in _chain(error):
        found = _fault_of_server(one) or _fault(one)
        if found is not None:
            return found
    return None


def reason_of(error: BaseException) -> str:
    """Return why a run failed, as it is recorded: in one line, without secrets."""
    known = fault_of(error)
    return known.fact if known else masked(f"{type(error).__name__}: {error}")


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what it was raised from."""
    at: BaseException | None = error
    while at is not None:
        yield at
        at = at.__cause__


def _fault(error: BaseException) -> LarkStoreError | None:
    text = str(error)
    number = error.errno if isinstance(error, OSError) else None
    where = error.filename if isinstance(error, OSError) else None
    if number in {errno.ENOSPC, errno.EDQUOT} or _FULL.search(text):
        what = f": `{where}` can't be written" if where else ""
        return StoreError(f"there is no space left on the disk{what}", f"make room; {_AFTER}")
    if number in {errno.EACCES, errno.EPERM, errno.EROFS} or _DENIED.search(text):
        what = f"`{where}`" if where else "a file of the store"
        return StoreError(
            f"{what} can't be read or written: permission denied",
            "check who owns the folder, and whether the disk is read-only",
        )
    if number in {errno.EMFILE, errno.ENFILE} or _OPEN.search(text):
        return StoreError("this process may not open more files", f"raise the limit with `ulimit -n 4096`; {_AFTER}")
    if _HELD.search(text):
        return StoreBusyError("other processes hold the catalog for too long", "run the command again")
    if _DAMAGED.search(text):
        return StoreError(
            "the catalog is damaged: it is no whole SQLite file any more", "restore the store from a backup"
        )
    return None


def _fault_of_server(error: BaseException) -> LarkStoreError | None:
    """Return what is wrong with a bucket, or with PostgreSQL."""
    text = str(error)
    if _BUCKET.search(text):
        why = (said for pattern, said in _BUCKET_SAYS.items() if re.search(pattern, text, re.IGNORECASE))
        what = next(why, " ".join(text.split())[:200])
        return StoreError(
            f"the bucket of the vectors can't be used: {what}",
            f"check AWS_ENDPOINT_URL, AWS_REGION and the keys (docs/deploy.md); {_AFTER}",
        )
    if isinstance(error, DBAPIError) and _SERVER.search(text):
        said = " ".join(str(error.orig).split())
        return StoreError(f"the catalog can't be reached: {said}", f"is PostgreSQL running? {_AFTER}")
    return None
