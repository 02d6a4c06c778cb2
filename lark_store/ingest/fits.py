"""`correction fit`: the factors of a correction at a checkpoint, measured on samples or taken from a saved optimizer.

A measurement goes over the samples once or twice, one at a time, and now and then keeps its sums in a draft beside the
vectors: one that is killed goes on where the last draft was, and comes out equal.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

from sqlalchemy import select

from lark_store.errors import InputError
from lark_store.ingest import factors
from lark_store.ingest.checkpoints import verify
from lark_store.ingest.corrections import EKFAC, FACTORS, IN_WORDS, KFAC, SECOND_MOMENTS
from lark_store.ingest.drafts import Draft
from lark_store.ingest.fisher import CurvatureSums, EigenvalueSums
from lark_store.ingest.gradients import pick_device
from lark_store.ingest.ledger import device_name, versions
from lark_store.ingest.models import context_length, load_model, load_tokenizer
from lark_store.ingest.moments import MomentPass, tensors_of
from lark_store.ingest.sources import Sample
from lark_store.ingest.variants import Renderer, Tokens, UnusableSampleError
from lark_store.schema.catalog import Checkpoint, Correction, FormatVariant, Source
from lark_store.schema.database import find
from lark_store.schema.locks import working
from lark_store.schema.records import CorrectionInfo, Progress
from lark_store.schema.vectors import where

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import torch

    from lark_store.schema.database import Database
    from lark_store.schema.records import OnProgress

DEFAULT_SAMPLES = 500
_READ_AT_ONCE = 64
_SAYS = {  # what the catalog says of how factors of a kind were measured
    SECOND_MOMENTS: {"moments": "means over samples of the squared gradient of each one's mean loss"},
    KFAC: {"curvature": "of each sample's mean loss, labels drawn from the model; A a mean over positions, S samples"},
    EKFAC: {"curvature": "of each sample's mean loss, labels drawn from the model; eigenvalues along those of A and S"},
}


class Pass(Protocol):
    """One pass over the samples: `sums` of the `n` that count so far, and what is made of them in the end."""

    what: str

    def __init__(self, model: Any, device: torch.device, before: dict[str, torch.Tensor] | None = None) -> None: ...

    @property
    def n(self) -> int:
        """The samples that count."""
        ...

    @property
    def sums(self) -> dict[str, torch.Tensor]:
        """What a draft keeps."""
        ...

    def take(self, tokens: Tokens, seed: int) -> None:
        """Add a sample, all of it or, if that raises UnusableSampleError, nothing."""
        ...

    def restore(self, sums: dict[str, torch.Tensor], n: int) -> None:
        """Go on from what a fit had summed before."""
        ...

    def result(self) -> dict[str, torch.Tensor]:
        """Return what the next pass is given, or the factors, by name, on the CPU."""
        ...

    def close(self) -> None:
        """Let go of the model."""
        ...


_PASSES: dict[str, tuple[type[Pass], ...]] = {
    SECOND_MOMENTS: (MomentPass,),
    KFAC: (CurvatureSums,),
    EKFAC: (CurvatureSums, EigenvalueSums),
}


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


def fit(db: Database, wanted: Wanted, on_progress: OnProgress | None = None) -> CorrectionInfo:
    """Measure factors at a checkpoint, unless they are there; see `Store.correction_fit`."""
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
    if factors.stored(db, checkpoint, factors_of(wanted.kind)) is not None:
        return None
    work = _Work(db, wanted, checkpoint)
    work.tokenizer = tokenizer
    return work.run(model, device, on_progress)


class _Work:
    """One fit: its samples, drawn by their hash, and what is said of it in the catalog."""

    tokenizer: Any

    def __init__(self, db: Database, wanted: Wanted, checkpoint: Checkpoint) -> None:
        self.kind = factors_of(wanted.kind)
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

    def _recipe(self, kind: str | None = None) -> dict[str, Any]:
        return {
            "weights_sha256": self.checkpoint.weights_sha256,
            "tokenizer_sha256": self.checkpoint.tokenizer_sha256,
            "template_sha256": Renderer(self.variant, self.tokenizer).sha256,
            "variant": self.variant.name,
            "seed": self.wanted.seed,
            "precision": self.wanted.precision,
            **_SAYS[kind or self.kind],
        }

    @property
    def _samples_sha256(self) -> str:
        return hashlib.sha256(json.dumps(sorted(self.drawn)).encode()).hexdigest()

    def known(self, kind: str | None = None) -> Correction | None:
        """Return what is in the store if it was fitted in the same way, and its file is there."""
        row = factors.stored(self.db, self.checkpoint, kind or self.kind)
        return row if row is not None and self._is_alike(row) and factors.is_whole(self.db, row) else None

    def _is_alike(self, row: Correction) -> bool:
        recipe = self._recipe(row.kind)
        alike = {key: row.recipe.get(key) for key in recipe} == recipe
        return alike and row.samples_sha256 == self._samples_sha256

    def run(self, model: Any, device: torch.device, on_progress: OnProgress | None) -> CorrectionInfo:
        """Measure, and write."""
        touches = {"checkpoint": [self.checkpoint.name], "source": self.sources}
        doing = f"fitting the correction of checkpoint `{self.checkpoint.name}`"
        with working(self.db.location, f"correction-{self.kind}-{self.checkpoint.name}", doing, touches):
            old = factors.stored(self.db, self.checkpoint, self.kind)
            if old is not None and not self._is_alike(old):  # else it may be that the file alone is lost
                factors.check_unused(self.db, self.checkpoint, old)
            draft = Draft(self.db, self.checkpoint, self.kind, [self._recipe(), self.drawn])
            tensors, n = self._measured(model, device, draft, on_progress)
            row = Correction(
                kind=self.kind,
                origin="gradients",
                sources=", ".join(self.sources),
                n_samples=n,
                samples_sha256=self._samples_sha256,
                recipe=self._recipe() | {"versions": versions(), "device": device_name(device)},
            )
            kept = factors.keep(self.db, tensors, row, self.checkpoint)
            draft.discard()
            return info(kept, is_new=True)

    def _measured(
        self, model: Any, device: torch.device, draft: Draft, on_progress: OnProgress | None
    ) -> tuple[dict[str, torch.Tensor], int]:
        """Return the factors, and how many samples counted."""
        begun, n = draft.read(), 0
        result = self._first_pass() if begun is None else None
        first = begun.number if begun is not None else int(result is not None)
        for number, kind in enumerate(_PASSES[self.kind]):
            if number < first:
                continue
            one = kind(model, device, result)
            done = failed = 0
            if begun is not None and number == begun.number:
                one.restore(begun.sums, begun.n)
                done, failed = begun.done, begun.done - begun.n
            try:
                self._over_samples(one, draft, number, (done, failed), on_progress, context_length(model))
                result, n = one.result(), one.n
            finally:
                one.close()
        assert result is not None
        return result, n

    def _first_pass(self) -> dict[str, torch.Tensor] | None:
        """Return what the first of two passes would find, where a fit of K-FAC to the same samples has left it."""
        kfac = self.known(KFAC) if self.kind == EKFAC else None
        return None if kfac is None else factors.read(self.db, kfac)

    def _over_samples(
        self,
        one: Pass,
        draft: Draft,
        number: int,
        start: tuple[int, int],
        on_progress: OnProgress | None,
        context: int | None,
    ) -> None:
        renderer = Renderer(self.variant, self.tokenizer, context)
        label, reason = f"{self.checkpoint.name}: {one.what}", ""
        done, failed = start
        for key, sample in zip(self.drawn[done:], self._samples(done), strict=True):
            tokens = renderer.attempt(sample)
            try:
                if not isinstance(tokens, Tokens):
                    raise tokens
                one.take(tokens, _seed_of([self.wanted.seed, *key]))
            except UnusableSampleError as error:
                failed, reason = failed + 1, str(error)
            done += 1
            if on_progress:
                on_progress(Progress(label, done, len(self.drawn), failed))
            if done < len(self.drawn):
                draft.keep(number, done, one.n, one)
        if one.n == 0:
            raise InputError(
                f"none of the {len(self.drawn)} samples has a gradient; the last: {reason}",
                "name another source, or another variant with `--variant NAME`",
            )

    def _samples(self, start: int) -> Iterator[Sample]:
        columns = ["source", "sample_id", "prompt", "response", "text"]
        drawn = iter(self.drawn[start:])
        while some := list(islice(drawn, _READ_AT_ONCE)):
            names = where(source=self.sources, sample_id=[sample_id for _, sample_id, _ in some])
            rows = {
                (row.pop("source"), row["sample_id"]): row
                for row in self.db.vectors.read("samples", columns, names).to_dicts()
            }
            for source, sample_id, _ in some:
                yield Sample(**rows[source, sample_id])


def factors_of(correction: str) -> str:
    """Return the kind of factors that a correction needs.

    Raises
    ------
    InputError
        It needs none, or there is no such correction.
    """
    if correction not in FACTORS:
        raise InputError(
            f"nothing is fitted for a correction `{correction}`",
            "the kind is `adam`, which `adam2` uses too, `kfac` or `ekfac`",
        )
    return FACTORS[correction]


def _seed_of(key: list[Any]) -> int:
    return int.from_bytes(hashlib.sha256(json.dumps(key).encode()).digest()[:4], "little")


def info(row: Correction, *, is_new: bool) -> CorrectionInfo:
    """Return a row as people get it."""
    names = ("kind", "origin", "sha256", "n_bytes", "sources", "n_samples", "created_at")
    return CorrectionInfo(checkpoint=row.checkpoint.name, is_new=is_new, **{name: getattr(row, name) for name in names})


# --- a saved optimizer ---------------------------------------------------------------------------------------------


def fit_from_optimizer(db: Database, checkpoint_name: str, kind: str, path: Path) -> CorrectionInfo:
    """Take the second moments of a saved optimizer; see `Store.correction_fit`."""
    from lark_store.ingest.models import meta_model
    from lark_store.ingest.optimizers import moments_of, read_optimizer

    if factors_of(kind) != SECOND_MOMENTS:
        raise InputError(
            f"an optimizer has no {IN_WORDS[kind]}",
            f"fit them to samples: `correction fit --kind {kind} --source NAME`",
        )
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
    with working(
        db.location, f"correction-{SECOND_MOMENTS}-{checkpoint.name}", doing, {"checkpoint": [checkpoint.name]}
    ):
        old = factors.stored(db, checkpoint, SECOND_MOMENTS)
        kept = factors.keep(db, tensors_of(moments), row, checkpoint)
    return info(kept, is_new=old is None or old.sha256 != kept.sha256)
