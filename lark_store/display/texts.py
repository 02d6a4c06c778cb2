"""Fit texts into cells: break lines between words, shorten, and start where texts differ."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from rich.cells import cell_len

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_ELLIPSIS = "…"
_LONGEST_END = 14  # of the end of a shortened text, which has the response
_LONGEST_WORD = 20  # where there is no space, a text is cut anywhere
_SAME_START = 24  # texts that share these first characters have one beginning, such as a prompt's template


def starts(texts: Sequence[str]) -> list[int]:
    """Return where each text begins to differ from the texts with the same beginning; 0 if there are none.

    >>> starts(["Answer yes or no. Question: is it red?", "Answer yes or no. Question: was it?", "A song"])
    [28, 28, 0]
    """
    groups: dict[str, set[str]] = defaultdict(set)
    for text in texts:
        groups[text[:_SAME_START]].add(text)
    shared = {key: _shared_start(group) for key, group in groups.items() if len(group) > 1}
    return [shared.get(text[:_SAME_START], 0) if len(text) > _SAME_START else 0 for text in texts]


def _shared_start(texts: set[str]) -> int:
    """Return the number of characters that all texts begin with, up to the last space."""
    first, last = min(texts), max(texts)
    n = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    space = first.rfind(" ", 0, n)
    return space + 1 if space >= n - _LONGEST_WORD else n


def lines(text: str, width: int) -> list[str]:
    """Break a text into lines between words; a longer word keeps a line of its own.

    >>> lines("one two three", 7)
    ['one two', 'three']
    """
    done: list[str] = []
    for word in _words(text, width):
        if done and cell_len(done[-1]) + 1 + cell_len(word) <= width:
            done[-1] += f" {word}"
        else:
            done.append(word)
    return done or [""]


def _words(text: str, width: int) -> Iterable[str]:
    """Yield words; a long one of a script without spaces is divided."""
    for word in text.split():
        if cell_len(word) <= width or cell_len(word) == len(word):
            yield word
            continue
        part = ""
        for character in word:
            if part and cell_len(part + character) > width:
                yield part
                part = ""
            part += character
        yield part


def shortened(text: str, width: int, n_lines: int = 1, start: int = 0) -> list[str]:
    """Fit a text into `n_lines` lines, from `start` if it is too long, keeping whole words and the end.

    >>> shortened("Question: is the house at the end of the road red? yes", 32)
    ['Question: is the … road red? yes']
    >>> shortened("The house is blue and the road is long", 20, start=13)
    ['… blue and the …']
    >>> shortened("/home/lab/models/epoch-2", 14), shortened("d15dad2430ae4f5e", 8)
    (['…odels/epoch-2'], ['d15dad2…'])
    """
    room = width * n_lines
    if cell_len(text) <= room:
        whole = lines(text, width)
        if len(whole) <= n_lines and all(cell_len(line) <= width for line in whole):
            return whole
    if " " not in text and cell_len(text) == len(text):
        return [_fitted_word(text, width)]
    text = _from(text, start, room)
    end = _last_words(text) if room >= 2 * _LONGEST_END else ""
    beginning = text[: len(text) - len(end)] if cell_len(text) <= room else text[:room]
    words = [_fitted_word(word, width) for word in _words(beginning, width)]
    if cell_len(text) <= room and len(whole := lines(" ".join([*words, end]), width)) <= n_lines:
        return whole
    return _filled(words, f"{_ELLIPSIS} {end}".strip(), width, n_lines)


def _last_words(text: str) -> str:
    """Return the last words of a text, as many as are not long."""
    end = text[-_LONGEST_END - 1 :]
    words = end.split(" ")[1:]
    while words and cell_len(" ".join(words)) > _LONGEST_END:
        words.pop(0)
    return " ".join(words)


def _filled(words: Sequence[str], end: str, width: int, n_lines: int) -> list[str]:
    """Return lines of the first words and the end, as many words as leave room for it."""
    done = [words[0]]
    for word in words[1:]:
        is_same_line = cell_len(done[-1]) + 1 + cell_len(word) <= width
        line = f"{done[-1]} {word}" if is_same_line else word
        n = len(done) + (not is_same_line)
        if n > n_lines or (n == n_lines and cell_len(line) + 1 + cell_len(end) > width):
            break
        done = [*done[:-1], line] if is_same_line else [*done, line]
    if done[-1].endswith(_ELLIPSIS) and end == _ELLIPSIS:
        return done
    if cell_len(done[-1]) + 1 + cell_len(end) <= width:
        return [*done[:-1], f"{done[-1]} {end}"]
    return [*done, end] if len(done) < n_lines else done


def _from(text: str, start: int, room: int) -> str:
    """Return a text from a word on; earlier if its rest would not fill the room."""
    start = min(start, max(0, len(text) - room))
    if start:
        space = text.find(" ", start - 1, start + _LONGEST_WORD)
        return f"{_ELLIPSIS}{text[start:]}" if space < 0 else f"{_ELLIPSIS} {text[space + 1 :]}"
    return text


def _fitted_word(word: str, width: int) -> str:
    """Shorten a word that is longer than a line: a path keeps its end, another word its beginning."""
    if cell_len(word) <= width or cell_len(word) != len(word):
        return word
    return f"{_ELLIPSIS}{word[1 - width :]}" if "/" in word else f"{word[: width - 1]}{_ELLIPSIS}"
