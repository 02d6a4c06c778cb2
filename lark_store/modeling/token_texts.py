"""The text of each token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

_INCOMPLETE = "\ufffd"  # a character whose last bytes are in the next token
_LONGEST_CHARACTER = 4  # bytes


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return each token's text, with special tokens; joined, they are the decoded text.

    A character of several tokens belongs to the last of them, and the others are empty.
    """
    texts: list[str] = []
    start = n_before = n_held = 0  # decoded from `start`, whose first `n_before` characters belong to earlier tokens
    for end in range(1, len(ids) + 1):
        whole = _decode(tokenizer, ids[start:end])
        n_held += 1
        if whole.endswith(_INCOMPLETE) and n_held < _LONGEST_CHARACTER and end < len(ids):
            texts.append("")
            continue
        texts.append(whole[n_before:])
        start, n_before, n_held = end - 1, len(_decode(tokenizer, ids[end - 1 : end])), 0
    return texts


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
