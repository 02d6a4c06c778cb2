"""`correction fit`: the second moments of gradients at a checkpoint, measured, or taken from a saved optimizer.

Measured ones are means over samples of their own squared gradients, one sample at a time through the hooks, which works
for any model and holds one parameter's gradient at a time. A fit that is killed has written nothing and begins again.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from sqlalchemy import select

from lark_store.errors import InputError
from lark_store.ingest import factors
from lark_store.ingest.checkpoints import verify
from lark_store.ingest.corrections import POWERS, SECOND_MOMENTS, Corrector, Moments
from lark_store.ingest.gradients import HookPath, Sketch, choose_parameters, pick_device
from lark_store.ingest.ledger import device_name, versions
from lark_store.ingest.models import context_length, load_model, load_tokenizer
from lark_store.ingest.sources import Sample
from lark_store.ingest.variants import Renderer, Tokens
from lark_store.schema.catalog import Checkpoint, Correction, FormatVariant, Source
from lark_store.schema.database import find
from lark_store.schema.locks import working
from lark_store.schema.records import CorrectionInfo, Progress
from lark_store.schema.vectors import where

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lark_store.ingest.gradients import Chosen
    from lark_store.schema.database import Database
    from lark_store.schema.records import OnProgress

DEFAULT_SAMPLES = 500
_READ_AT_ONCE = 64


@dataclass(frozen=True)
class Wanted:
    """What a fit was asked for. Without sources: those of stage `finetune`."""

    checkpoint: str
    kind: str = SECOND_MOMENTS
    sources: tuple[str, ...] = ()
    variant: str = "chatml"
    samples: int = DEFAULT_SAMPLES
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"


class MomentSums:
    """Sums samples' squared gradients, over rows and columns; a sample counts once it is committed."""

    def __init__(self, chosen: Chosen, device: torch.device) -> None:
        self.device, self.corrector = device, Corrector()
        self.n = 0
        self._shapes = {name: tuple(p.shape) for name, p in chosen}
        self._sums: dict[str, Moments] = {}
        self._sample: dict[str, Moments] = {}

    def new(self) -> torch.Tensor:
        """Return what the sum of a sample's squares is added up in, (1,), and begin a sample."""
        return torch.zeros(1, dtype=torch.float64, device=self.device)

    def add(self, name: str, gradient_SN: torch.Tensor, out: torch.Tensor) -> None:
        """Take a parameter's whole gradient, (1, P)."""
        squares = gradient_SN.view(self._shapes[name]).float().square()
        out += squares.sum(dtype=torch.float64)
        self._sample[name] = Moments.of(squares)

    def finish(self, out: torch.Tensor) -> torch.Tensor:
        """Return the gradient's norm, (1, 1)."""
        return out.sqrt().view(1, 1)

    def commit(self, *, keep: bool) -> None:
        """Add the sample to the sums, or drop it."""
        sample, self._sample = self._sample, {}
        if not keep:
            return
        self.n += 1
        for name, each in sample.items():
            held = self._sums.get(name)
            self._sums[name] = each if held is None else held.plus(each)

    def means(self) -> dict[str, Moments]:
        """Return the means over the samples, on the CPU; zero for a parameter that never had a gradient."""
        empty = {name: Moments.of(torch.zeros(shape)) for name, shape in self._shapes.items() if name not in self._sums}
        return {name: each.over(self.n) for name, each in self._sums.items()} | empty


def fit(db: Database, wanted: Wanted, on_progress: OnProgress | None = None) -> CorrectionInfo:
    """Measure second moments at a checkpoint, unless they are there; see `Store.correction_fit`."""
    with db.session() as session:
        checkpoint = find(session, Checkpoint, wanted.checkpoint)
    work, device = _Work(db, wanted, checkpoint), pick_device(wanted.device)
    folder = verify(checkpoint).folder
    work.tokenizer = load_tokenizer(folder)
    known = work.known()
    if known is not None:
        return info(known, is_new=False)
    if on_progress:
        on_progress(Progress(f"{checkpoint.name}: loading the model", 0, 0))
    return work.run(load_model(folder, device, wanted.precision), device, on_progress)


