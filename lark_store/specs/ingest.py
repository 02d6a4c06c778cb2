"""Options of an ingest and of the fit of a correction."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypedDict

from lark_store.specs.compute import Compute, ComputeOptions
from lark_store.specs.option import option

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class IngestSpec:
    """An ingest, or the plan of one; checkpoints, sources and variants by name. See `Store.ingest`.

    Without checkpoints or sources: all of them. Without variants: each source's usual ones.
    """

    checkpoints: Sequence[str] = ()
    sources: Sequence[str] = ()
    variants: Sequence[str] = ()
    compute: Compute = field(default_factory=Compute)
    sketcher: str | None = option(None, metavar="NAME", help="The sketcher (default: the store's).")
    limit: int | None = option(None, flags="--limit -n", metavar="N", help="Only the first N samples of each source.")
    candidates: int | None = option(
        None, metavar="N", help="Sketch only candidates: per source, the N samples nearest to each query."
    )
    by: str | None = option(None, help="How to find candidates: `bm25` (default) or `embedding`, with `--encoder`.")
    queries: str | None = option(
        None,
        flags="--queries -q",
        metavar="NAME",
        help="The source of queries to find candidates for, if there are several.",
    )
    encoder: str | Path | None = option(
        None, metavar="PLACE", help="A sentence encoder: a folder or a hub name like `org/model`."
    )


@dataclass(frozen=True, kw_only=True)
class VerifySpec:
    """Stored sketches to recompute; see `Store.verify`."""

    sketches: int = option(20, help="Number of stored sketches to recompute, drawn at random.")
    sketcher: str | None = option(None, metavar="NAME", help="Only this sketcher (default: all).")


@dataclass(frozen=True, kw_only=True)
class FitSpec:
    """The fit of a correction's factors at a checkpoint; see `Store.correction_fit`."""

    checkpoint: str
    compute: Compute = field(default_factory=Compute)
    kind: str = option("adam")
    sources: Sequence[str] = option(
        (),
        flags="--source -s",
        metavar="NAME",
        help="Fit to this source; repeatable (default: all `finetune`).",
    )
    variant: str = option("chatml", flags="--variant -v", metavar="NAME", help="The samples' format variant.")
    samples: int = option(500, help="Number of samples, drawn at random with `--seed`.")
    seed: int = option(0, help="Seed of the draw and of the labels.")
    from_optimizer: str | Path | None = option(
        None, metavar="PATH", help="Take the second moments from this `optimizer.pt`, or from its folder."
    )


class IngestOptions(ComputeOptions, total=False):
    """The keywords of `Store.ingest` and `Store.plan`."""

    sketcher: str | None
    limit: int | None
    candidates: int | None
    by: str | None
    queries: str | None
    encoder: str | Path | None


class FitOptions(TypedDict, total=False):
    """The keywords of `Store.correction_fit`."""

    kind: str
    sources: Sequence[str]
    variant: str
    samples: int
    seed: int
    from_optimizer: str | Path | None
    device: str
    precision: str
    attention: str


class VerifyOptions(TypedDict, total=False):
    """The keywords of `Store.verify`."""

    sketches: int
    sketcher: str | None
    device: str
    precision: str
    attention: str
