"""Text rows to samples: read a file, a folder or a Hugging Face dataset, and add what is new to a source."""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from lark_store.errors import InputError
from lark_store.schema.catalog import STAGES, Source
from lark_store.schema.database import Database, add_named, known_as
from lark_store.schema.names import check_name
from lark_store.schema.records import SourceReport
from lark_store.schema.vectors import ROWS_PER_TEXT_BATCH, SAMPLES, where

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

Row = dict[str, Any]
FIELDS = ("sample_id", "prompt", "response", "question", "context", "answer", "text", "label")
_FORMS = "`prompt` and `response`, or `question`, `answer` and maybe `context`, or `text`"


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


def content_hash(*parts: str | None) -> str:
    """Return the SHA-256 of some texts, None and empty told apart."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).hexdigest()


# --- reading -------------------------------------------------------------------------------------------------------


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(
                    f"`{path}`, line {number}, is not JSON: {error.msg} at column {error.colno}",
                    "each line of a .jsonl file is one JSON object",
                ) from error
            if not isinstance(row, dict):
                raise InputError(f"`{path}`, line {number}, is not a JSON object", 'for example {"text": "…"}')
            yield row


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow.parquet as pq

    for batch in pq.ParquetFile(path).iter_batches(batch_size=ROWS_PER_TEXT_BATCH):
        yield from batch.to_pylist()


def _read_csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(1 << 30)
    with path.open(encoding="utf-8-sig", newline="") as lines:
        yield from csv.DictReader(lines, delimiter="\t" if path.suffix == ".tsv" else ",")


def _read_dataset(name: str, config: str | None, split: str | None) -> Iterator[Row]:
    import datasets

    try:
        if (Path(name) / "state.json").is_file() or (Path(name) / "dataset_dict.json").is_file():
            data = datasets.load_from_disk(name)
            data = data if split is None or isinstance(data, datasets.Dataset) else data[split]
        else:
            data = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the library raises many kinds: no network, no such name, no such config
        fact = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"`{name}` can't be read as a dataset: {fact}",
            "give a file (.jsonl, .parquet, .csv), a folder made by `save_to_disk`, or a Hugging Face name with "
            "`--config` and `--split`",
        ) from error
    if not isinstance(data, datasets.Dataset):
        raise InputError(f"`{name}` has splits {', '.join(f'`{s}`' for s in data)}", "choose one with `--split`")
    yield from data


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".tsv": _read_csv,
}


def read_rows(uri: str, config: str | None = None, split: str | None = None) -> Iterator[Row]:
    """Stream the rows of a .jsonl, .parquet, .csv or .tsv file, a folder, or a Hugging Face dataset.

    Raises
    ------
    InputError
        The path is wrong, the format unknown, or a row can't be read; it names the line where it can.
    """
    path = Path(uri)
    reader = _READERS.get(path.suffix.lower())
    if path.is_dir() or (reader is None and not path.exists()):
        if (
            reader
            or path.suffix in {".json", ".txt", ".gz"}
            or (uri.startswith(("/", "./", "../")) and not path.exists())
        ):
            raise InputError(f"there is no file `{uri}`", "check the path")
        yield from _read_dataset(uri, config, split)
        return
    if reader is None:
        raise InputError(f"`{uri}` has an unknown format", f"known are {', '.join(_READERS)} and datasets")
    if not path.is_file():
        raise InputError(f"there is no file `{uri}`", "check the path")
    try:
        yield from reader(path)
    except UnicodeDecodeError as error:
        raise InputError(f"`{uri}` is not UTF-8: {error.reason} at byte {error.start}", "save it as UTF-8") from error
    except (pa.ArrowException, csv.Error, OSError) as error:
        raise InputError(
            f"`{uri}` can't be read: {error}", "is the file whole, and of the format its name says?"
        ) from error


# --- rows to samples -----------------------------------------------------------------------------------------------


def _column(row: Row, path: str) -> tuple[bool, Any]:
    """Return whether `row` has the column, and its value; `a.b` reaches into a nested column."""
    value: Any = row
    for part in [path] if path in row else path.split("."):
        if not isinstance(value, dict) or part not in value:
            return False, None
        value = value[part]
    return True, value


def _text(name: str, value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return "\n".join(value).strip()
    if isinstance(value, dict | list):
        raise InputError(
            f"column `{name}` holds {type(value).__name__}, not text",
            f"name the part that is text, for example `--map {name}={name}.contexts`",
        )
    return str(value).strip()


def make_sample(row: Row, columns: dict[str, str]) -> Sample | None:
    r"""Turn a row into a sample; None if it is empty.

    `question`, `context` and `answer` become the prompt "Context: …\n\nQuestion: …" and its response.

    >>> make_sample({"id": 7, "question": "Is it?", "context": "It is.", "answer": "yes"}, {}).prompt
    'Context: It is.\n\nQuestion: Is it?'

    Raises
    ------
    InputError
        The row has none of the known forms, or a column that holds no text.
    """
    found: dict[str, str] = {}
    for name in FIELDS:
        has, value = _column(row, columns.get(name, name))
        if has:
            found[name] = _text(name, value)
        elif name in columns:
            raise InputError(f"there is no column `{columns[name]}`", f"the columns are {_listed(row)}")
    prompt = response = text = None
    if {"prompt", "response"} <= found.keys():
        prompt, response = found["prompt"], found["response"]
    elif {"question", "answer"} <= found.keys():
        prompt, response = _question(found), found["answer"]
    elif "text" in found:
        text = found["text"]
    else:
        raise InputError(
            f"a row needs {_FORMS}; it has {_listed(row)}",
            "map columns with `--map text=abstract` and the like",
        )
    if not (text or (prompt and response)):
        return None
    used = {columns.get(name, name).split(".")[0] for name in found} | {"id"}
    meta = {key: value for key, value in row.items() if key not in used}
    label = found.get("label") or None
    sample_id = found.get("sample_id") or _text("id", row.get("id")) or content_hash(prompt, response, text)[:16]
    return Sample(sample_id, prompt, response, text, label, meta)


def _question(found: dict[str, str]) -> str:
    if not found["question"]:
        return ""
    return (f"Context: {found['context']}\n\n" if found.get("context") else "") + f"Question: {found['question']}"


def _listed(row: Row) -> str:
    return ", ".join(f"`{key}`" for key in row) or "no columns"


# --- adding --------------------------------------------------------------------------------------------------------


class _Sieve:
    """Lets new samples through and counts the others."""

    def __init__(self, known: dict[str, str], columns: dict[str, str]) -> None:
        self.known = known
        self.in_store = set(known)
        self.columns = columns
        self.counts = dict.fromkeys(("read", "added", "existing", "duplicate", "empty", "changed"), 0)
        self.examples: dict[str, list[str]] = {}

    def _count(self, what: str, example: str) -> None:
        self.counts[what] += 1
        if len(self.examples.setdefault(what, [])) < 3:
            self.examples[what].append(example)

    def new(self, rows: Iterable[Row]) -> Iterator[Sample]:
        """Yield the samples that the source does not hold."""
        for number, row in enumerate(rows, start=1):
            self.counts["read"] += 1
            sample = make_sample(row, self.columns)
            if sample is None:
                self._count("empty", f"row {number}")
                continue
            content = sample.content_sha256
            if sample.sample_id not in self.known:
                self.known[sample.sample_id] = content
                self.counts["added"] += 1
                yield sample
            elif self.known[sample.sample_id] != content:
                self._count("changed", sample.sample_id)
            else:
                self._count("existing" if sample.sample_id in self.in_store else "duplicate", sample.sample_id)


def _batches(source: str, samples: Iterator[Sample]) -> Iterator[pa.RecordBatch]:
    while chunk := list(itertools.islice(samples, ROWS_PER_TEXT_BATCH)):
        rows = [
            {
                "source": source,
                "sample_id": s.sample_id,
                "prompt": s.prompt,
                "response": s.response,
                "text": s.text,
                "label": s.label,
                "meta": json.dumps(s.meta, ensure_ascii=False, default=str, sort_keys=True),
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
) -> SourceReport:
    """Add a source, or the samples of it that are new; see `Store.source_add`."""
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
    sieve = _Sieve(dict(known.iter_rows()), mapping)
    rows = read_rows(uri, config, split)
    _append_all_or_nothing(db, _batches(name, sieve.new(rows)))
    if sieve.counts["read"] == sieve.counts["empty"]:
        raise InputError(f"`{uri}` holds no samples ({sieve.counts['empty']} empty rows)", f"a row needs {_FORMS}")
    with db.session() as session:
        add_named(session, wanted, given)
    return SourceReport(
        name=name, **{f"n_{key}": count for key, count in sieve.counts.items()}, examples=sieve.examples
    )
