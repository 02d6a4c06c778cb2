"""`correction fit`: fit a correction's factors at a checkpoint to samples, or read them from a saved optimizer.

A fit makes one or two passes over the samples and saves drafts of its sums beside the vectors. An interrupted fit
resumes from the last draft, with an equal result.
"""

from __future__ import annotations

import hashlib
import json
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import select

from lark_store.core.device import device_name, pick_device
from lark_store.core.versions import versions
from lark_store.errors import InputError
from lark_store.gradients.corrections import SECOND_MOMENTS, factors_for, factors_of_kind
from lark_store.ingest import correction_store
from lark_store.ingest.fit_resume import Draft
from lark_store.modeling.auto_models import check_attention
from lark_store.modeling.checkpoints import verify
from lark_store.modeling.encoded import UnusableSampleError
from lark_store.modeling.loading import check_precision, context_length, load_model, load_tokenizer
from lark_store.modeling.predicted_answers import AnswerPredictor
from lark_store.modeling.rendering import Renderer
from lark_store.modeling.sample import SAMPLE_COLUMNS, Sample
from lark_store.modeling.tokens import Tokens
from lark_store.results import CorrectionInfo, Progress
from lark_store.schema.catalog import Checkpoint, Correction, FormatVariant, Source
from lark_store.schema.database import check_unchanged, find
from lark_store.schema.locks import working
from lark_store.schema.vectors import where

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from lark_store.gradients.corrections.base import FitPass
    from lark_store.results import OnProgress
    from lark_store.schema.database import Database
    from lark_store.specs import FitSpec

_READ_AT_ONCE = 64


def fit(db: Database, spec: FitSpec, on_progress: OnProgress | None = None) -> CorrectionInfo:
    """Fit factors at a checkpoint unless the store has them; see `Store.correction_fit`."""
    if spec.from_optimizer is not None:
        return _fit_from_optimizer(db, spec.checkpoint, spec.kind, Path(spec.from_optimizer))
    check_precision(spec.compute.precision)
    check_attention(spec.compute.attention)
    with db.session() as session:
        checkpoint = find(session, Checkpoint, spec.checkpoint)
    work, device = _Fit(db, spec, checkpoint), pick_device(spec.compute.device)
    folder = verify(checkpoint).model
    work.tokenizer = load_tokenizer(folder)
    existing = work.existing()
    if existing is not None:
        return info(existing, is_new=False)
    if on_progress:
        on_progress(Progress(f"{checkpoint.name}: loading the model", 0, 0))
    model = load_model(folder, device, spec.compute.precision, spec.compute.attention)
    correction = work.run(model, device, on_progress)
    assert correction is not None
    return correction


def fit_missing(
    db: Database, spec: FitSpec, model: Any, tokenizer: Any, device: torch.device, on_progress: OnProgress | None
) -> CorrectionInfo | None:
    """Fit factors with a loaded model; return None if the checkpoint has them."""
    with db.session() as session:
        checkpoint = find(session, Checkpoint, spec.checkpoint)
    if correction_store.stored(db, checkpoint, factors_for(spec.kind).kind) is not None:
        return None
    work = _Fit(db, spec, checkpoint)
    work.tokenizer = tokenizer
    return work.run(model, device, on_progress, missing_alone=True)


