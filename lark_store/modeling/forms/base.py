"""What a form of rows is, and what all forms share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lark_store.core.text import coded, joined

if TYPE_CHECKING:
    from collections.abc import Callable

    from lark_store.modeling.sample import Sample
    from lark_store.readers.fields import Fields


def _any_row(_: Fields) -> bool:
    return True


@dataclass(frozen=True, kw_only=True)
class Form:
    """A form of rows: its fields, and how a row becomes samples.

    `read` returns a row's samples without label and metadata, or none if their texts are blank. The id of such a sample
    is an ending, added to the row's id. `fits` tells by their kind whether the values of the needed fields may belong
    to this form. `note` tells users about text that the form adds.
    """

    name: str
    needed: tuple[str, ...]
    optional: tuple[str, ...] = ()
    looks_like: str
    meaning: str
    read: Callable[[Fields], list[Sample]]
    fits: Callable[[Fields], bool] = _any_row
    note: str | None = None

    @property
    def fields(self) -> tuple[str, ...]:
        """All fields of the form."""
        return self.needed + self.optional

    @property
    def needs(self) -> str:
        """The needed fields in words: "`prompt` and `response`"."""
        return joined(coded(self.needed), "and")