def fit_missing(
    db: Database, wanted: Wanted, model: Any, tokenizer: Any, device: torch.device, on_progress: OnProgress | None
) -> CorrectionInfo | None:
    """Measure them with a model that is loaded, where the checkpoint has none; None if it has."""
    with db.session() as session:
        checkpoint = find(session, Checkpoint, wanted.checkpoint)
    if factors.stored(db, checkpoint) is not None:
        return None
    work = _Work(db, wanted, checkpoint)
    work.tokenizer = tokenizer
    return work.run(model, device, on_progress)


class _Work:
    """One fit: its samples, drawn by their hash, and what is said of it in the catalog."""

    tokenizer: Any

    def __init__(self, db: Database, wanted: Wanted, checkpoint: Checkpoint) -> None:
        check_kind(wanted.kind)
        if wanted.samples < 1:
            raise InputError(f"{wanted.samples} samples are none to fit to", "try `--samples 500`")
        self.db, self.wanted, self.checkpoint = db, wanted, checkpoint
        with db.session() as session:
            self.variant = find(session, FormatVariant, wanted.variant)
            finetune = list(session.scalars(select(Source.name).filter_by(stage="finetune").order_by(Source.name)))
            self.sources = [find(session, Source, name).name for name in dict.fromkeys(wanted.sources or finetune)]
        if not self.sources:
            raise InputError("the store has no source of stage `finetune`", "say which with `--source NAME`")
        self.drawn = self._draw()
        if not self.drawn:
            raise InputError(f"there is no sample in {', '.join(self.sources)}", "add samples, or name another source")

    def _draw(self) -> list[tuple[str, str, str]]:
        """Draw samples at random, the same each time: source, id and content hash, in the order of a hash of them."""
        columns = ["source", "sample_id", "content_sha256"]
        rows = self.db.vectors.read("samples", columns, where(source=self.sources)).rows()
        seed = self.wanted.seed
        rows.sort(key=lambda row: hashlib.sha256(json.dumps([seed, *row]).encode()).digest())
        return rows[: self.wanted.samples]

    def _recipe(self) -> dict[str, Any]:
        return {
            "weights_sha256": self.checkpoint.weights_sha256,
            "tokenizer_sha256": self.checkpoint.tokenizer_sha256,
            "template_sha256": Renderer(self.variant, self.tokenizer).sha256,
            "variant": self.variant.name,
            "seed": self.wanted.seed,
            "precision": self.wanted.precision,
            "moments": "means over samples of the squared gradient of each one's mean loss",
        }

    @property
    def _samples_sha256(self) -> str:
        return hashlib.sha256(json.dumps(sorted(self.drawn)).encode()).hexdigest()

    def known(self) -> Correction | None:
        """Return what is in the store if it was fitted in the same way, and its file is there."""
        row = factors.stored(self.db, self.checkpoint)
        return row if row is not None and self._is_alike(row) and factors.is_whole(self.db, row) else None

    def _is_alike(self, row: Correction) -> bool:
        recipe = self._recipe()
        alike = {key: row.recipe.get(key) for key in recipe} == recipe
        return alike and row.samples_sha256 == self._samples_sha256

    def run(self, model: Any, device: torch.device, on_progress: OnProgress | None) -> CorrectionInfo:
        """Measure, and write."""
        touches = {"checkpoint": [self.checkpoint.name], "source": self.sources}
        doing = f"fitting the correction of checkpoint `{self.checkpoint.name}`"
        with working(self.db.location, f"correction-{self.checkpoint.name}", doing, touches):
            old = factors.stored(self.db, self.checkpoint)
            if old is not None and not self._is_alike(old):  # else it may be that the file alone is lost
                factors.check_unused(self.db, self.checkpoint, old)
            sums = self._measure(model, device, on_progress)
            row = Correction(
                kind=SECOND_MOMENTS,
                origin="gradients",
                sources=", ".join(self.sources),
                n_samples=sums.n,
                samples_sha256=self._samples_sha256,
                recipe=self._recipe() | {"versions": versions(), "device": device_name(device)},
            )
            return info(factors.keep(self.db, sums.means(), row, self.checkpoint), is_new=True)

    def _measure(self, model: Any, device: torch.device, on_progress: OnProgress | None) -> MomentSums:
        chosen = choose_parameters(model, None, None)
        sums = MomentSums(chosen, device)
        path = HookPath(model, chosen, sums)
        renderer = Renderer(self.variant, self.tokenizer, context_length(model))
        label, failed = f"{self.checkpoint.name}: second moments", 0
        reason = ""
        try:
            for number, sample in enumerate(self._samples(), start=1):
                tokens = renderer.attempt(sample)
                made = path.sketch([tokens])[0] if isinstance(tokens, Tokens) else tokens
                sums.commit(keep=isinstance(made, Sketch))
                if not isinstance(made, Sketch):
                    failed, reason = failed + 1, str(made)
                if on_progress:
                    on_progress(Progress(label, number, len(self.drawn), failed))
        finally:
            path.close()
        if sums.n == 0:
            raise InputError(
                f"none of the {len(self.drawn)} samples has a gradient; the last: {reason}",
                "name another source, or another variant with `--variant NAME`",
            )
        return sums

    def _samples(self) -> Iterator[Sample]:
        columns = ["source", "sample_id", "prompt", "response", "text"]
        drawn = iter(self.drawn)
        while some := list(islice(drawn, _READ_AT_ONCE)):
            names = where(source=self.sources, sample_id=[sample_id for _, sample_id, _ in some])
            rows = {
                (row.pop("source"), row["sample_id"]): row
                for row in self.db.vectors.read("samples", columns, names).to_dicts()
            }
            for source, sample_id, _ in some:
                yield Sample(**rows[source, sample_id])


