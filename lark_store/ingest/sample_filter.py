"""Compare the samples of a file with those of a source: new, known, changed, replaced."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Self

from lark_store.modeling.forms.rows import RowReader, make_sample
from lark_store.modeling.forms.summary import Summary
from lark_store.modeling.sample import Sample

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from lark_store.readers import Row
    from lark_store.readers.inputs import Input


class Spool:
    """Samples in a temporary file, in the order in which they were added; a context manager."""

    def __enter__(self) -> Self:
        self._file = tempfile.TemporaryFile("w+", encoding="utf-8", newline="\n")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, sample: Sample) -> None:
        """Add a sample."""
        self._file.write(json.dumps(asdict(sample), default=str, allow_nan=False) + "\n")

    def read(self) -> Iterator[Sample]:
        """Yield the samples."""
        self._file.seek(0)
        return (Sample(**json.loads(line)) for line in self._file)


class SampleFilter:
    """Passes new samples and counts all rows.

    Changed samples are kept in `replaced`, if it is given. Of several rows with one id, the first counts.

    Older versions stripped white space from texts and ids, and made ids from stripped texts. In their sources
    (`is_stripped`), a row that matches such a sample counts as `stripped`. With `replaced`, its exact text replaces the
    sample under the sample's id.
    """

    def __init__(
        self, contents: dict[str, str], columns: dict[str, str], replaced: Spool | None, *, is_stripped: bool
    ) -> None:
        self.replaced = replaced
        self.is_stripped = is_stripped
        self.contents = contents
        self.in_store = frozenset(contents)
        self.matched: set[str] = set()  # ids in `in_store` with a row in this file
        self.columns = columns
        self.counts = dict.fromkeys(
            ("read", "added", "existing", "duplicate", "empty", "changed", "replaced", "stripped"), 0
        )
        self.examples: dict[str, list[str]] = {}
        self.summary = Summary()

    def _count(self, outcome: str, example: str) -> None:
        self.counts[outcome] += 1
        if len(self.examples.setdefault(outcome, [])) < 3:
            self.examples[outcome].append(example)

    def samples(self, data: Input) -> Iterator[tuple[Row, Sample]]:
        """Yield (row, sample) and count the rows."""
        reader = RowReader(self.columns)
        for place, rows in data.parts:
            where = "" if place == data.uri else f"{place}, "
            for number, row, form, samples in reader.read(rows, place):
                self.counts["read"] += 1
                self.summary.add(form, samples)
                if not samples:
                    self._count("empty", f"{where}row {number}")
                for sample in samples:
                    yield row, sample

    def new(self, pairs: Iterable[tuple[Row, Sample]]) -> Iterator[Sample]:
        """Yield the samples new to the source."""
        for row, sample in pairs:
            if self._is_new(row, sample):
                yield sample

    def _is_new(self, row: Row, sample: Sample) -> bool:
        """Count a sample; return whether the source lacks it."""
        name, content = sample.sample_id, sample.content_sha256
        stored = self.contents.get(name)
        older = None if stored == content else self._older(row, sample)
        if stored == content:
            self._count("existing" if name in self.in_store else "duplicate", name)
        elif older is not None:
            self._match(older, sample)
        elif stored is None:
            self.contents[name] = content
            self.counts["added"] += 1
            return True
        elif self.replaced and name in self.in_store and name not in self.matched:
            self._put(self.replaced, name, sample)
        else:
            self._count("changed", name)
        self.matched.add(name)
        return False

    def _put(self, replaced: Spool, name: str, sample: Sample) -> None:
        """Keep a sample that replaces the stored one with this id."""
        replaced.add(replace(sample, sample_id=name))
        self.contents[name] = sample.content_sha256
        self.counts["replaced"] += 1

    def _older(self, row: Row, sample: Sample) -> str | None:
        """Return the id of the stored sample that an older version made from this row, or None."""
        is_newer_form = sample.messages is not None or sample.completion is not None
        if not self.is_stripped or not self.in_store or is_newer_form:
            return None
        older = make_sample(row, self.columns, strip=True)
        assert older is not None
        name, content = older.sample_id, sample.content_sha256
        identity = (name, older.content_sha256)
        if name not in self.in_store or name in self.matched or identity == (sample.sample_id, content):
            return None
        contents = (older.content_sha256, content) if name != sample.sample_id else (older.content_sha256,)
        return name if self.contents[name] in contents else None

    def _match(self, older: str, sample: Sample) -> None:
        """Count a row whose sample an older version stored, or that was replaced under that id."""
        content, has_own_id = sample.content_sha256, sample.sample_id != sample.content_sha256[:16]
        if self.replaced and self.contents[older] != content:
            self._put(self.replaced, older, sample)
        else:
            self._count("existing", older)
            if self.contents[older] != content or has_own_id:
                self._count("stripped", older)
        self.contents[older] = self.contents[sample.sample_id] = content
        self.matched.add(older)
