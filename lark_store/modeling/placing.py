"""Run a template on a sample and find each part of the sample in its output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lark_store.modeling.encoded import UnusableSampleError
from lark_store.modeling.parts import (
    ChatParts,
    Part,
    Span,
    find_spans,
    inserted,
    mark,
    search_spans,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lark_store.modeling.parts import Layout

    Run = Callable[[dict[str, Any]], str]

_MAX_TEMPLATE = 1 << 20  # maximum characters of the template itself, which are never cut


@dataclass(frozen=True)
class Rendered:
    """A rendered sample: its text, the places of its parts, the names of omitted parts, the template's variables."""

    text: str
    spans: list[Span]
    omitted: tuple[str, ...]
    variables: dict[str, Any]


@dataclass(frozen=True)
class _Template:
    """A template to `run`; `left_out` makes the error of a part that it omits; `as_lists` is the form of contents."""

    run: Run
    left_out: Callable[[str], UnusableSampleError]
    as_lists: bool = False


def place_parts(layout: Layout, run: Run, left_out: Callable[[str], UnusableSampleError], *, lists: bool) -> Rendered:
    """Run a template and find the parts of a sample.

    With `lists`, contents may be lists of text parts, if text alone is lost.

    Raises
    ------
    UnusableSampleError
        The template fails, or omits, repeats or rewrites a part.
    """
    try:
        return _place(layout, _Template(run, left_out))
    except UnusableSampleError as error:
        if not isinstance(layout, ChatParts) or not lists:
            raise
        try:
            return _place(layout, _Template(run, left_out, as_lists=True))
        except UnusableSampleError:
            raise error from None


def _place(layout: Layout, template: _Template) -> Rendered:
    """Run the template with marks and with texts, and compare."""
    parts = layout.parts
    marks = [mark(number, part.text) for number, part in enumerate(parts)]
    skeleton = template.run(layout.variables(marks, as_lists=template.as_lists))
    n_own = len(skeleton) - sum(map(len, marks))
    if n_own > _MAX_TEMPLATE:
        raise UnusableSampleError(f"the template alone makes {n_own:,} characters")
    for part, place in zip(parts, marks, strict=True):
        if skeleton.count(place) > 1:
            raise UnusableSampleError(
                f"the template prints `{part.name}` {skeleton.count(place)} times; targets need it exactly once"
            )
    variables = layout.variables([part.text for part in parts], as_lists=template.as_lists)
    rendered = template.run(variables)
    missing = next((p for p, m in zip(parts, marks, strict=True) if m not in skeleton and not p.is_optional), None)
    spans = None if missing else find_spans(parts, marks, skeleton, rendered)
    if spans is None:
        spans = _search(layout, rendered, missing, template)
    if isinstance(layout, ChatParts):
        spans = [*spans, *_tool_calls(layout, rendered, spans, template)]
    placed = {span.part.name for span in spans}
    omitted = tuple(part.name for part in parts if part.name not in placed and part.text.strip())
    if "tools" in variables and rendered == template.run({k: v for k, v in variables.items() if k != "tools"}):
        omitted = (*omitted, "tools")
    return Rendered(rendered, spans, omitted, variables)


def _search(layout: Layout, rendered: str, missing: Part | None, template: _Template) -> list[Span]:
    """Find the parts of a chat by their texts, where the template treats marks in another way."""
    lost = next((p for p in layout.parts if p.text.strip() not in rendered and not p.is_optional), missing)
    spans = search_spans(layout.parts, rendered) if isinstance(layout, ChatParts) else None
    if spans is not None:
        return spans
    if lost:
        raise template.left_out(lost.name)
    raise UnusableSampleError("the template rewrites the sample's text, so its targets are unknown")


def _tool_calls(layout: ChatParts, rendered: str, spans: list[Span], template: _Template) -> Iterator[Span]:
    """Yield the places of tool calls: the text which is missing without them."""
    texts = [part.text for part in layout.parts]
    for turn in layout.tool_turns:
        name = f"tool calls of message {turn + 1}"
        without = template.run(layout.variables(texts, as_lists=template.as_lists, without_calls=turn))
        if rendered == without:
            raise template.left_out(name)
        place = inserted(rendered, without)
        others = (span for span in spans if span.part.turn != turn)
        if place is None or any(span.start < place[1] and span.end > place[0] for span in others):
            raise UnusableSampleError(f"the {name} are not one piece of the rendering, so the targets are unknown")
        is_answer = layout.messages[turn].get("weight") != 0
        yield Span(Part(name, rendered[slice(*place)], turn, is_answer=is_answer, is_fixed=True), *place)
