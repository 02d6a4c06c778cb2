"""`sample show` and `sample list`: samples as they are stored, sketched and rendered."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import polars as pl
from sqlalchemy import select

from lark_store.core.text import joined
from lark_store.errors import CheckpointError, InputError, NameUnknownError
from lark_store.modeling.encoded import UnusableSampleError
from lark_store.modeling.rendering import Renderer
from lark_store.modeling.sample import Sample
from lark_store.query.select.hints import quoted
from lark_store.query.select.queries import unknown_sample
from lark_store.query.sql.connection import connect, fetch
from lark_store.schema.catalog import Checkpoint, FormatVariant, Source
from lark_store.schema.chats import CONTENT, dialogue
from lark_store.schema.database import find
from lark_store.schema.vectors import where

if TYPE_CHECKING:
    from lark_store.schema.database import Database

_SKETCHES = """
    SELECT sketcher, checkpoint, variant, ingest_run, n_tokens, n_loss_tokens, n_cut, loss, grad_norm
    FROM sketches WHERE source = ? AND sample_id = ? ORDER BY ingest_run"""
_FAILURES = """
    SELECT checkpoint, variant, ingest_run, reason
    FROM failures WHERE source = ? AND sample_id = ? ORDER BY ingest_run"""
_RENDERED = {"variant": pl.String, "text": pl.String, "error": pl.String}


@dataclass(frozen=True)
class SampleDetails:
    """A sample: its parts and metadata, its sketches and failures, and its text in each format variant.

    `sketches` and `failures` have a row per checkpoint and variant. `rendered` has variant, text and error: one of the
    two is null. The texts are whole: `variant_show` shows where a long one is cut. Chat templates are those of
    `template_of`, the newest checkpoint; None if there is none.
    """

    source: str
    stage: str
    sample_id: str
    prompt: str | None
    response: str | None
    text: str | None
    completion: str | None
    messages: str | None
    tools: str | None
    label: str | None
    meta: dict[str, Any]
    sketches: pl.DataFrame
    failures: pl.DataFrame
    rendered: pl.DataFrame
    template_of: str | None

    @property
    def parts(self) -> dict[str, str]:
        """The texts that the sample has, by name; messages are a dialogue."""
        named = {name: getattr(self, name) for name in CONTENT}
        if self.messages is not None:
            named["messages"] = dialogue(self.messages)
        return {name: part for name, part in named.items() if part is not None}

    def frames(self) -> dict[str, pl.DataFrame]:
        """Return everything as frames by name; `sample` has one row, with the metadata as JSON."""
        names = ("source", "stage", "sample_id", *CONTENT, "label")
        row = {name: getattr(self, name) for name in names} | {"meta": json.dumps(self.meta, ensure_ascii=False)}
        sample = pl.DataFrame([row], schema=dict.fromkeys(row, pl.String))
        return {
            "sample": sample,
            "sketches": self.sketches,
            "failures": self.failures,
            "rendered": self.rendered,
        }


def sample_details(db: Database, name: str) -> SampleDetails:
    """Return a sample by `SOURCE/ID`, or by an id that only one source has; see `Store.sample_show`."""
    source, sample_id = find_sample(db, name)
    columns = [*CONTENT, "label", "meta"]
    (row,) = db.vectors.read("samples", columns, where(source=source, sample_id=sample_id)).to_dicts()
    meta = json.loads(row.pop("meta") or "{}")
    connection = connect(db, query=_SKETCHES + _FAILURES)
    try:
        sketches, failures = (fetch(connection, query, [source, sample_id]) for query in (_SKETCHES, _FAILURES))
    finally:
        connection.close()
    with db.session() as session:
        stage = find(session, Source, source).stage
        variants = list(session.scalars(select(FormatVariant).order_by(FormatVariant.id)))
        newest = session.scalar(select(Checkpoint).order_by(Checkpoint.id.desc()))
    parts = {field.name: row[field.name] for field in fields(Sample) if field.name in row}
    rendered = [_rendered(variant, newest, Sample(sample_id, meta=meta, **parts)) for variant in variants]
    return SampleDetails(
        source,
        stage,
        sample_id,
        **row,
        meta=meta,
        sketches=sketches,
        failures=failures,
        rendered=pl.DataFrame(rendered, schema=_RENDERED, orient="row"),
        template_of=newest.name if newest else None,
    )


def _rendered(
    variant: FormatVariant, checkpoint: Checkpoint | None, sample: Sample
) -> tuple[str, str | None, str | None]:
    """Return a variant's name and the sample's text in it, or else the reason why there is none."""
    from lark_store.modeling.chat_templates import ChatTemplate, chat_template_of

    template = ChatTemplate(None, {})
    try:
        if variant.template == "chatml" and checkpoint is not None:
            template = chat_template_of(checkpoint)
        return variant.name, Renderer(variant, template).text(sample), None
    except UnusableSampleError as error:
        return variant.name, None, str(error)
    except (CheckpointError, InputError) as error:
        return variant.name, None, error.fact


def find_sample(db: Database, name: str) -> tuple[str, str]:
    """Return the source and the id of a sample by its name.

    Raises
    ------
    NameUnknownError
    InputError
        Several sources have the id.
    """
    source, slash, sample_id = name.partition("/")
    with db.session() as session:
        is_source = bool(slash) and session.scalar(select(Source.id).filter_by(name=source)) is not None
    if is_source and len(db.vectors.read("samples", ["sample_id"], where(source=source, sample_id=sample_id))):
        return source, sample_id
    having = sorted(set(db.vectors.read("samples", ["source"], where(sample_id=name))["source"]))
    if len(having) > 1:
        names = joined((f"`{found}/{name}`" for found in having), "or")
        raise InputError(f"sample `{name}` is in several sources: {quoted(having)}", f"write {names}")
    if having:
        return having[0], name
    if is_source:
        raise unknown_sample(db, source, sample_id)
    ids = db.vectors.read("samples", ["sample_id"])["sample_id"].to_list()
    raise NameUnknownError.of("sample", name, ids, "add a source with `lark-store source add`", n=3)


def list_samples(db: Database, source: str, condition: str | None, limit: int, offset: int) -> pl.DataFrame:
    """Return samples of a source in its order; see `Store.sample_list`."""
    for option, value, least in (("--limit", limit, 1), ("--offset", offset, 0)):
        if value < least:
            raise InputError(f"`{option}` must be at least {least}, not {value}", f"leave out `{option}`")
    with db.session() as session:
        row = find(session, Source, source)
    ids = db.vectors.read("samples", ["sample_id"], where(source=source)).with_row_index("_number")
    if condition is not None:
        from lark_store.query.select.where import satisfying

        names = {"source": source, "stage": row.stage, "domain": row.domain}
        frame = ids.with_columns(pl.lit(value, pl.String).alias(name) for name, value in names.items())
        ids = ids.filter(satisfying(db, frame, condition))
    ids = ids.slice(offset, limit)
    columns = ["sample_id", *CONTENT, "label", "meta"]
    samples = db.vectors.read("samples", columns, where(source=source, sample_id=ids["sample_id"].to_list()))
    return ids.join(samples, on="sample_id", maintain_order="left").drop("_number")
