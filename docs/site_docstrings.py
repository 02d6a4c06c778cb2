"""An extension of griffe: examples in docstrings (`>>>`) become code blocks."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

_STEP = r"^[ \t]*>>> .*\n?(?:^[ \t]*\S.*\n?)*"
_EXAMPLE = re.compile(rf"{_STEP}(?:\n?{_STEP})*", re.MULTILINE)


class DocstringExamples(Extension):
    """Fence the examples of every docstring, and leave out doctest's directives."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring:
            obj.docstring.value = fenced(obj.docstring.value)


def fenced(text: str) -> str:
    """Return a docstring with its examples as code blocks."""

    def fence(match: re.Match[str]) -> str:
        example = re.sub(r"  # doctest:.*", "", match[0]).rstrip()
        return f"```pycon\n{example}\n```\n"

    return _EXAMPLE.sub(fence, text).rstrip()
