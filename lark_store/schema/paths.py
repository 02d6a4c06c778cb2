"""What is at a path; a name that no file can have is nowhere, and no fault."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def exists(path: Path) -> bool:
    """Tell whether there is something at `path`; a name that no file can have is nowhere."""
    try:
        return path.exists()
    except OSError:
        return False


def is_file(path: Path) -> bool:
    """Tell whether there is a file at `path`; a name that no file can have is none."""
    return exists(path) and path.is_file()


def is_folder(path: Path) -> bool:
    """Tell whether there is a folder at `path`; a name that no file can have is none."""
    return exists(path) and path.is_dir()
