"""`none`: no test."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lark_store.query.nulls.base import Null

if TYPE_CHECKING:
    from lark_store.query.nulls.base import TestedScores


class NoNull(Null):
    """No p-values."""

    name = "none"
    meaning = "no p-values"

    def p_values(self, scores: TestedScores) -> None:  # noqa: ARG002
        """Return None."""
        return
