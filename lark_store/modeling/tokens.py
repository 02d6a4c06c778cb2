"""A rendered sample as tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Tokens:
    """A rendered sample: `input_ids` (T,), `is_target` (T,), the target rule, and the number of tokens cut.

    `answer` is the text of a predicted answer, whose tokens are the targets. `is_content` (T,) marks tokens with
    characters of the sample, not only the template, except the first token, which has no context. Empty: all tokens are
    content.
    """

    input_ids: list[int]
    is_target: list[bool]
    rule: str
    n_cut: int = 0
    is_content: Sequence[bool] = ()
    is_summed: bool = False
    notes: tuple[str, ...] = ()
    answer: str | None = None

    @property
    def n_targets(self) -> int:
        """The number of tokens with a loss."""
        return sum(self.is_target)

    @property
    def targets(self) -> list[int]:
        """The tokens with a loss."""
        return [token for token, is_target in zip(self.input_ids, self.is_target, strict=True) if is_target]
