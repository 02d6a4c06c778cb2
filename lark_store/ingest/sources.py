"""Rows to samples: find the texts in them, and add what is new to a source."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from lark_store.errors import InputError
from lark_store.ingest.readers import Row, read_rows
from lark_store.schema.catalog import STAGES, Source
from lark_store.schema.database import Database, add_named, known_as
from lark_store.schema.hashes import content_hash
from lark_store.schema.names import check_name
from lark_store.schema.records import SourceReport
from lark_store.schema.vectors import ROWS_PER_TEXT_BATCH, SAMPLES, where

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    Forget = Callable[[list[str]], None]

FIELDS = ("sample_id", "prompt", "response", "question", "context", "answer", "text", "label")
_CHUNK_CHARACTERS = 1 << 25
_FORMS = ({"prompt", "response"}, {"question", "answer"}, {"text"})
_NEEDED = "`prompt` and `response`, or `question`, `answer` and maybe `context`, or `text`"


@dataclass(frozen=True)
class Sample:
    """One text of a source: a `prompt` with its `response`, or a plain `text`."""

    sample_id: str
    prompt: str | None = None
    response: str | None = None
    text: str | None = None
    label: str | None = None
    meta: Row = field(default_factory=dict)

    @property
    def content_sha256(self) -> str:
        """The hash of what is learned from: prompt, response and text."""
        return content_hash(self.prompt, self.response, self.text)

    @property
    def whole(self) -> str:
        """The text, a prompt and its response as one."""
        return self.text if self.text is not None else f"{self.prompt}\n{self.response}"


# --- rows to samples -----------------------------------------------------------------------------------------------


def _parts(row: Row, column: str) -> list[str]:
    """Split `a.b`, which reaches into a nested column, unless a column has this very name."""
    return [column] if column in row else column.split(".")


def _column(row: Row, column: str) -> tuple[bool, Any]:
    """Return whether `row` has the column, and its value; what is within null is null."""
    value: Any = row
    for part in _parts(row, column):
        if value is None:
            return True, None
        if not isinstance(value, dict) or part not in value:
            return False, None
        value = value[part]
    return True, value


def _without(row: Row, parts: list[str]) -> Row:
    """Copy `row` without a column; of a nested one, what stands beside it is kept."""
    head, *inner = parts
    rest = {key: value for key, value in row.items() if key != head}
    if inner and isinstance(row.get(head), dict) and (beside := _without(row[head], inner)):
        rest[head] = beside
    return rest


def _finite(value: Any) -> Any:
    """Copy a value with None for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _text(field_name: str, column: str, value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return "\n".join(value).strip()
    other = f"map another column with `--map {field_name}=COLUMN`"
    if isinstance(value, dict) and value:
        raise InputError(
            f"column `{column}` holds dict, not text",
            f"map what is text in it with `--map {field_name}={column}.KEY`; its keys are {_listed(value)}",
        )
    if isinstance(value, list):
        kinds = " and ".join(sorted({type(part).__name__ for part in value}))
        raise InputError(f"column `{column}` holds list of {kinds}, not of text alone", other)
    if isinstance(value, dict | bytes | bytearray | memoryview):
        raise InputError(f"column `{column}` holds {type(value).__name__}, not text", other)
    return str(value).strip()


def _found(row: Row, columns: dict[str, str]) -> dict[str, str]:
    """Return the text of each field that the row has."""
    found: dict[str, str] = {}
    for name in FIELDS:
        column = columns.get(name, name)
        has, value = _column(row, column)
        if has:
            found[name] = _text(name, column, value)
        elif name in columns:
            raise InputError(f"there is no column `{column}`", f"the columns are {_listed(row)}")
    return found


def make_sample(row: Row, columns: dict[str, str]) -> Sample | None:
    r"""Turn a row into a sample; None if it is empty.

    `question`, `context` and `answer` become the prompt "Context: …\n\nQuestion: …" and its response. A row with the
    columns of several forms has the first form that is filled.

    >>> make_sample({"id": 7, "question": "Is it?", "context": "It is.", "answer": "yes"}, {}).prompt
    'Context: It is.\n\nQuestion: Is it?'

    Raises
    ------
    InputError
        The row has none of the known forms, or a column that holds no text.
    """
    found = _found(row, columns)
    forms = [form for form in _FORMS if form <= found.keys()]
    if not forms:
        raise InputError(
            f"a row needs {_NEEDED}; it has {_listed(row)}", "map columns with `--map text=abstract` and the like"
        )
    form = next((form for form in forms if all(found[name] for name in form)), None)
    if form is None:
        return None
    prompt = response = text = None
    if "text" in form:
        text = found["text"]
    elif "prompt" in form:
        prompt, response = found["prompt"], found["response"]
    else:
        prompt, response = _question(found), found["answer"]
    meta = row
    for column in {columns.get(name, name) for name in found}:
        meta = _without(meta, _parts(row, column))
    sample_id = found.get("sample_id")
    if not sample_id:
        sample_id = _text("sample_id", "id", row.get("id")) or content_hash(prompt, response, text)[:16]
        meta = _without(meta, ["id"])
    return Sample(sample_id, prompt, response, text, found.get("label") or None, _finite(meta))


def _question(found: dict[str, str]) -> str:
    return (f"Context: {found['context']}\n\n" if found.get("context") else "") + f"Question: {found['question']}"


def _listed(row: Row) -> str:
    return ", ".join(f"`{key}`" for key in row) or "no columns"


# --- adding --------------------------------------------------------------------------------------------------------


class _Sieve:
    """Lets new samples through and counts the others.

    With `replace`, a row with other content than the sample of its id is noted in `replaced`, unless an earlier row has
    this id: of several rows the first counts, each time the file is read.
    """

    def __init__(self, uri: str, known: dict[str, str], columns: dict[str, str], *, replace: bool) -> None:
        self.uri = uri
        self.replaceable = set(known) if replace else set()
        self.replaced: dict[str, str] = {}
        self.known = known
        self.in_store = set(known)
        self.columns = columns
        self.counts = dict.fromkeys(("read", "added", "existing", "duplicate", "empty", "changed", "replaced"), 0)
        self.examples: dict[str, list[str]] = {}

    def _count(self, what: str, example: str) -> None:
        self.counts[what] += 1
        if len(self.examples.setdefault(what, [])) < 3:
            self.examples[what].append(example)

    def _sample(self, number: int, row: Row) -> Sample | None:
        place = f"`{self.uri}`, row {number}:"
        try:
            return make_sample(row, self.columns)
        except InputError as error:
            raise InputError(f"{place} {error.fact}", error.hint) from error
        except RecursionError as error:
            raise InputError(
                f"{place} its metadata is nested too deeply", "leave that part out, or write it as a string"
            ) from error

    def new(self, rows: Iterable[Row]) -> Iterator[Sample]:
        """Yield the samples that the source does not hold."""
        for number, row in enumerate(rows, start=1):
            self.counts["read"] += 1
            sample = self._sample(number, row)
            if sample is None:
                self._count("empty", f"row {number}")
                continue
            content = sample.content_sha256
            if sample.sample_id not in self.known:
                self.known[sample.sample_id] = content
                self.counts["added"] += 1
                yield sample
            elif self.known[sample.sample_id] != content and sample.sample_id in self.replaceable:
                self.known[sample.sample_id] = self.replaced[sample.sample_id] = content
                self.counts["replaced"] += 1
            elif self.known[sample.sample_id] != content:
                self._count("changed", sample.sample_id)
            else:
                self._count("existing" if sample.sample_id in self.in_store else "duplicate", sample.sample_id)
            self.replaceable.discard(sample.sample_id)

    def replacing(self, rows: Iterable[Row]) -> Iterator[Sample]:
        """Yield, from the rows read once more, the samples that take another's place."""
        missing = dict(self.replaced)
        for number, row in enumerate(rows, start=1):
            sample = self._sample(number, row)
            if sample is not None and missing.get(sample.sample_id) == sample.content_sha256:
                del missing[sample.sample_id]
                yield sample
        if missing:
            raise InputError(f"`{self.uri}` changed while it was read", "run the command again")


def _chunks(samples: Iterator[Sample]) -> Iterator[list[Sample]]:
    """Cut samples into lists that are worth writing, of few where they are long."""
    chunk: list[Sample] = []
    size = 0
    for sample in samples:
        chunk.append(sample)
        size += sum(len(part) for part in (sample.prompt, sample.response, sample.text) if part)
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
                "prompt": s.prompt,
                "response": s.response,
                "text": s.text,
                "label": s.label,
                "meta": json.dumps(s.meta, ensure_ascii=False, default=str, sort_keys=True, allow_nan=False),
                "content_sha256": s.content_sha256,
            }
            for s in chunk
        ]
        yield pa.RecordBatch.from_pylist(rows, schema=SAMPLES)


