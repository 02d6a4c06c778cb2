"""Add new samples to a source, or replace changed ones."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from lark_store.core.names import check_name
from lark_store.errors import InputError
from lark_store.ingest.sample_filter import SampleFilter, Spool
from lark_store.modeling.forms import check_columns, needed
from lark_store.readers.inputs import ReadOptions, open_input
from lark_store.results import SourceReport
from lark_store.schema.catalog import STAGES, Source
from lark_store.schema.chats import CONTENT
from lark_store.schema.checksums import with_checksums
from lark_store.schema.database import Database, add_named, find_same
from lark_store.schema.table_schemas import SAMPLES
from lark_store.schema.vectors import ROWS_PER_TEXT_BATCH, where

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lark_store.modeling.sample import Sample
    from lark_store.readers import Row
    from lark_store.readers.inputs import Input
    from lark_store.specs import SourceSpec

    Forget = Callable[[list[str]], None]

_CHUNK_CHARACTERS = 1 << 25
_N_PREVIEWS = 3


def _chunks(samples: Iterator[Sample]) -> Iterator[list[Sample]]:
    """Cut samples into chunks to write, limited by count and characters."""
    chunk: list[Sample] = []
    size = 0
    for sample in samples:
        chunk.append(sample)
        size += sum(len(part) for part in sample.content if part)
        if len(chunk) >= ROWS_PER_TEXT_BATCH or size >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _batches(source: str, samples: Iterator[Sample]) -> Iterator[pa.RecordBatch]:
    for chunk in _chunks(samples):
        rows = [
            {
                "source": source,
                "sample_id": s.sample_id,
                **dict(zip(CONTENT, s.content, strict=True)),
                "label": s.label,
                "meta": json.dumps(s.meta, ensure_ascii=False, default=str, sort_keys=True, allow_nan=False),
                "content_sha256": s.content_sha256,
            }
            for s in chunk
        ]
        yield with_checksums(pa.RecordBatch.from_pylist(rows, schema=SAMPLES))


def _append_all_or_nothing(db: Database, batches: Iterator[pa.RecordBatch]) -> None:
    """Append batches in one commit. An error in their iterator propagates unchanged and leaves no rows."""
    failure: list[Exception] = []

    def watched(first: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
        try:
            yield first
            yield from batches
        except Exception as error:
            failure.append(error)
            raise

    first = next(batches, None)
    if first is None:
        return
    table = db.vectors.table("samples")
    try:
        table.add(pa.RecordBatchReader.from_batches(SAMPLES, watched(first)))
    except Exception as error:
        raise (failure[0] if failure else error) from error
    db.vectors.refresh_indices(table)


def _replace(db: Database, batches: Iterator[pa.RecordBatch], forget: Forget) -> None:
    """Replace the samples with these ids, batch by batch.

    Results of the old text are removed first, so they never exist beside the new text. After an interruption, the old
    sample has no sketches, and adding the rows again continues.
    """
    for batch in batches:
        forget(batch.column("sample_id").to_pylist())
        db.vectors.put(db.vectors.table("samples"), batch, ["source", "sample_id"])
    db.vectors.refresh_indices(db.vectors.table("samples"))


def add_source(db: Database, name: str, data: Any, spec: SourceSpec, *, forget: Forget | None = None) -> SourceReport:
    """Add a source, or new samples of a source; see `Store.source_add`.

    With `forget`, which removes all results of the samples with the given ids, changed rows replace stored samples.
    """
    check_name(name)
    if spec.stage not in STAGES:
        raise InputError(f"unknown stage `{spec.stage}`", f"the stages are {', '.join(f'`{s}`' for s in STAGES)}")
    check_columns(spec.columns)
    given = open_input(data, ReadOptions(spec.config, spec.split, spec.input_format))
    new = Source(
        name=name, stage=spec.stage, domain=spec.domain, uri=given.uri, licence=spec.licence, columns=dict(spec.columns)
    )
    identity = tuple(c for c in ("stage", "domain", "licence") if getattr(new, c) is not None)
    with db.session() as session:
        source = find_same(session, new, identity)
    columns = dict(spec.columns) or (source.columns if source else {})
    contents = dict(db.vectors.read("samples", ["sample_id", "content_sha256"], where(source=name)).iter_rows())
    is_stripped = bool(source and source.is_stripped)
    with Spool() as replaced:
        samples = SampleFilter(contents, columns, replaced if spec.replace else None, is_stripped=is_stripped)
        first: list[Sample] = []
        if spec.dry_run:
            first = _read_only(samples, given)
        else:
            _append_all_or_nothing(db, _batches(name, samples.new(samples.samples(given))))
        if forget and samples.counts["replaced"]:
            _replace(db, _batches(name, replaced.read()), forget)
    if samples.counts["read"] == samples.counts["empty"]:
        empty = samples.counts["empty"]
        raise InputError(f"`{given.uri}` holds no samples ({empty} empty rows)", f"a row needs {needed()}")
    if not spec.dry_run:
        with db.session() as session:
            add_named(session, new, identity)
    return _report(db, name, samples, first)


def _read_only(samples: SampleFilter, given: Input) -> list[Sample]:
    """Count all samples; return the first ones."""
    first: list[Sample] = []

    def watched() -> Iterator[tuple[Row, Sample]]:
        for row, sample in samples.samples(given):
            if len(first) < _N_PREVIEWS:
                first.append(sample)
            yield row, sample

    for _ in samples.new(watched()):
        pass
    return first


def _report(db: Database, name: str, samples: SampleFilter, first: list[Sample]) -> SourceReport:
    from lark_store.ingest.source_preview import previews

    return SourceReport(
        name=name,
        **{f"n_{key}": count for key, count in samples.counts.items()},
        examples=samples.examples,
        summary=samples.summary.line(),
        forms=samples.summary.rows,
        notes=samples.summary.notes(),
        previews=previews(db, first),
    )