class _Fit:
    """One fit: its samples and its catalog row."""

    tokenizer: Any

    def __init__(self, db: Database, spec: FitSpec, checkpoint: Checkpoint) -> None:
        self.factors = factors_for(spec.kind)
        self.kind = self.factors.kind
        if spec.samples < 1:
            raise InputError(f"`--samples` must be at least 1, not {spec.samples}", "try `--samples 500`")
        self.db, self.spec, self.checkpoint = db, spec, checkpoint
        with db.session() as session:
            self.variant = find(session, FormatVariant, spec.variant)
            finetune = list(session.scalars(select(Source.name).filter_by(stage="finetune").order_by(Source.name)))
            self.source_rows = [find(session, Source, name) for name in dict.fromkeys(spec.sources or finetune)]
        self.sources = [source.name for source in self.source_rows]
        if not self.sources:
            raise InputError("the store has no source of stage `finetune`", "name the sources with `--source NAME`")
        self.drawn = self._draw()

    def _draw(self) -> list[tuple[str, str, str]]:
        """Draw samples reproducibly: (source, id, content hash), ordered by a seeded hash."""
        columns = ["source", "sample_id", "content_sha256"]
        rows = self.db.vectors.read("samples", columns, where(source=self.sources)).rows()
        seed = self.spec.seed
        if not rows:
            raise InputError(f"{', '.join(self.sources)}: no samples", "add samples, or name another source")
        rows.sort(key=lambda row: hashlib.sha256(json.dumps([seed, *row]).encode()).digest())
        return rows[: self.spec.samples]

    def _recipe(self, kind: str | None = None) -> dict[str, Any]:
        return {
            "weights_sha256": self.checkpoint.weights_sha256,
            "tokenizer_sha256": self.checkpoint.tokenizer_sha256,
            "template_sha256": Renderer(self.variant, self.tokenizer).sha256,
            "variant": self.variant.name,
            "seed": self.spec.seed,
            "precision": self.spec.compute.precision,
            **factors_of_kind(kind or self.kind).recipe,
        }

    @property
    def _samples_sha256(self) -> str:
        return hashlib.sha256(json.dumps(sorted(self.drawn)).encode()).hexdigest()

    def existing(self, kind: str | None = None) -> Correction | None:
        """Return the stored factors if they were fitted the same way and their file is intact."""
        row = correction_store.stored(self.db, self.checkpoint, kind or self.kind)
        return row if row is not None and self._is_alike(row) and correction_store.is_whole(self.db, row) else None

    def _is_alike(self, row: Correction) -> bool:
        recipe = self._recipe(row.kind)
        alike = {key: row.recipe.get(key) for key in recipe} == recipe
        return alike and row.samples_sha256 == self._samples_sha256

    def run(
        self, model: Any, device: torch.device, on_progress: OnProgress | None, *, missing_alone: bool = False
    ) -> CorrectionInfo | None:
        """Fit and write the factors; with `missing_alone`, return None if the checkpoint has factors by now."""
        touches = {"checkpoint": [self.checkpoint.name], "source": self.sources}
        doing = f"fitting the correction of checkpoint `{self.checkpoint.name}`"
        with working(self.db.location, f"correction-{self.kind}-{self.checkpoint.name}", doing, touches):
            check_unchanged(self.db, self.checkpoint, self.variant, *self.source_rows)
            self.drawn = self._draw()  # the lock keeps samples from changing from here on
            old = correction_store.stored(self.db, self.checkpoint, self.kind)
            if old is not None and missing_alone:
                return None
            if old is not None and not self._is_alike(old):  # an equal fit may restore a lost file
                correction_store.check_unused(self.db, self.checkpoint, old)
            draft = Draft(self.db, self.checkpoint, self.kind, [self._recipe(), self.drawn])
            tensors, n = self._measure(model, device, draft, on_progress)
            row = Correction(
                kind=self.kind,
                origin="gradients",
                sources=", ".join(self.sources),
                n_samples=n,
                samples_sha256=self._samples_sha256,
                recipe=self._recipe() | {"versions": versions(), "device": device_name(device)},
            )
            stored = correction_store.save(self.db, tensors, row, self.checkpoint)
            draft.discard()
            return info(stored, is_new=True)

    def _measure(
        self, model: Any, device: torch.device, draft: Draft, on_progress: OnProgress | None
    ) -> tuple[dict[str, torch.Tensor], int]:
        """Return the factors and the number of samples that count."""
        resumed, n = draft.read(), 0
        result = self._first_pass() if resumed is None else None
        first = resumed.number if resumed is not None else int(result is not None)
        for number, kind in enumerate(self.factors.passes()):
            if number < first:
                continue
            fit_pass = kind(model, device, result)
            n_done = n_failed = 0
            if resumed is not None and number == resumed.number:
                fit_pass.restore(resumed.sums, resumed.n)
                n_done, n_failed = resumed.n_done, resumed.n_done - resumed.n
            try:
                self._over_samples(fit_pass, draft, number, (n_done, n_failed), on_progress, model)
                result, n = fit_pass.result(), fit_pass.n
            finally:
                fit_pass.close()
        assert result is not None
        return result, n

    def _first_pass(self) -> dict[str, torch.Tensor] | None:
        """Return the first pass's result from other stored factors, fitted to the same samples, or None."""
        first = self.existing(self.factors.starts_from) if self.factors.starts_from else None
        return None if first is None else correction_store.read(self.db, first)

    def _over_samples(
        self,
        fit_pass: FitPass,
        draft: Draft,
        number: int,
        start: tuple[int, int],
        on_progress: OnProgress | None,
        model: Any,
    ) -> None:
        renderer = Renderer(self.variant, self.tokenizer, context_length(model))
        predict = AnswerPredictor(model, self.tokenizer)
        label, reason = f"{self.checkpoint.name}: {fit_pass.label}", ""
        n_done, n_failed = start
        for key, sample in zip(self.drawn[n_done:], self._samples(n_done), strict=True):
            tokens = renderer.attempt(sample, predict)
            try:
                if not isinstance(tokens, Tokens):
                    raise tokens
                fit_pass.take(tokens, _seed_of([self.spec.seed, *key]))
            except UnusableSampleError as error:
                n_failed, reason = n_failed + 1, str(error)
            n_done += 1
            if on_progress:
                on_progress(Progress(label, n_done, len(self.drawn), n_failed))
            if n_done < len(self.drawn):
                draft.save(number, n_done, fit_pass.n, fit_pass)
        if fit_pass.n == 0:
            raise InputError(
                f"none of the {len(self.drawn)} samples has a gradient; the last failed: {reason}",
                "name another source with `--source NAME`, or another variant with `--variant NAME`",
            )

    def _samples(self, start: int) -> Iterator[Sample]:
        columns = ["source", *SAMPLE_COLUMNS]
        drawn = iter(self.drawn[start:])
        while chunk := list(islice(drawn, _READ_AT_ONCE)):
            names = where(source=self.sources, sample_id=[sample_id for _, sample_id, _ in chunk])
            rows = {
                (row.pop("source"), row["sample_id"]): row
                for row in self.db.vectors.read("samples", columns, names).to_dicts()
            }
            for source, sample_id, _ in chunk:
                yield Sample.of_row(rows[source, sample_id])


