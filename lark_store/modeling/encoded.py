"""A rendered text as tokens, and which tokens its parts cover.

Shape letters: T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lark_store.modeling.parts import Span


class UnusableSampleError(Exception):
    """A sample can't be sketched; the message is the recorded reason."""


@dataclass(frozen=True)
class Encoded:
    """The tokens of a text: `ids` (T,) and their `offsets` (T,) in characters."""

    ids: list[int]
    offsets: list[tuple[int, int]]
    notes: tuple[str, ...] = ()

    def covered(self, spans: Sequence[Span]) -> list[bool]:
        """Tell which tokens have characters of the spans, (T,)."""
        covered = [False] * len(self.ids)
        for span in spans:
            for number, (start, end) in enumerate(self.offsets):
                if start < span.end and end > span.start and end > start:
                    covered[number] = True
        return covered

    def without_end(self) -> Encoded:
        """Return the tokens without those after the text, such as an end of text that the tokenizer appends."""
        n = len(self.ids)
        while n and self.offsets[n - 1][0] == self.offsets[n - 1][1]:
            n -= 1
        return Encoded(self.ids[:n], self.offsets[:n], self.notes)

    def with_ends(
        self, targets: list[bool], answers: Sequence[Span], spans: Sequence[Span], special: set[int]
    ) -> list[bool]:
        """Return the targets with each turn's end: all tokens up to the first of `special` after the turn.

        Raises
        ------
        UnusableSampleError
            No special token follows a turn.
        """
        extended = list(targets)
        for turn in {span.part.turn for span in answers}:
            end = max(span.end for span in answers if span.part.turn == turn)
            limit = min((span.start for span in spans if span.start >= end), default=float("inf"))
            after = [n for n, (start, _) in enumerate(self.offsets) if end <= start < limit]
            mark = next((n for n in after if self.ids[n] in special), None)
            if mark is None:
                raise UnusableSampleError("no end-of-turn token follows an assistant turn; use a rule without `+end`")
            for n in after:
                extended[n] = extended[n] or n <= mark
        return extended

    def generated(self, mask: Sequence[int], answers: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
        """Return the tokens that a chat template marks as generated (`mask`, (T,)), without turns not chosen.

        Raises
        ------
        UnusableSampleError
            The mask belongs to other tokens.
        """
        if len(mask) != len(self.ids):
            raise UnusableSampleError("the template's generation marks belong to another text")
        excluded = self.covered([span for span in spans if span not in answers])
        chosen = self.covered(answers)
        targets = [False] * len(self.ids)
        for is_marked, run in groupby(range(len(self.ids)), key=lambda n: bool(mask[n])):
            tokens = list(run)
            if is_marked and (any(chosen[n] for n in tokens) or not any(excluded[n] for n in tokens)):
                for n in tokens:
                    targets[n] = True
        return targets


def encode(tokenizer: Any, text: str, *, add_special_tokens: bool) -> Encoded:
    """Tokenize a text. A beginning-of-text token of the tokenizer is left out where the text has its own."""
    coded = tokenizer(
        text,
        add_special_tokens=add_special_tokens,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    ids, offsets = list(coded["input_ids"]), list(coded["offset_mapping"])
    notes: tuple[str, ...] = ()
    first = tokenizer.bos_token_id
    if add_special_tokens and first is not None and ids[:2] == [first, first]:
        ids, offsets = ids[1:], offsets[1:]
        notes = (f"the text begins with `{tokenizer.bos_token}`, so the tokenizer's own is left out",)
    return Encoded(ids, offsets, notes)


def special_ids(tokenizer: Any) -> set[int]:
    """Return the ids of a tokenizer's special tokens, such as ends of turns."""
    added = tokenizer.added_tokens_decoder.items()
    return {*tokenizer.all_special_ids, *(number for number, token in added if token.special)}


def chosen_answers(spans: Sequence[Span], rule: str) -> list[Span]:
    """Return the parts which a target rule chooses."""
    answers = [span for span in spans if span.part.is_answer]
    if rule.startswith("last"):
        last = max((span.part.turn for span in answers), default=0)
        return [span for span in answers if span.part.turn == last]
    return answers
