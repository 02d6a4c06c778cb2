"""Control characters in texts become visible: `<U+001B>`.

XML forbids them, so an SVG can't hold them; vl-convert aborts the process. An escape with a backslash would not help:
Vega-Lite evaluates those in the titles of axes.
"""

from __future__ import annotations

import re
from typing import Any, TypeVar

import polars as pl

# Besides the characters that XML forbids, those of C1 and DEL, which have no form.
_FORBIDDEN = "\x00-\x08\x0b-\x1f\x7f-\x9f\ufffe\uffff"
_CONTROL = re.compile(f"[{_FORBIDDEN}\ud800-\udfff]")  # a frame has no lone surrogates
T = TypeVar("T")


def visible(text: str) -> str:
    """Return a text with its control characters written as `<U+…>`; line breaks and tabs stay.

    >>> visible("q" + chr(27) + "7")
    'q<U+001B>7'
    """
    return _CONTROL.sub(lambda found: f"<U+{ord(found[0]):04X}>", text)


def readable(frame: pl.DataFrame) -> pl.DataFrame:
    """Return a frame with all texts made `visible`."""
    texts = [name for name, kind in frame.schema.items() if kind == pl.String]
    hurt = [name for name in texts if frame[name].str.contains(f"[{_FORBIDDEN}]").any()]
    return frame.with_columns(pl.col(name).map_elements(visible, return_dtype=pl.String) for name in hurt)


def visible_spec(part: T) -> T:
    """Return a chart's specification with all texts made `visible`."""
    changed: Any = part
    if isinstance(part, str):
        changed = visible(part)
    elif isinstance(part, list):
        changed = [visible_spec(item) for item in part]
    elif isinstance(part, dict):
        changed = {key: visible_spec(value) for key, value in part.items()}
    result: T = changed
    return result
