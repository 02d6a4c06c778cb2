"""Read the corrections which a store holds."""

from __future__ import annotations

import transformers as hf

from lark_store.modeling.rendering import Renderer
from lark_store.modeling.sample import Sample
from lark_store.schema.catalog import FormatVariant
from lark_store.schema.database import find


def correction_rows(store):
    return store.sql("select * from corrections order by checkpoint").to_dicts()


def correction_files(store):
    return sorted(store._db.vectors.files.list("corrections"))


def render_samples(store, checkpoints, source, variant="chatml", n=None):
    """Render a source's samples, as an ingest does."""
    tokenizer = hf.AutoTokenizer.from_pretrained(checkpoints["base"])
    with store._db.session() as session:
        form = find(session, FormatVariant, variant)
    samples = store.sql(f"select sample_id, prompt, response, text from samples where source = '{source}'").to_dicts()
    return [Renderer(form, tokenizer, 256).render(Sample(**row)) for row in samples[:n]]
