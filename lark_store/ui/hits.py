"""Hits of `top` as cards of a page: the text with the words that it shares with the query, score, noise, p and q."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lark_store.display.values import numbers, p_value
from lark_store.query.methods import METHODS
from lark_store.results.answers import SIGNIFICANT
from lark_store.ui.tables import pieces

if TYPE_CHECKING:
    from lark_store.results import Hit, Hits
    from lark_store.ui.scope import Scope

EXPLAINED = ("cosine", "dot")  # the methods whose scores `explain` divides among tokens
_WIDTH = 100.0  # of a bar
_LONGEST = 1_500  # characters of a text


@dataclass(frozen=True)
class Bar:
    """A score as a bar with its noise: positions from 0 to 100."""

    start: float
    width: float
    low: float
    high: float
    zero: float


@dataclass(frozen=True)
class Card:
    """A hit for a page. `verdict` says whether it is significant; `rest` counts the characters not shown."""

    hit: Hit
    href: str
    score: str
    noise: str
    p: str
    q: str
    verdict: str
    bar: Bar
    pieces: list[tuple[str, bool]]
    rest: int
    name: str


@dataclass(frozen=True)
class Ranking:
    """One side of a page: its title, what a place in it means, whether it is significant, and its hits."""

    title: str
    meaning: str
    finding: str
    cards: list[Card]


def rankings_of(proponents: Hits, opponents: Hits, marked: frozenset[str], scope: Scope) -> list[Ranking]:
    """Return the two sides of a page; a score of words alone has one side, as low scores mean nothing."""
    scale = largest_of(proponents, opponents)
    if not METHODS[scope.method].reads_sketches:
        found = cards(proponents, marked, scope, scale)
        return [
            Ranking("Most similar texts", "they share the most words with the query", finding_of(proponents), found)
        ]
    sides = (("Proponents", "lowers", proponents), ("Opponents", "raises", opponents))
    return [
        Ranking(title, f"training on them {does} the query's loss", finding_of(hits), cards(hits, marked, scope, scale))
        for title, does, hits in sides
    ]


def cards(hits: Hits, marked: frozenset[str], scope: Scope, scale: float) -> list[Card]:
    """Return hits as cards; `scale` is the score of the longest bar."""
    largest = scale or 1.0
    scores = [_signed(text) for text in numbers([hit.score for hit in hits])]
    return [_card(hit, score, marked, scope, largest) for hit, score in zip(hits, scores, strict=True)]


def largest_of(*rankings: Hits) -> float:
    """Return the largest absolute score, its noise included."""
    return max((abs(hit.score) + (hit.noise or 0.0) for hits in rankings for hit in hits), default=0.0)


def _card(hit: Hit, score: str, marked: frozenset[str], scope: Scope, largest: float) -> Card:
    return Card(
        hit=hit,
        href=scope.sample_url(hit.source, hit.sample_id),
        score=score,
        noise="" if hit.noise is None else f"{hit.noise:.2g}",
        p="" if hit.p_value is None else p_value(hit.p_value),
        q="" if hit.q_value is None else p_value(hit.q_value),
        verdict=_verdict(hit),
        bar=_bar(hit.score, hit.noise or 0.0, largest),
        pieces=pieces(hit.text[:_LONGEST], marked),
        rest=max(0, len(hit.text) - _LONGEST),
        name=f"{hit.source}/{hit.sample_id}",
    )


def _verdict(hit: Hit) -> str:
    if hit.q_value is None:
        return "not tested"
    return "significant" if hit.q_value <= SIGNIFICANT else "not significant"


def _bar(score: float, noise: float, largest: float) -> Bar:
    """Return the bar of a score between -largest and largest, with 0 in the middle."""

    def place(value: float) -> float:
        return _WIDTH * min(max((value / largest + 1) / 2, 0.0), 1.0)

    zero = place(0.0)
    start, end = sorted((zero, place(score)))
    return Bar(start, end - start, place(score - noise), place(score + noise), zero)


def _signed(number: str) -> str:
    return number.replace("-", "−", 1) if number.startswith("-") else number


def summary(hits: Hits) -> dict[str, Any]:
    """Return what to say about a ranking: how it was made, with notes, and how to read its scores."""
    how = [line for line in hits.how.split("\n") if not line.startswith("against ")]
    return {"how": how, "scale": hits.scale}


def finding_of(hits: Hits) -> str:
    """Say how many hits are significant, and against which reference."""
    n = sum(hit.q_value is not None for hit in hits)
    if not n:
        return "No hit was tested against a reference."
    against = next((line.split(":")[0] for line in hits.how.split("\n") if line.startswith("against ")), "")
    found = f"{hits.n_significant} of {n} tested hits are significant" if hits.n_significant else "Nothing significant"
    return f"{found} at q ≤ {SIGNIFICANT}, {against}."
