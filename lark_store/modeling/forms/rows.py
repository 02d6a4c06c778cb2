"""Convert rows to samples, with their ids, labels and metadata."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lark_store.core.hashing import content_hash
from lark_store.errors import InputError
from lark_store.modeling.forms import fields_of_forms, forms_of
from lark_store.readers.fields import Fields, finite, id_columns, id_of, is_blank
from lark_store.readers.paths import without

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from lark_store.modeling.forms.base import Form
    from lark_store.modeling.sample import Sample
    from lark_store.readers import Row


def make_samples(row: Row, columns: Mapping[str, str], *, strip: bool = False) -> tuple[Form | None, list[Sample]]:
    """Convert a row to its samples, and return them with the form of the row; (None, []) if its texts are blank.

    If a row has columns of several forms, the first filled form counts. Columns that it doesn't use are metadata.
    `strip` removes white space around each text, as lark-store did before schema 0008.

    Raises
    ------
    InputError
        The row has no known form, a column without text, an invalid chat, or an invalid id.
    """
    fields = Fields(row, columns, strip=strip)
    for form in forms_of(fields):
        samples = form.read(fields)
        if samples:
            return form, _identified(form, samples, fields, strip=strip)
    return None, []


def make_sample(row: Row, columns: Mapping[str, str], *, strip: bool = False) -> Sample | None:
    r"""Convert a row to a sample with its exact texts and id; None if the texts are blank.

    `question`, `context` and `answer` become the prompt "Context: …\n\nQuestion: …" and its response.

    >>> make_sample({"id": 7, "question": "Is it?", "context": "It is.", "answer": "yes"}, {}).prompt
    'Context: It is.\n\nQuestion: Is it?'

    Raises
    ------
    InputError
        The row has no known form, a column without text, an invalid id, or two samples.
    """
    _, samples = make_samples(row, columns, strip=strip)
    if len(samples) > 1:
        raise InputError("this row is a pair of samples", "give one of its sides as `prompt` and `completion`")
    return samples[0] if samples else None


def _identified(form: Form, samples: list[Sample], fields: Fields, *, strip: bool) -> list[Sample]:
    """Return a row's samples with id, label and metadata."""
    column, own_id = id_of(fields.row, fields.columns)
    if own_id and strip:
        own_id = own_id.strip()
    contents = [sample.content_sha256 for sample in samples]
    name = own_id or (contents[0] if len(samples) == 1 else content_hash(*contents))[:16]
    label = fields.text("label")
    meta = finite(without(fields.row, _used(form, fields) | id_columns(fields.columns, column)))
    return [
        replace(
            sample,
            sample_id=name + sample.sample_id,
            label=label if label.strip() else None,
            meta=_merged(meta, sample.meta | (_pair(name, sample.sample_id) if sample.sample_id else {})),
        )
        for sample in samples
    ]


def _pair(name: str, ending: str) -> Row:
    return {"pair": name, "side": ending.removeprefix("#")}


def _merged(meta: Row, added: Row) -> Row:
    """Return metadata with further entries; a column with the name of one gets `_` behind its own."""
    renamed = {f"{key}_" if key in added else key: value for key, value in meta.items()}
    return renamed | added


def _used(form: Form, fields: Fields) -> set[str]:
    """Return the columns whose content the samples hold, and blank columns of other forms."""
    used = {name for name in (*form.fields, "label") if fields.has(name)}
    blank = {name for name in fields_of_forms() if fields.has(name) and is_blank(fields.value(name))}
    return {fields.column(name) for name in used | blank}


class RowReader:
    """Reads the samples of rows and checks that all rows have their ids in the same column."""

    def __init__(self, columns: Mapping[str, str]) -> None:
        self.columns = columns
        self._first: tuple[str, int, str | None] | None = None  # a row with samples, and the column of its id

    def read(
        self, rows: Iterable[Row], uri: str, start: int = 1
    ) -> Iterator[tuple[int, Row, Form | None, list[Sample]]]:
        """Yield (number, row, form, samples); (…, None, []) for an empty row.

        Raises
        ------
        InputError
            A row is unreadable, or only some rows have an id; the error names the row.
        """
        for number, row in enumerate(rows, start):
            place = f"`{uri}`, row {number}:"
            try:
                form, samples = make_samples(row, self.columns)
                if samples:
                    column, _ = id_of(row, self.columns)
                    self._first = self._first or (uri, number, column)
                    self._check_id_column(column, uri)
            except InputError as error:
                raise InputError(f"{place} {error.fact}", error.hint) from error
            except RecursionError as error:
                raise InputError(
                    f"{place} its metadata is nested too deeply", "remove that part or write it as a string"
                ) from error
            yield number, row, form, samples

    def _check_id_column(self, column: str | None, uri: str) -> None:
        """Refuse a row with its id in another column than the first row's."""
        assert self._first is not None
        file, number, before = self._first
        if column == before:
            return
        first = f"row {number}" if file == uri else f"row {number} of `{file}`"
        if column is None:
            fact = f"it has no id, but {first} has one in `{before}`"
        elif before is None:
            fact = f"it has an id in `{column}`, but {first} has none"
        else:
            fact = f"its id is in `{column}`, but the id of {first} is in `{before}`"
        raise InputError(fact, "give every row an id in the same column, or no row: ids are then hashes of the texts")


def samples_of(
    rows: Iterable[Row], columns: Mapping[str, str], uri: str, start: int = 1
) -> Iterator[tuple[int, Row, Sample | None]]:
    """Yield (number, row, sample), with sample None for an empty row; a pair yields two samples.

    Raises
    ------
    InputError
        A row is unreadable, or only some rows have an id; the error names the row.
    """
    for number, row, _, samples in RowReader(columns).read(rows, uri, start):
        if not samples:
            yield number, row, None
        for sample in samples:
            yield number, row, sample
