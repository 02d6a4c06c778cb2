"""Options of a search: the searched sketches, the ranking, and the computation of scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

from lark_store.errors import InputError
from lark_store.specs.option import option

if TYPE_CHECKING:
    from collections.abc import Sequence

_MOST_HITS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class SearchSpec:
    """A search by names; see `Store.top`. Without sources: all except queries.

    With `any_stage`, `queries` may be a source of another stage, whose samples are then the queries.
    """

    checkpoints: Sequence[str]
    any_stage: bool = False
    queries: str | None = option(
        None, flags="--queries -q", metavar="NAME", help="The query's source, if several have the id."
    )
    query_variant: str | None = option(
        None, metavar="NAME", help="The queries' format variant, if several are sketched."
    )
    sketcher: str | None = option(
        None, metavar="NAME", help="The sketcher (default: the store's, else the only one with sketches)."
    )
    method: str | None = option(None, flags="--method -m")
    over_checkpoints: str | None = option(
        None, metavar="HOW", help="Sum the scores of several checkpoints: `sum`, or `lr-weighted` by learning rate."
    )
    sources: Sequence[str] = option(
        (), flags="--source -s", metavar="NAME", help="Only this source; repeatable (default: all)."
    )
    variants: Sequence[str] = option(
        (), flags="--variant -v", metavar="NAME", help="Only this format variant; repeatable."
    )
    query_checkpoint: str | None = option(None, metavar="NAME", help="Use the queries' sketches at this checkpoint.")


@dataclass(frozen=True, kw_only=True)
class RankSpec:
    """A ranking of searched samples; see `Store.top`."""

    k: int = option(10, flags="-k", help="Number of samples.")
    opponents: bool = option(False, help="Rank the most negative influence first.")
    where: str | None = option(
        None,
        flags="--where -w",
        metavar="SQL",
        help="Only samples matching this, such as `n_tokens < 300 and year > 2015`.",
    )
    null: str | None = option(None)
    approximate: bool = option(False, help="Search with the index (`index build`).")

    def __post_init__(self) -> None:
        if not 1 <= self.k <= _MOST_HITS:
            raise InputError(f"`-k` must be between 1 and {_MOST_HITS:,}, not {self.k}", "try `-k 10`")


@dataclass(frozen=True, kw_only=True)
class GroupsSpec:
    """How samples are grouped; see `Store.groups`."""

    by: Sequence[str] = option(
        ("source",),
        flags="--by -b",
        metavar="KEY",
        help="A key of the samples' metadata, or source, stage, domain, variant, label; give it twice for pairs "
        "(default: source).",
    )
    how: str = option("mean", help="A group's value: the `mean`, `sum` or `max` of its samples' scores.")


@dataclass(frozen=True, kw_only=True)
class TraceSpec:
    """A model's own answer to a question; see `Store.trace`."""

    max_answer: int = option(32, metavar="N", help="Tokens of the answer, at most.")

    def __post_init__(self) -> None:
        if self.max_answer < 1:
            raise InputError(f"`--max-answer` must be at least 1, not {self.max_answer}", "the default is 32")


@dataclass(frozen=True, kw_only=True)
class ExplainSpec:
    """An explanation of one score; see `Store.explain`."""

    variant: str | None = option(
        None, flags="--variant -v", metavar="NAME", help="The sample's format variant, if several are sketched."
    )
    normalize: bool = option(
        True, flags="--normalize/--dot", help="Parts of the cosine, or of the gradients' dot product."
    )


@dataclass(frozen=True, kw_only=True)
class AttributeSpec(SearchSpec):
    """A search whose scores are stored; see `Store.attribute`."""

    hits: int = option(100, help="Rows of `influence` stored per query and group.")

    def __post_init__(self) -> None:
        if self.hits < 1:
            raise InputError(f"`--hits` must be at least 1, not {self.hits}", "leave it out for the default of 100")


@dataclass(frozen=True, kw_only=True)
class MetricsSpec:
    """Figures of stored scores; see `Store.metrics`."""

    view: str = option(
        "all",
        help="`all`, `influence` (the paper's Table I), `dominance` (Table II) or `comparisons` (two sources, or a "
        "checkpoint and the one before it, with q-values).",
    )


class CoverageOptions(TypedDict, total=False):
    """The keywords of `Store.coverage`."""

    sketcher: str | None
    method: str | None
    query_checkpoint: str | None


class MetricsOptions(CoverageOptions, total=False):
    """The keywords of `Store.metrics`."""

    view: str
    over_checkpoints: str | None
    query_variant: str | None


class SimilarTextOptions(TypedDict, total=False):
    """The keywords of `Store.similar_text`."""

    k: int
    sources: Sequence[str]


class SelfInfluenceOptions(SimilarTextOptions, total=False):
    """The keywords of `Store.self_influence`."""

    sketcher: str | None


class MethodOptions(TypedDict, total=False):
    """The queries and the method of a search, as keywords."""

    queries: str | None
    query_variant: str | None
    query_checkpoint: str | None
    sketcher: str | None
    method: str | None


class ScoreOptions(MethodOptions, total=False):
    """The same for several checkpoints."""

    over_checkpoints: str | None


class SearchOptions(ScoreOptions, total=False):
    """`SearchSpec` as keywords."""

    sources: Sequence[str]
    variants: Sequence[str]


class RankOptions(TypedDict, total=False):
    """`RankSpec` as keywords."""

    k: int
    opponents: bool
    where: str | None
    null: str | None
    approximate: bool


class TopOptions(SearchOptions, RankOptions, total=False):
    """The keywords of `Store.top`."""

    device: str


class TraceOptions(RankOptions, total=False):
    """The keywords of `Store.trace`."""

    max_answer: int
    query_variant: str | None
    query_checkpoint: str | None
    sketcher: str | None
    method: str | None
    sources: Sequence[str]
    variants: Sequence[str]
    device: str
    precision: str
    attention: str


class ExplainOptions(TypedDict, total=False):
    """The keywords of `Store.explain`."""

    queries: str | None
    query_variant: str | None
    sketcher: str | None
    variant: str | None
    normalize: bool
    device: str
    attention: str


class ExplainerOptions(TypedDict, total=False):
    """The keywords of `Store.explainer`."""

    sketcher: str | None
    device: str
    attention: str


class ScoresOptions(SearchOptions, total=False):
    """The keywords of `Store.scores`."""

    where: str | None
    device: str
    memory: int


class GroupsOptions(ScoresOptions, total=False):
    """The keywords of `Store.groups`."""

    by: Sequence[str]
    how: str


class AttributeOptions(ScoreOptions, total=False):
    """The keywords of `Store.attribute`."""

    sources: Sequence[str]
    hits: int
    device: str
    memory: int
