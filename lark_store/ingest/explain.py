"""Explain a score: gradients of a query and a sample with one loaded model, divided among their tokens."""

from __future__ import annotations

from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any

from sqlalchemy import select

from lark_store.core.device import pick_device
from lark_store.errors import CheckpointError, InputError
from lark_store.gradients.paths.taps import UnknownLayerError
from lark_store.gradients.sketch.accumulate import GradientSketcher
from lark_store.gradients.sketch.layout import (
    check_not_imported,
    fingerprint,
    is_masked,
    oporp_of,
    placements_of,
    sketched_parameters,
)
from lark_store.gradients.token_influence import Division, GradientDivider, WholeGradient, check_sum, dot
from lark_store.ingest.correction_store import corrector_for
from lark_store.ingest.stored_answers import stored_answers
from lark_store.modeling.checkpoints import verify
from lark_store.modeling.encoded import UnusableSampleError
from lark_store.modeling.loading import context_length, load_model, load_tokenizer
from lark_store.modeling.predicted_answers import AnswerPredictor
from lark_store.modeling.rendering import Renderer
from lark_store.modeling.token_texts import token_texts
from lark_store.results import Explanation
from lark_store.schema.catalog import Checkpoint, FormatVariant, IngestRun
from lark_store.schema.database import find, find_sketcher
from lark_store.schema.table_schemas import sketch_table
from lark_store.schema.vectors import row_key, where
from lark_store.specs import PREDICTED_ANSWER

if TYPE_CHECKING:
    import torch

    from lark_store.modeling.sample import Sample
    from lark_store.modeling.tokens import Tokens
    from lark_store.schema.database import Database
    from lark_store.specs import Compute


@dataclass(frozen=True)
class ExplainedSample:
    """A query or a sample to explain: its name for people, its format variant, its source, None for a new text."""

    name: str
    sample: Sample
    variant: str
    source: str | None = None

    @property
    def key(self) -> tuple[str, str | None, Sample]:
        """What its gradient depends on."""
        return self.variant, self.source, self.sample


