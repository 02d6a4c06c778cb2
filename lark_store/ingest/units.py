"""Units of an ingest: one checkpoint × source × variant each, with its missing samples."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from lark_store.errors import InputError
from lark_store.gradients.sketch.layout import check_not_imported, fingerprint, placements_of
from lark_store.ingest.defaults import ResolvedIngest, resolved
from lark_store.modeling.auto_models import check_attention
from lark_store.modeling.checkpoints import verify
from lark_store.modeling.loading import check_precision, context_length, meta_model
from lark_store.modeling.sample import SAMPLE_COLUMNS, Sample
from lark_store.schema.catalog import Checkpoint, FormatVariant, Source
from lark_store.schema.database import Database, find, find_sketcher
from lark_store.schema.table_schemas import sketch_table
from lark_store.schema.vectors import where

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lark_store.gradients.sketch.placement import Placement
    from lark_store.modeling.checkpoints import ModelFolder
    from lark_store.results import Chosen
    from lark_store.schema.catalog import Sketcher
    from lark_store.specs import IngestSpec

_LOG = logging.getLogger(__name__)


@dataclass
class Unit:
    """One checkpoint × source × variant, with its number of samples and the missing ones."""

    checkpoint: Checkpoint
    source: Source
    variant: FormatVariant
    candidates: Chosen | None = None
    n_samples: int = 0
    pending: set[str] = field(default_factory=set)

    @property
    def names(self) -> dict[str, str]:
        """The names in the unit's row keys."""
        return {"checkpoint": self.checkpoint.name, "source": self.source.name, "variant": self.variant.name}

    @property
    def label(self) -> str:
        """The unit in one line."""
        return " · ".join(self.names.values())


@dataclass(frozen=True)
class Plan:
    """One checkpoint's work: its folders, parameter layout, fingerprint and units."""

    checkpoint: Checkpoint
    folder: ModelFolder
    placements: list[Placement]
    fingerprint: str
    context: int | None
    units: list[Unit]


def checked(db: Database, spec: IngestSpec) -> ResolvedIngest:
    """Return an ingest with all its names, checked; log those that were not given."""
    work = resolved(db, spec)
    prepare(db, work)
    for choice in work.chosen:
        _LOG.info(choice)
    return work


def prepare(
    db: Database, ingest: ResolvedIngest, candidates: dict[str, Chosen] | None = None
) -> tuple[Sketcher, list[Callable[[], Plan]]]:
    """Look up an ingest's names; return the sketcher and a function per checkpoint that plans its work."""
    candidates, spec = candidates or {}, ingest.spec
    check_precision(spec.compute.precision)
    check_attention(spec.compute.attention)
    if spec.limit is not None and spec.limit < 1:
        raise InputError(f"`--limit` must be at least 1, not {spec.limit}", "omit `--limit` to ingest all samples")
    if spec.compute.batch_tokens is not None and spec.compute.batch_tokens < 1:
        raise InputError(
            f"`--batch-tokens` must be at least 1, not {spec.compute.batch_tokens}", "try `--batch-tokens 1024`"
        )
    with db.session() as session:
        sketcher = check_not_imported(find_sketcher(session, spec.sketcher))
        checkpoints = [find(session, Checkpoint, name) for name in spec.checkpoints]
        sources = [find(session, Source, name) for name in spec.sources]
        pairs = [
            (source, find(session, FormatVariant, name)) for source in sources for name in ingest.variants[source.name]
        ]

    def plan(checkpoint: Checkpoint) -> Plan:
        return _plan(sketcher, checkpoint, [Unit(checkpoint, s, v, candidates.get(s.name)) for s, v in pairs])

    return sketcher, [partial(plan, checkpoint) for checkpoint in checkpoints]


def _plan(sketcher: Sketcher, checkpoint: Checkpoint, units: list[Unit]) -> Plan:
    files = verify(checkpoint)
    model = meta_model(files.model)
    placements = placements_of(sketcher, model)
    return Plan(checkpoint, files.model, placements, fingerprint(sketcher, placements), context_length(model), units)


def fill(db: Database, fingerprint: str, unit: Unit, limit: int | None) -> None:
    """Set a unit's pending samples: the selected ones without a sketch."""
    ids = db.vectors.read("samples", ["sample_id"], where(source=unit.source.name))["sample_id"]
    selected = ids if limit is None else ids.head(limit)
    if unit.candidates is not None:
        selected = ids.filter(ids.is_in(list(unit.candidates.ids)))
    unit.n_samples = len(selected)
    unit.pending = set(selected)
    drop_existing(db, fingerprint, unit)


def drop_existing(db: Database, fingerprint: str, unit: Unit) -> None:
    """Remove samples with a sketch from a unit's pending ones."""
    table = sketch_table(fingerprint)
    if db.vectors.has(table):
        unit.pending -= set(db.vectors.read(table, ["sample_id"], where(**unit.names))["sample_id"])


def read_samples(db: Database, unit: Unit) -> Iterator[Sample]:
    """Yield a unit's missing samples in the source's order."""
    for batch in db.vectors.scan("samples", SAMPLE_COLUMNS, where(source=unit.source.name), batch_rows=256):
        for row in batch.to_pylist():
            if row["sample_id"] in unit.pending:
                yield Sample.of_row(row)