def check_kind(kind: str) -> None:
    """Refuse what has no factors.

    Raises
    ------
    InputError
    """
    if kind not in POWERS:
        raise InputError(f"nothing is fitted for a correction `{kind}`", "the kind is `adam`, which `adam2` uses too")


def info(row: Correction, *, is_new: bool) -> CorrectionInfo:
    """Return a row as people get it."""
    names = ("kind", "origin", "sha256", "n_bytes", "sources", "n_samples", "created_at")
    return CorrectionInfo(checkpoint=row.checkpoint.name, is_new=is_new, **{name: getattr(row, name) for name in names})


# --- a saved optimizer ---------------------------------------------------------------------------------------------


def fit_from_optimizer(db: Database, checkpoint_name: str, kind: str, path: Path) -> CorrectionInfo:
    """Take the second moments of a saved optimizer; see `Store.correction_fit`."""
    from lark_store.ingest.models import meta_model
    from lark_store.ingest.optimizers import moments_of, read_optimizer

    check_kind(kind)
    with db.session() as session:
        checkpoint = find(session, Checkpoint, checkpoint_name)
    state, sha256 = read_optimizer(path)
    model = meta_model(verify(checkpoint).folder)
    moments, steps = moments_of(state, model)
    recipe = {"weights_sha256": checkpoint.weights_sha256, "file": path.name, "file_sha256": sha256, "steps": steps}
    row = Correction(
        kind=SECOND_MOMENTS,
        origin="optimizer",
        sources=None,
        n_samples=None,
        samples_sha256=None,
        recipe=recipe | {"versions": versions(), "moments": "the optimizer's exp_avg_sq, corrected for its start"},
    )
    doing = f"fitting the correction of checkpoint `{checkpoint.name}`"
    with working(db.location, f"correction-{checkpoint.name}", doing, {"checkpoint": [checkpoint.name]}):
        old = factors.stored(db, checkpoint)
        kept = factors.keep(db, moments, row, checkpoint)
    return info(kept, is_new=old is None or old.sha256 != kept.sha256)
