"""Invented words, from a list of syllables: independent of any tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random

_FIRST = (
    "ba bel bli bor bru dal dor dri fal fen flo gam gor gri hal jor kal kem kli lan lor mar mel mor nal nim pel plo "
    "quo ral rin sel ska sul tam tor tri val ven vor wil yor zan zel"
)
_LATER = (
    "bo bra da deg du fa fim ga gle go ka kor lu ma mek mi na nop nu pa pex ra rif ro sa sim so ta tev tu va vik vo "
    "wa xi ya zo zu"
)
FIRST, LATER = _FIRST.split(), _LATER.split()
SYLLABLES = (2, 5)


def invented_words(rng: random.Random, n: int) -> list[str]:
    """Return `n` distinct words of 2 to 5 syllables.

    >>> import random
    >>> invented_words(random.Random(0), 3)
    ['nimtevmigopa', 'grizomawa', 'vorkatev']
    """
    words: list[str] = []
    while len(words) < n:
        later = rng.choices(LATER, k=rng.randint(*SYLLABLES) - 1)
        word = "".join([rng.choice(FIRST), *later])
        if word not in words:
            words.append(word)
    return words
