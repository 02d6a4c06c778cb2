"""The first samples of a dry run: as they would be stored, and as the newest checkpoint's model would see them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import select

from lark_store.errors import LarkStoreError
from lark_store.schema.catalog import Checkpoint, FormatVariant
from lark_store.schema.chats import dialogue

if TYPE_CHECKING:
    from lark_store.modeling.rendering import Renderer
    from lark_store.modeling.sample import Sample
    from lark_store.schema.database import Database


def previews(db: Database, samples: list[Sample]) -> list[dict[str, str]]:
    """Preview samples. They are rendered in the variant `chatml`, a text or a completion in `raw`."""
    if not samples:
        return []
    with db.session() as session:
        newest = session.scalar(select(Checkpoint).order_by(Checkpoint.id.desc()))
        variants = {row.name: row for row in session.scalars(select(FormatVariant))}
    stored = [{"sample_id": sample.sample_id, "content": _content(sample)} for sample in samples]
    if newest is None:
        return stored
    names = [_variant_of(sample) for sample in samples]
    try:
        renderers = {name: _renderer(newest, variants[name]) for name in set(names) & variants.keys()}
    except LarkStoreError as error:
        return [preview | {"note": f"checkpoint `{newest.name}`: {error.fact}"} for preview in stored]
    return [
        preview | _rendered(renderers.get(name), sample)
        for preview, name, sample in zip(stored, names, samples, strict=True)
    ]


def _content(sample: Sample) -> str:
    return sample.whole if sample.messages is None else dialogue(sample.messages)


def _variant_of(sample: Sample) -> str:
    return "raw" if sample.text is not None or sample.completion is not None else "chatml"


def _renderer(checkpoint: Checkpoint, variant: FormatVariant) -> Renderer:
    from lark_store.modeling.checkpoints import verify
    from lark_store.modeling.loading import context_length, load_tokenizer, meta_model
    from lark_store.modeling.rendering import Renderer

    folder = verify(checkpoint).folder
    return Renderer(variant, load_tokenizer(folder), context_length(meta_model(folder)))


def _rendered(renderer: Renderer | None, sample: Sample) -> dict[str, str]:
    from lark_store.modeling.encoded import UnusableSampleError
    from lark_store.modeling.rendering import show

    if renderer is None:
        return {"note": f"the store has no variant `{_variant_of(sample)}`"}
    name = renderer.variant.name
    try:
        return {"variant": name, "rendered": show(renderer, "", sample).marked}
    except UnusableSampleError as error:
        return {"note": f"`{name}`: {error}"}
