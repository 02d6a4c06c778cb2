"""What the second process can be asked: functions of the open store, by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lark_store.results import NewText

if TYPE_CHECKING:
    from collections.abc import Callable

    from lark_store.results import Hits
    from lark_store.store import Store


@dataclass(frozen=True)
class Answer:
    """The hits of a new question, and the model's own answer, if the model was asked for it."""

    proponents: Hits
    opponents: Hits
    said: str | None


def ask(store: Store, *, prompt: str, response: str | None, **search: Any) -> Answer:
    """Rank the samples for a new prompt and response; without a response, for the answer of the model itself."""
    if response is not None:
        new = NewText(prompt=prompt, response=response)
        both = [store.top(new=new, **search, opponents=opponents) for opponents in (False, True)]
        return Answer(both[0], both[1], None)
    traces = [store.trace(prompt, **search, opponents=opponents) for opponents in (False, True)]
    return Answer(traces[0].hits, traces[1].hits, traces[0].said)


def explain(store: Store, *, query: str, sample: str, **options: Any) -> Any:
    """Return the influence of each token of a sample on a query."""
    return store.explain(query, sample, **options)


QUESTIONS: dict[str, Callable[..., Any]] = {"ask": ask, "explain": explain}
