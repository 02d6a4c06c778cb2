"""The interface of a baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from lark_store.evaluate.baselines.context import BaselineContext, Matrix
    from lark_store.evaluate.dataset import Material


@dataclass(frozen=True)
class Baseline:
    """A baseline: `scores` returns a matrix (Q, N), higher = more helpful.

    `check` raises if the name's settings are invalid, before any computation. `is_slow`: scores are cached on disk.
    `is_across`: samples and queries may be at two checkpoints, as in `repsim@base>epoch-3`.
    """

    meaning: str
    scores: Callable[[Material, BaselineContext], Matrix]
    check: Callable[[Material, BaselineContext], object]
    is_slow: bool = False
    is_across: bool = False
