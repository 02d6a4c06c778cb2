"""Hashes of sample contents, files and records."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path


def content_hash(*parts: str | None) -> str:
    """Return the SHA-256 of texts; None differs from an empty text."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).hexdigest()


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def sealed(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record with the hash of its content, for `is_whole`."""
    return record | {_SEAL: _record_hash(record)}


def is_whole(record: dict[str, Any]) -> bool:
    """Tell whether a record matches its hash; records of older versions have none and pass."""
    return bool(record.get(_SEAL, _record_hash(record)) == _record_hash(record))


_SEAL = "sha256"


def _record_hash(record: dict[str, Any]) -> str:
    content = {name: value for name, value in record.items() if name != _SEAL}
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
