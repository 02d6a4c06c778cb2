"""A text with its tokens tinted by a value: as HTML, and for a terminal.

Tokens with a value above 0 are red, below 0 blue, in five intensities by their share of the largest value. The HTML has
classes and no styles, so that a page may forbid inline styles; `TOKEN_CSS` is its stylesheet.
"""

from __future__ import annotations

import math
import re
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.text import Text

_N_LEVELS = 5
_FAINTEST = 0.04  # of the largest value; below, a token is plain
_OPACITY = (0.12, 0.24, 0.38, 0.54, 0.72)
_STYLES = ("dim", "", "bold", "reverse", "bold reverse")
_POSITIVE, _NEGATIVE = (214, 39, 40), (31, 119, 180)
# Control characters except line breaks and tabs, marks that change the direction of a text, half characters.
_UNSAFE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def _rules(kind: str, colour: tuple[int, int, int]) -> list[str]:
    rgb = ",".join(map(str, colour))
    return [f".lark-tokens .t-{kind}{n}{{background:rgba({rgb},{a})}}" for n, a in enumerate(_OPACITY, start=1)]


TOKEN_CSS = "\n".join(
    [
        ".lark-tokens{white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.6}",
        ".lark-tokens span{border-radius:2px}",
        ".lark-tokens .t-target{border-bottom:1px solid currentColor}",
        *_rules("p", _POSITIVE),
        *_rules("n", _NEGATIVE),
    ]
)


def levels(values: Sequence[float]) -> list[int]:
    """Return each value's intensity: 1 to 5 above 0, −1 to −5 below, 0 for those near 0 beside the largest.

    >>> levels([0.5, -0.1, 0.0, 0.01])
    [5, -1, 0, 0]
    """
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    return [_level(value / largest) if largest and math.isfinite(value) else 0 for value in values]


def _level(share: float) -> int:
    size = abs(share)
    return 0 if size < _FAINTEST else int(math.copysign(math.ceil(size * _N_LEVELS - 1e-9), share))


def visible(text: str) -> str:
    r"""Return a token's text for people: a line break is marked, other control characters are replaced.

    >>> visible("yes\r\n\x1b[31m")
    'yes�↵\n�[31m'
    """
    return _UNSAFE.sub("�", text).replace("\n", "↵\n")


def cell(text: str) -> str:
    r"""Return a token's text for a table, with visible spaces.

    >>> cell(" yes\n")
    '␣yes↵'
    """
    return visible(text).replace("\n", "").replace(" ", "␣").replace("\t", "⇥")


def tokens_html(texts: Sequence[str], values: Sequence[float], is_target: Sequence[bool] = ()) -> str:
    """Return tokens as HTML, each a `span` of class `t-p1` to `t-p5` or `t-n1` to `t-n5`, with its value as title.

    Everything is escaped. Targets have the class `t-target`.
    """
    marks = is_target or [False] * len(texts)
    spans = []
    for text, value, level, target in zip(texts, values, levels(values), marks, strict=True):
        names = [f"t-{'p' if level > 0 else 'n'}{abs(level)}"] if level else []
        names += ["t-target"] if target else []
        kind = f' class="{" ".join(names)}"' if names else ""
        spans.append(f'<span{kind} title="{value:.4g}">{escape(visible(text))}</span>')
    return f'<div class="lark-tokens">{"".join(spans)}</div>'


def tokens_text(texts: Sequence[str], values: Sequence[float]) -> Text:
    """Return tokens for a terminal, with backgrounds where it has colours."""
    from rich.style import Style
    from rich.text import Text

    drawn = Text()
    for text, level in zip(texts, levels(values), strict=True):
        drawn.append(visible(text).expandtabs(4), style=_style(level) if level else Style.null())
    return drawn


def _style(level: int) -> str:
    """Return a style of the terminal's own red or blue, readable on light and dark."""
    return f"{_STYLES[abs(level) - 1]} {'red' if level > 0 else 'blue'}".strip()
