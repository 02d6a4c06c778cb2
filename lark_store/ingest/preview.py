"""`variant show`: a sample as the model sees it. `sketcher show`: a model's sketched parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import polars as pl
from sqlalchemy import select

from lark_store.core.device import pick_device
from lark_store.errors import InputError, NameUnknownError
from lark_store.gradients.sketch.layout import check_not_imported, sketched_parameters
from lark_store.ingest.stored_answers import stored_answers
from lark_store.modeling.checkpoints import verify
from lark_store.modeling.encoded import UnusableSampleError
from lark_store.modeling.loading import context_length, load_model, load_tokenizer, meta_model
from lark_store.modeling.predicted_answers import AnswerPredictor
from lark_store.modeling.rendering import Renderer, show
from lark_store.modeling.sample import SAMPLE_COLUMNS, Sample
from lark_store.schema.catalog import Checkpoint, FormatVariant, Sketcher, Source
from lark_store.schema.database import Database, find
from lark_store.schema.vectors import where
from lark_store.specs import PREDICTED_ANSWER

if TYPE_CHECKING:
    from lark_store.modeling.checkpoints import ModelFolder
    from lark_store.modeling.predicted_answers import Predict
    from lark_store.results import RenderedSample


def preview(db: Database, variant: str, sample: str, source: str | None, checkpoint: str | None) -> RenderedSample:
    """Render one stored sample; see `Store.variant_show`."""
    with db.session() as session:
        format_variant = find(session, FormatVariant, variant)
        if source is not None:
            find(session, Source, source)
        if checkpoint is None:
            newest = session.scalar(select(Checkpoint).order_by(Checkpoint.id.desc()))
            if newest is None:
                raise InputError(
                    "rendering needs a checkpoint's tokenizer, and the store has no checkpoint",
                    "add one with `lark-store checkpoint add`",
                )
        else:
            newest = find(session, Checkpoint, checkpoint)
    key = {"sample_id": sample} | ({"source": source} if source else {})
    rows = db.vectors.read("samples", ["source", *SAMPLE_COLUMNS], where(**key)).to_dicts()
    if not rows:
        sample_ids = db.vectors.read("samples", ["sample_id"], where(source=source) if source else None)["sample_id"]
        raise NameUnknownError.of("sample", sample, sample_ids.to_list(), "add a source with `lark-store source add`")
    if len(rows) > 1:
        names = ", ".join(f"`{row['source']}`" for row in rows)
        raise InputError(f"sample `{sample}` is in several sources: {names}", "choose one with `--source NAME`")
    row = rows[0]
    folder = verify(newest).model
    renderer = Renderer(format_variant, load_tokenizer(folder), context_length(meta_model(folder)))
    name = row.pop("source")
    key = {"checkpoint": newest.name, "source": name, "variant": variant, "sample_id": sample}
    predict = _predict(db, renderer, folder, key) if format_variant.targets == PREDICTED_ANSWER else None
    try:
        return show(renderer, name, Sample.of_row(row), predict)
    except UnusableSampleError as error:
        raise InputError(
            f"sample `{sample}` can't be rendered as `{variant}`: {error}", "an ingest records it as failed"
        ) from error


def _predict(db: Database, renderer: Renderer, folder: ModelFolder, names: dict[str, str]) -> Predict:
    """Return the function that answers the prompt: with the stored answer, or else the loaded model's."""
    stored = stored_answers(db, names).get(names["sample_id"])
    if stored is not None:
        return lambda _: stored
    return AnswerPredictor(load_model(folder, pick_device("auto"), "auto"), renderer.tokenizer)


def list_parameters(db: Database, sketcher: str, checkpoint: str) -> pl.DataFrame:
    """List a model's parameters and whether a sketcher covers them; see `Store.sketcher_show`."""
    with db.session() as session:
        sketcher_row = check_not_imported(find(session, Sketcher, sketcher))
        checkpoint_row = find(session, Checkpoint, checkpoint)
    model = meta_model(verify(checkpoint_row).model)
    sketched = {name for name, _ in sketched_parameters(sketcher_row, model)}
    rows = [(name, list(p.shape), p.numel(), name in sketched) for name, p in model.named_parameters()]
    kinds: dict[str, Any] = {
        "parameter": pl.String,
        "shape": pl.List(pl.Int64),
        "coordinates": pl.Int64,
        "sketched": pl.Boolean,
    }
    return pl.DataFrame(rows, schema=kinds, orient="row")
