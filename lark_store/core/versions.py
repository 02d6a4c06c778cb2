"""Versions of the software, for the recipes of runs."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any


def versions() -> dict[str, Any]:
    """Return the versions of Python and the libraries that affect results."""
    names = ("lark-store", "torch", "transformers", "tokenizers", "lancedb")
    return {"python": platform.python_version()} | {name: version(name) for name in names}
