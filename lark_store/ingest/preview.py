"""`variant show`: one sample as a model sees it; `sketcher show`: what is sketched of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import polars as pl
from sqlalchemy import select

from lark_store.errors import InputError, NameUnknownError
from lark_store.ingest.checkpoints import verify
from lark_store.ingest.models import context_length, load_tokenizer, meta_model
from lark_store.ingest.sketchers import check_ours, chosen_of
from lark_store.ingest.sources import Sample
from lark_store.ingest.variants import Renderer, UnusableSampleError, show
from lark_store.schema.catalog import Checkpoint, FormatVariant, Sketcher, Source
from lark_store.schema.database import Database, find
from lark_store.schema.vectors import where

if TYPE_CHECKING:
    from lark_store.schema.records import RenderedSample


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
                    "a tokenizer is needed, and there is no checkpoint yet",
                    "add one with `lark-store checkpoint add`",
                )
        else:
            newest = find(session, Checkpoint, checkpoint)
    chosen = {"sample_id": sample} | ({"source": source} if source else {})
    rows = db.vectors.read("samples", ["source", "sample_id", "prompt", "response", "text"], where(**chosen)).to_dicts()
    if not rows:
        known = db.vectors.read("samples", ["sample_id"], where(source=source) if source else None)["sample_id"]
        raise NameUnknownError.of("sample", sample, known.to_list(), "add a source with `lark-store source add`")
    if len(rows) > 1:
        names = ", ".join(f"`{row['source']}`" for row in rows)
        raise InputError(f"sample `{sample}` is in {names}", "say which with `--source NAME`")
    row = rows[0]
    folder = verify(newest).folder
    renderer = Renderer(format_variant, load_tokenizer(folder), context_length(meta_model(folder)))
    name = row.pop("source")
    try:
        return show(renderer, name, Sample(**row))
    except UnusableSampleError as error:
        raise InputError(
            f"sample `{sample}` can't be used as `{variant}`: {error}", "ingest records it as failed"
        ) from error


def taken(db: Database, sketcher: str, checkpoint: str) -> pl.DataFrame:
    """List a model's parameters and which of them a sketcher takes; see `Store.sketcher_show`."""
    with db.session() as session:
        row, of = check_ours(find(session, Sketcher, sketcher)), find(session, Checkpoint, checkpoint)
    model = meta_model(verify(of).folder)
    chosen = {name for name, _ in chosen_of(row, model)}
    rows = [(name, list(p.shape), p.numel(), name in chosen) for name, p in model.named_parameters()]
    kinds: dict[str, Any] = {
        "parameter": pl.String,
        "shape": pl.List(pl.Int64),
        "coordinates": pl.Int64,
        "sketched": pl.Boolean,
    }
    return pl.DataFrame(rows, schema=kinds, orient="row")
