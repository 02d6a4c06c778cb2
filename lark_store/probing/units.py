"""Units of a probing: one checkpoint × source × variant, with its facts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sqlalchemy import select

from lark_store.errors import InputError
from lark_store.modeling.auto_models import check_attention
from lark_store.modeling.batching import WINDOW, batches, budget, windows
from lark_store.modeling.encoded import UnusableSampleError
from lark_store.modeling.facts import Fact, fact_of
from lark_store.modeling.loading import check_precision
from lark_store.modeling.sample import SAMPLE_COLUMNS, Sample
from lark_store.schema.catalog import Checkpoint, FormatVariant, ProbeRun, Source
from lark_store.schema.database import find
from lark_store.schema.vectors import where

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from lark_store.modeling.rendering import Renderer
    from lark_store.schema.database import Database
    from lark_store.specs import ProbeSpec


@dataclass
class Unit:
    """One checkpoint × source × variant: its sample ids in order, and those without a valid probe (`pending`)."""

    checkpoint: Checkpoint
    source: Source
    variant: FormatVariant
    ids: list[str] = field(default_factory=list)
    pending: set[str] = field(default_factory=set)

    @property
    def names(self) -> dict[str, str]:
        """The names in the unit's rows."""
        return {"checkpoint": self.checkpoint.name, "source": self.source.name, "variant": self.variant.name}

    @property
    def label(self) -> str:
        """The unit in one line."""
        return " · ".join(self.names.values())


def units_of(db: Database, spec: ProbeSpec) -> list[Unit]:
    """Return the units of a probing, checkpoint by checkpoint.

    Raises
    ------
    NameUnknownError, InputError
    """
    check_precision(spec.compute.precision)
    check_attention(spec.compute.attention)
    for name, value, least in (("samples", spec.samples, 0), ("limit", spec.limit, 1)):
        if value is not None and value < least:
            raise InputError(f"`--{name}` must be at least {least}, not {value}", f"try `--{name} 20`")
    if not 0 < spec.temperature < float("inf"):
        raise InputError(
            f"`--temperature` must be above 0, not {spec.temperature:g}", "1 samples from the model itself"
        )
    if spec.seed < 0:
        raise InputError(f"`--seed` must be at least 0, not {spec.seed}", "try `--seed 0`")
    with db.session() as session:
        variant = find(session, FormatVariant, spec.variant)
        sources = [find(session, Source, name) for name in dict.fromkeys(spec.sources)]
        names = spec.checkpoints or session.scalars(select(Checkpoint.name).order_by(Checkpoint.epoch, Checkpoint.id))
        checkpoints = [find(session, Checkpoint, name) for name in dict.fromkeys(names)]
    if not checkpoints:
        raise InputError("the store has no checkpoint", "add one with `lark-store checkpoint add`")
    return [Unit(checkpoint, source, variant) for checkpoint in checkpoints for source in sources]


def fill(db: Database, unit: Unit, run: ProbeRun | None, limit: int | None) -> None:
    """Set a unit's ids and pending ones: those without a probe by `run`, and failed ones."""
    ids = db.vectors.read("samples", ["sample_id"], where(source=unit.source.name))["sample_id"].to_list()
    unit.ids = ids[:limit]
    unit.pending = set(unit.ids)
    if run is not None:
        rows = db.vectors.read("probes", ["sample_id"], f"{where(probe_run=run.id)} AND reason IS NULL")
        unit.pending -= set(rows["sample_id"])


def fact_batches(
    db: Database, unit: Unit, renderer: Renderer, ends: set[int], max_tokens: int
) -> Iterator[tuple[list[Fact], dict[str, UnusableSampleError]]]:
    """Yield the batches of a unit that hold pending facts, with the reasons of pending samples that are none.

    Batches are cut from all facts of the source, not only from pending ones: a resumed probing runs the batches of an
    uninterrupted one, to the same bits.
    """
    for window in windows(_samples(db, unit), WINDOW):
        attempts = {sample.sample_id: fact_of(renderer, sample, ends) for sample in window}
        facts = [fact for fact in attempts.values() if isinstance(fact, Fact)]
        failed = {
            sample_id: reason
            for sample_id, reason in attempts.items()
            if isinstance(reason, UnusableSampleError) and sample_id in unit.pending
        }
        if failed:
            yield [], failed
        for batch in batches(facts, lambda fact: len(fact.forced.input_ids), lambda: max_tokens):
            if any(fact.sample_id in unit.pending for fact in batch):
                yield batch, {}


def _samples(db: Database, unit: Unit) -> Iterator[Sample]:
    wanted = set(unit.ids)
    for batch in db.vectors.scan("samples", SAMPLE_COLUMNS, where(source=unit.source.name), batch_rows=WINDOW):
        for row in batch.to_pylist():
            if row["sample_id"] in wanted:
                yield Sample.of_row(row)


def max_tokens(spec: ProbeSpec, device: torch.device) -> int:
    """Return the token budget of a batch."""
    return budget(spec.compute.batch_tokens, device.type, None)


def settings(spec: ProbeSpec) -> dict[str, Any]:
    """Return the columns of `probe_run` that say how answers are decoded."""
    if not spec.samples:
        return {"decoding": "greedy", "temperature": None, "n_samples": 0, "seed": None}
    sampled = {"temperature": float(spec.temperature), "n_samples": spec.samples, "seed": spec.seed}
    return {"decoding": "sampled", **sampled}
