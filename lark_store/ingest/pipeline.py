"""The pipeline of one checkpoint: load the model, fit a missing correction, build the path."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sqlalchemy import select

from lark_store.errors import CheckpointError
from lark_store.gradients.corrections import factors_of_kind
from lark_store.gradients.paths.batched import hook_path, make_path
from lark_store.gradients.paths.hooks import recompute_activations
from lark_store.gradients.sketch.accumulate import GradientSketcher
from lark_store.gradients.sketch.layout import is_masked, oporp_of, sketched_parameters
from lark_store.ingest import correction_store, fit_corrections
from lark_store.modeling.loading import load_model, load_tokenizer
from lark_store.modeling.predicted_answers import AnswerPredictor
from lark_store.results import Progress
from lark_store.schema.catalog import Source
from lark_store.specs import FitSpec

if TYPE_CHECKING:
    import torch

    from lark_store.gradients.corrections import Corrector
    from lark_store.gradients.paths.hooks import NamedParameters, SketchPath
    from lark_store.ingest.distributed import Ranks
    from lark_store.ingest.units import Plan
    from lark_store.results import OnProgress
    from lark_store.schema.catalog import Sketcher
    from lark_store.schema.database import Database
    from lark_store.specs import IngestSpec


@dataclass(frozen=True)
class IngestContext:
    """The constants of an ingest, shared by all checkpoints."""

    db: Database
    sketcher: Sketcher
    spec: IngestSpec
    device: torch.device
    ranks: Ranks
    on_progress: OnProgress | None


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint's model and tokenizer, and the parameters to sketch. `dtype` is `auto` for several dtypes."""

    model: Any
    tokenizer: Any
    parameters: NamedParameters
    dtype: str


@dataclass(frozen=True)
class Pipeline:
    """A checkpoint's sketch path and tokenizer, with the hash of the correction's factors or None.

    `predict` answers prompts, under the target rule `predicted-answer`.
    """

    path: SketchPath
    tokenizer: Any
    dtype: str
    factors_sha256: str | None
    predict: AnswerPredictor


def open_pipeline(context: IngestContext, plan: Plan) -> tuple[Pipeline, list[str]]:
    """Return a checkpoint's pipeline and notes for the report.

    Raises
    ------
    CheckpointError, InputError, StoreError
    """
    loaded = load(context, plan)
    fitted = fit_missing_correction(context, plan, loaded)
    corrector, sha256 = correction_store.corrector_for(
        context.db, context.sketcher, plan.checkpoint, plan.placements, context.device
    )
    path, one_by_one = build_path(context, plan, loaded, corrector)
    predict = AnswerPredictor(loaded.model, loaded.tokenizer)
    pipeline = Pipeline(path, loaded.tokenizer, loaded.dtype, sha256, predict)
    return pipeline, [note for note in (fitted, one_by_one) if note]


def load(context: IngestContext, plan: Plan) -> LoadedModel:
    """Load a checkpoint's model and tokenizer.

    Raises
    ------
    CheckpointError
        The parameters are not those of the plan, which come from the config.
    """
    if context.on_progress:
        context.on_progress(Progress(f"{plan.checkpoint.name}: loading the model", 0, 0))
    tokenizer = load_tokenizer(plan.folder)
    compute = context.spec.compute
    model = load_model(plan.folder, context.device, compute.precision, compute.attention)
    dtypes = {str(p.dtype).removeprefix("torch.") for p in model.parameters()}
    dtype = dtypes.pop() if len(dtypes) == 1 else "auto"  # such as float32 adapters on a half-precision base
    parameters = sketched_parameters(context.sketcher, model)
    if [(name, tuple(p.shape)) for name, p in parameters] != [(p.name, p.shape) for p in plan.placements]:
        raise CheckpointError(
            f"the parameters of checkpoint `{plan.checkpoint.name}` do not match its config",
            "check `tie_word_embeddings` in config.json, and save it again with `save_pretrained`",
        )
    if compute.gradient_checkpointing:
        recompute_activations(model)
    return LoadedModel(model, tokenizer, parameters, dtype)


def fit_missing_correction(context: IngestContext, plan: Plan, loaded: LoadedModel) -> str | None:
    """Fit the correction's factors if this checkpoint lacks them; return a note after a fit.

    The samples are those of stage `finetune`, else of the ingest's sources, in the first unit's variant.
    """
    if correction_store.kind_for(context.sketcher) is None:
        return None
    variant = plan.units[0].variant.name
    spec = FitSpec(
        checkpoint=plan.checkpoint.name,
        kind=context.sketcher.correction,
        variant=variant,
        compute=context.spec.compute,
    )

    def fit() -> str | None:
        correction = fit_corrections.fit_missing(
            context.db,
            _with_sources(context, spec),
            loaded.model,
            loaded.tokenizer,
            context.device,
            context.on_progress,
        )
        if correction is None:
            return None
        return (
            f"fitted the missing {factors_of_kind(correction.kind).noun} of checkpoint `{plan.checkpoint.name}` to "
            f"{correction.n_samples} samples of {correction.sources}, as `{variant}`"
        )

    return context.ranks.once(fit)


def _with_sources(context: IngestContext, spec: FitSpec) -> FitSpec:
    """Return a fit to the ingest's sources if the store has none of stage `finetune`."""
    with context.db.session() as session:
        has_finetune = session.scalar(select(Source.id).filter_by(stage="finetune")) is not None
    return spec if has_finetune else replace(spec, sources=context.spec.sources)


def build_path(
    context: IngestContext, plan: Plan, loaded: LoadedModel, corrector: Corrector
) -> tuple[SketchPath, str | None]:
    """Return the path from rendered samples to sketches, and a note if it takes one sample at a time.

    If one rank can't sketch in batches, none does: all ranks write equal sketches.
    """
    sketcher = GradientSketcher(oporp_of(context.sketcher), plan.placements, context.device, corrector)
    masked = is_masked(context.sketcher)
    path, local_reason = make_path(loaded.model, loaded.parameters, sketcher, masked=masked)
    reasons = [text for text in context.ranks.gather(local_reason) if text]
    reason = context.ranks.once(lambda: next(iter(reasons), None))
    if reason is None:
        return path, None
    if not local_reason:
        path.close()
        path = hook_path(loaded.model, loaded.parameters, sketcher, masked=masked)
    return path, f"checkpoint `{plan.checkpoint.name}` is sketched one sample at a time: {reason}"
