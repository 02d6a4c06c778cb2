"""Two rendered samples in one context: the loss of the second after the first.

Shape letters: T tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lark_store.modeling.tokens import Tokens

if TYPE_CHECKING:
    from collections.abc import Sequence


def joined(first: Tokens, second: Tokens, separator: Sequence[int] = (), bos: int | None = None) -> Tokens:
    """Return the tokens of `first`, `separator` and `second`, (T,); the targets are those of `second` alone.

    A token `bos` at the start of both is left out in the middle. The targets stay the same tokens: the first token of
    `second`, which has no context on its own, is none here either.

    >>> a, b = Tokens([1, 5, 6], [False, True, True], "text"), Tokens([1, 7], [False, True], "text")
    >>> both = joined(a, b, separator=[9], bos=1)
    >>> both.input_ids, both.is_target
    ([1, 5, 6, 9, 7], [False, False, False, False, True])
    """
    n_left_out = int(bos is not None and first.input_ids[:1] == second.input_ids[:1] == [bos])
    ids, is_target = second.input_ids[n_left_out:], second.is_target[n_left_out:]
    before = [*first.input_ids, *separator]
    return Tokens([*before, *ids], [False] * len(before) + is_target, second.rule, is_summed=second.is_summed)


def separator_of(template: str, tokenizer: Any) -> list[int]:
    """Return the tokens between two samples: a line break in the template `raw`; other templates end their own texts.

    >>> separator_of("chatml", None)
    []
    """
    return list(tokenizer("\n", add_special_tokens=False)["input_ids"]) if template == "raw" else []