def _seed_of(key: list[Any]) -> int:
    return int.from_bytes(hashlib.sha256(json.dumps(key).encode()).digest()[:4], "little")


def info(row: Correction, *, is_new: bool, notes: tuple[str, ...] = ()) -> CorrectionInfo:
    """Convert a row to its public record."""
    names = ("kind", "origin", "sha256", "n_bytes", "sources", "n_samples", "created_at")
    of_row = {name: getattr(row, name) for name in names}
    return CorrectionInfo(checkpoint=row.checkpoint.name, is_new=is_new, notes=notes, **of_row)


# --- a saved optimizer ---------------------------------------------------------------------------------------------


def _fit_from_optimizer(db: Database, checkpoint_name: str, kind: str, path: Path) -> CorrectionInfo:
    """Read second moments from a saved optimizer; see `Store.correction_fit`."""
    from lark_store.gradients.corrections.optimizer_state import moments_of, read_optimizer
    from lark_store.gradients.corrections.second_moments import tensors_of
    from lark_store.ingest import saved_optimizer
    from lark_store.modeling.loading import meta_model

    needed = factors_for(kind)
    if not needed.in_optimizer:
        raise InputError(
            f"an optimizer has no {needed.noun}",
            f"fit them to samples with `lark-store correction fit --kind {kind} --source NAME`",
        )
    with db.session() as session:
        checkpoint = find(session, Checkpoint, checkpoint_name)
    state, sha256 = read_optimizer(path)
    files = verify(checkpoint)
    moments = moments_of(state, meta_model(files.model))
    steps = saved_optimizer.steps_of(state)
    notes = saved_optimizer.check_same(checkpoint, files.folder, path, steps)
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
    with working(
        db.location, f"correction-{SECOND_MOMENTS}-{checkpoint.name}", doing, {"checkpoint": [checkpoint.name]}
    ):
        check_unchanged(db, checkpoint)
        old = correction_store.stored(db, checkpoint, SECOND_MOMENTS)
        stored = correction_store.save(db, tensors_of(moments), row, checkpoint)
    return info(stored, is_new=old is None or old.sha256 != stored.sha256, notes=notes)