class LoadedExplainer:
    """Explains scores of one sketcher at one checkpoint, whose model it loads in float32 and keeps. Writes nothing.

    The last query's gradient is kept too.

    Raises
    ------
    NameUnknownError, CheckpointChangedError, CheckpointError
    InputError
        The sketches were imported, or the correction's factors are not fitted.
    """

    def __init__(self, db: Database, *, sketcher: str | None, checkpoint: str, compute: Compute) -> None:
        with db.session() as session:
            self._sketcher = check_not_imported(find_sketcher(session, sketcher))
            self._checkpoint = find(session, Checkpoint, checkpoint)
        self._db, device = db, pick_device(compute.device)
        folder = verify(self._checkpoint).model
        self._tokenizer = load_tokenizer(folder)
        self._model = load_model(folder, device, "float32", compute.attention)
        self._predict = AnswerPredictor(self._model, self._tokenizer)
        parameters = sketched_parameters(self._sketcher, self._model)
        placements = placements_of(self._sketcher, self._model)
        corrector, _ = corrector_for(db, self._sketcher, self._checkpoint, placements, device)
        self._fingerprint = fingerprint(self._sketcher, placements)
        self._sketch = GradientSketcher(oporp_of(self._sketcher), placements, device)
        try:
            self._divider = GradientDivider(self._model, parameters, corrector, masked=is_masked(self._sketcher))
        except UnknownLayerError as error:
            raise self._indivisible(error) from error
        self._last: tuple[Any, Tokens, WholeGradient] | None = None
        self._lock = Lock()  # the model has one sample's hooks at a time

    def _indivisible(self, error: UnknownLayerError) -> CheckpointError:
        return CheckpointError(
            f"the gradients of checkpoint `{self._checkpoint.name}` can't be divided among tokens: {error}",
            "leave its parameters out: `lark-store sketcher add NAME --exclude PATTERN`",
        )

    def explain(self, query: ExplainedSample, sample: ExplainedSample, *, normalize: bool = True) -> Explanation:
        """Divide the product of two gradients among the tokens of both.

        Raises
        ------
        InputError
            One can't be rendered or has no usable gradient.
        CheckpointError
            The model's gradients can't be divided.
        """
        with self._lock:
            return self._explained(query, sample, normalize=normalize)

    def _explained(self, query: ExplainedSample, sample: ExplainedSample, *, normalize: bool) -> Explanation:
        query_tokens, query_gradient = self._of_query(query)
        sample_tokens, sample_gradient = self._gradient(sample)
        product = dot(query_gradient.corrected, sample_gradient.corrected)
        norms = query_gradient.norm * sample_gradient.norm
        sides = (
            ("query", query, query_tokens, query_gradient, sample_gradient),
            ("sample", sample, sample_tokens, sample_gradient, query_gradient),
        )
        rows: list[dict[str, Any]] = []
        for side, explained, tokens, own, other in sides:
            division = self._divided(explained, tokens, own, other)
            try:
                check_sum(division, product, norms)
            except UnknownLayerError as error:
                raise self._indivisible(error) from error
            rows += self._rows(side, tokens, division, 1 / norms if normalize else 1.0)
        score, is_stored = self._sketch_score((query, query_gradient), (sample, sample_gradient))
        return Explanation(
            frame=_frame(rows),
            query_id=query.name,
            sample_id=sample.name,
            checkpoint=self._checkpoint.name,
            sketcher=self._sketcher.name,
            query_variant=query.variant,
            variant=sample.variant,
            unit="cosine" if normalize else "dot",
            cosine=product / norms,
            dot=product,
            sketch_score=score,
            noise=max(0.0, 1 - score**2) / self._sketcher.k**0.5,
            is_stored=is_stored,
            query_loss=query_gradient.loss,
            sample_loss=sample_gradient.loss,
            notes=(*_notes("query", query_tokens), *_notes("sample", sample_tokens)),
        )

    # --- gradients -------------------------------------------------------------------------------------------------

    def _of_query(self, query: ExplainedSample) -> tuple[Tokens, WholeGradient]:
        if self._last is None or self._last[0] != query.key:
            self._last = None  # its memory is free before the next is taken
            self._last = (query.key, *self._gradient(query))
        return self._last[1:]

    def _gradient(self, explained: ExplainedSample) -> tuple[Tokens, WholeGradient]:
        try:
            tokens = self._rendered(explained)
            return tokens, self._divider.gradient(tokens)
        except UnusableSampleError as error:
            raise _unusable(explained, error) from error

    def _rendered(self, explained: ExplainedSample) -> Tokens:
        """Render a sample as `ingest` does: a predicted answer is the stored one, if any."""
        with self._db.session() as session:
            variant = find(session, FormatVariant, explained.variant)
        predict: Any = self._predict
        if variant.targets == PREDICTED_ANSWER and explained.source is not None:
            names = {"checkpoint": self._checkpoint.name, "source": explained.source, "variant": variant.name}
            sample_id = explained.sample.sample_id
            answer = stored_answers(self._db, names | {"sample_id": sample_id}).get(sample_id)
            predict = predict if answer is None else lambda _: answer
        renderer = Renderer(variant, self._tokenizer, context_length(self._model))
        return renderer.render(explained.sample, predict)

    def _divided(
        self, explained: ExplainedSample, tokens: Tokens, own: WholeGradient, other: WholeGradient
    ) -> Division:
        try:
            return self._divider.divide(tokens, self._divider.direction(own, other))
        except UnknownLayerError as error:
            raise self._indivisible(error) from error
        except UnusableSampleError as error:
            raise _unusable(explained, error) from error

    # --- the answer ------------------------------------------------------------------------------------------------

    def _rows(self, side: str, tokens: Tokens, division: Division, scale: float) -> list[dict[str, Any]]:
        """Return the rows of one side."""
        texts = token_texts(self._tokenizer, tokens.input_ids)
        labels = [
            None if label is None else text if label == own else token_texts(self._tokenizer, [label])[0]
            for label, own, text in zip(division.labels, tokens.input_ids, texts, strict=True)
        ]
        columns = {
            "token": texts,
            "token_id": tokens.input_ids,
            "is_target": list(tokens.is_target),
            "label": labels,
            "by_position": (division.by_position * scale).tolist(),
            "by_target": (division.by_target * scale).tolist(),
        }
        values = zip(*columns.values(), strict=True)
        return [{"side": side, "position": n, **dict(zip(columns, row, strict=True))} for n, row in enumerate(values)]

    def _sketch_score(self, *pairs: tuple[ExplainedSample, WholeGradient]) -> tuple[float, bool]:
        """Return the cosine of both sketches, and whether both are stored; a missing one is computed."""
        stored = [self._stored(explained) for explained, _ in pairs]
        sketches = [
            self._sketched(gradient) if vector is None else vector
            for vector, (_, gradient) in zip(stored, pairs, strict=True)
        ]
        left, right = (sketch / sketch.norm() for sketch in sketches)
        return float(left @ right), all(vector is not None for vector in stored)

    def _stored(self, explained: ExplainedSample) -> torch.Tensor | None:
        """Return a sample's stored sketch, (K,) float64, if there is one."""
        import torch

        table = sketch_table(self._fingerprint)
        if explained.source is None or not self._db.vectors.has(table):
            return None
        key = row_key(self._checkpoint.name, explained.source, explained.variant, explained.sample.sample_id)
        rows = self._db.vectors.read(table, ["ingest_run", "vector"], where(row_key=key)).to_dicts()
        with self._db.session() as session:
            done = select(IngestRun.id).filter_by(checkpoint_id=self._checkpoint.id, status="done")
            committed = set(session.scalars(done))
        vectors = [row["vector"] for row in rows if row["ingest_run"] in committed]
        return torch.tensor(vectors[0], dtype=torch.float64) if vectors else None

    def _sketched(self, gradient: WholeGradient) -> torch.Tensor:
        out = self._sketch.new()
        for name, value in gradient.corrected.items():
            self._sketch.add(name, value.reshape(1, -1), out)
        return self._sketch.finish(out)[0].double().cpu()


def _frame(rows: list[dict[str, Any]]) -> Any:
    import polars as pl

    kinds = {
        "side": pl.String,
        "position": pl.Int64,
        "token": pl.String,
        "token_id": pl.Int64,
        "is_target": pl.Boolean,
        "label": pl.String,
        "by_position": pl.Float64,
        "by_target": pl.Float64,
    }
    return pl.DataFrame(rows, schema=kinds)


def _unusable(explained: ExplainedSample, error: UnusableSampleError) -> InputError:
    return InputError(
        f"`{explained.name}` as `{explained.variant}` has no gradient: {error}",
        "see its format with `lark-store variant show`",
    )


def _notes(side: str, tokens: Tokens) -> list[str]:
    """Return a note about a truncated sample."""
    if not tokens.n_cut:
        return []
    n_whole = len(tokens.input_ids) + tokens.n_cut
    return [f"the {side} was truncated: {tokens.n_cut} of {n_whole} tokens were cut"]