def _append_all_or_nothing(db: Database, batches: Iterator[pa.RecordBatch]) -> None:
    """Append batches in one commit; an error while they are read is raised as it is and leaves nothing behind."""
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
    """Put samples in the place of those with their ids, batch by batch.

    What was made of the old text goes first, so that it never stands beside the new one; killed in between, the old
    sample is there without a sketch, and adding the rows again goes on.
    """
    for batch in batches:
        forget(batch.column("sample_id").to_pylist())
        db.vectors.put(db.vectors.table("samples"), batch, ["source", "sample_id"])
    db.vectors.refresh_indices(db.vectors.table("samples"))


def add_source(
    db: Database,
    name: str,
    uri: str,
    *,
    stage: str,
    domain: str | None = None,
    licence: str | None = None,
    columns: dict[str, str] | None = None,
    config: str | None = None,
    split: str | None = None,
    forget: Forget | None = None,
) -> SourceReport:
    """Add a source, or the samples of it that are new; see `Store.source_add`.

    With `forget`, which removes all that was made of the samples with the ids it gets, changed rows replace them.
    """
    check_name(name)
    if stage not in STAGES:
        raise InputError(f"`{stage}` is no stage", f"a stage is one of {', '.join(f'`{s}`' for s in STAGES)}")
    unknown = set(columns or {}) - set(FIELDS)
    if unknown:
        raise InputError(f"`{min(unknown)}` is no field of a sample", f"the fields are {', '.join(FIELDS)}")
    wanted = Source(name=name, stage=stage, domain=domain, uri=uri, licence=licence, columns=columns or {})
    given = tuple(c for c in ("stage", "domain", "licence") if getattr(wanted, c) is not None)
    with db.session() as session:
        source = known_as(session, wanted, given)
    mapping = columns or (source.columns if source else {})
    known = db.vectors.read("samples", ["sample_id", "content_sha256"], where(source=name))
    sieve = _Sieve(uri, dict(known.iter_rows()), mapping, replace=forget is not None)
    _append_all_or_nothing(db, _batches(name, sieve.new(read_rows(uri, config, split))))
    if forget and sieve.replaced:
        _replace(db, _batches(name, sieve.replacing(read_rows(uri, config, split))), forget)
    if sieve.counts["read"] == sieve.counts["empty"]:
        raise InputError(f"`{uri}` holds no samples ({sieve.counts['empty']} empty rows)", f"a row needs {_NEEDED}")
    with db.session() as session:
        add_named(session, wanted, given)
    return SourceReport(
        name=name, **{f"n_{key}": count for key, count in sieve.counts.items()}, examples=sieve.examples
    )
