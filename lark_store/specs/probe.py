"""Options of probing facts and of survival analysis."""

from __future__ import annotations

from dataclasses import dataclass, field

from lark_store.specs.compute import Compute, ComputeOptions
from lark_store.specs.option import option


@dataclass(frozen=True, kw_only=True)
class ProbeSpec:
    """The probing of facts; checkpoints and sources by name. See `Store.probe`. Without checkpoints: all of them."""

    sources: tuple[str, ...]
    checkpoints: tuple[str, ...] = ()
    compute: Compute = field(default_factory=Compute)
    variant: str = option("chatml", flags="--variant -v", metavar="NAME", help="The facts' format variant.")
    samples: int = option(0, metavar="N", help="Sample N answers per fact, too (default: none).")
    temperature: float = option(1.0, help="Temperature of the sampled answers.")
    seed: int = option(0, help="Seed of the sampled answers.")
    limit: int | None = option(None, flags="--limit -n", metavar="N", help="Only the first N facts of each source.")
    dry_run: bool = option(False, flags="--dry-run --plan", help="Only estimate the cost; write nothing.")


class ProbeOptions(ComputeOptions, total=False):
    """The keywords of `Store.probe`."""

    variant: str
    samples: int
    temperature: float
    seed: int
    limit: int | None
    dry_run: bool
