"""The hash that tells whether a sample's content is what it was."""

from __future__ import annotations

import hashlib
import json


def content_hash(*parts: str | None) -> str:
    """Return the SHA-256 of some texts, None and empty told apart."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).hexdigest()
