"""Column types of the catalog that SQLite's STRICT tables and PostgreSQL share."""

from __future__ import annotations

import datetime as dt
import json
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from sqlalchemy import REAL, BigInteger, Double, Integer, Text, TypeDecorator

from lark_store.errors import StoreError
from lark_store.schema.faults import CHECK_HINT

if TYPE_CHECKING:
    from sqlalchemy import Dialect
    from sqlalchemy.types import TypeEngine

V = TypeVar("V")

Real: TypeEngine[float] = Double().with_variant(REAL(), "sqlite")
Big: TypeEngine[int] = BigInteger().with_variant(Integer(), "sqlite")


class UnreadableValueError(StoreError):
    """A catalog value can't be decoded. `Database.session` adds the row to the message."""

    @classmethod
    def of(cls, value: str, kind: str) -> UnreadableValueError:
        """Return the error for a value that is not a `kind`."""
        return cls(f"the catalog holds `{value[:60]}` instead of {kind}", CHECK_HINT)


class TextValue(TypeDecorator[V]):
    """A value stored as text. Subclasses encode and decode it."""

    impl = Text
    cache_ok = True
    kind: ClassVar[str]

    def encode(self, value: V) -> str:
        """Return the value as text."""
        raise NotImplementedError

    def decode(self, text: str) -> V:
        """Return the value of a text, or raise ValueError or TypeError."""
        raise NotImplementedError

    def process_bind_param(self, value: V | None, dialect: Dialect) -> str | None:  # noqa: ARG002
        """Encode a value; None stays None."""
        return None if value is None else self.encode(value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> V | None:  # noqa: ARG002
        """Decode a stored value; None stays None.

        Raises
        ------
        UnreadableValueError
        """
        if value is None:
            return None
        try:
            return self.decode(value)
        except (ValueError, TypeError, RecursionError) as error:
            raise UnreadableValueError.of(str(value), self.kind) from error


class Json(TextValue[dict[str, Any]]):
    """A JSON object, stored with sorted keys."""

    kind = "a JSON object"
    cache_ok = True

    def encode(self, value: dict[str, Any]) -> str:
        """Return the object as JSON with sorted keys."""
        return json.dumps(value, sort_keys=True, ensure_ascii=False)

    def decode(self, text: str) -> dict[str, Any]:
        """Parse the JSON object."""
        value = json.loads(text)
        if not isinstance(value, dict):
            raise TypeError(text)
        return value


class UtcTime(TextValue[dt.datetime]):
    """A point in time, stored as ISO 8601 text in UTC."""

    kind = "a time"
    cache_ok = True

    def encode(self, value: dt.datetime) -> str:
        """Return the time in UTC with microseconds, so that text order is time order."""
        return value.astimezone(dt.UTC).isoformat(timespec="microseconds")

    def decode(self, text: str) -> dt.datetime:
        """Parse the time."""
        value = dt.datetime.fromisoformat(text)
        if value.tzinfo is None:
            raise UnreadableValueError.of(text, "a time with a time zone")
        return value
