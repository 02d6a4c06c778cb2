"""Options of a sketcher that can be checked before there is a model: loads no torch, so that `init` is quick."""

from __future__ import annotations

import re

from lark_store.errors import InputError

MAP_VERSION = 1
SMALLEST_K, LARGEST_K = 256, 1_048_576


def check_k(k: int) -> int:
    """Return `k` if valid: a power of two from 256 to 1,048,576."""
    if SMALLEST_K <= k <= LARGEST_K and k & (k - 1) == 0:
        return k
    raise InputError(f"k = {k} is not a power of two from {SMALLEST_K} to {LARGEST_K}", "the paper's k is 65536")


def compile_pattern(pattern: str | None) -> re.Pattern[str] | None:
    """Compile a parameter expression; it may match anywhere in a parameter's name."""
    try:
        return None if pattern is None else re.compile(pattern)
    except re.error as error:
        raise InputError(
            f"`{pattern}` is not a regular expression: {error}", r"try for example 'model\.layers\.2[4-9]\.'"
        ) from error
