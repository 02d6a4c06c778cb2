"""`variant show`: one sample as a model sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import select

from lark_store.errors import InputError, NameUnknownError
from lark_store.ingest.checkpoints import context_length, load_tokenizer, meta_model, verify
from lark_store.ingest.sources import Sample
from lark_store.ingest.variants import Renderer, UnusableSampleError, show
from lark_store.schema.catalog import Checkpoint, FormatVariant, Source
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
