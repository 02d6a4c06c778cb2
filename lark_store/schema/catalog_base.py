"""The base of the catalog's models: names of constraints, column types and the rows' checksums."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING, Any

from sqlalchemy import Column, MetaData, Text, TypeDecorator, event
from sqlalchemy.orm import DeclarativeBase, Mapped, Mapper, mapped_column

from lark_store.schema.checksums import CHECKSUM, checksum
from lark_store.schema.column_types import Big, Json, Real, UtcTime

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy import Connection, Table

NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    "pk": "pk_%(table_name)s",
}
STRICT = {"sqlite_strict": True}
UNCHECKED = "unchecked"  # key in `Column.info`: the row's checksum does not cover the column


def one_of(column: str, values: tuple[str, ...]) -> str:
    """Return the SQL condition for a text column to be one of `values`."""
    return f"{column} IN ({', '.join(repr(v) for v in values)})"


def now() -> dt.datetime:
    """Return the current time in UTC."""
    return dt.datetime.now(dt.UTC)


class Base(DeclarativeBase):
    """Base of all catalog models."""

    metadata = MetaData(naming_convention=NAMING)
    type_annotation_map = {str: Text, float: Real, dict[str, Any]: Json, dt.datetime: UtcTime}  # noqa: RUF012


class Checked(Base):
    """A row with a checksum of all columns except its id; null in rows of older versions.

    The checksum is set on flush, so write these rows as objects, not with `insert` or `update`.
    """

    __abstract__ = True

    checksum: Mapped[int | None] = mapped_column(Big, default=None, sort_order=99)


def row_checksum(table: Table, stored: Mapping[str, Any]) -> int:
    """Return the checksum of a row of `table` from its stored values (JSON and times as text)."""
    columns = (c.name for c in table.columns if c.name not in {"id", CHECKSUM} and UNCHECKED not in c.info)
    return checksum({"table": table.name} | {name: stored[name] for name in columns})


def _stored(column: Column[Any], value: Any) -> Any:
    """Return a value in its stored form."""
    if value is None:
        return None
    if isinstance(column.type, TypeDecorator):
        return column.type.process_bind_param(value, None)  # type: ignore[arg-type]
    kind = column.type.python_type
    return kind(value) if kind in {int, float} else value


def _set_checksum(mapper: Mapper[Any], _connection: Connection, row: Checked) -> None:
    table: Any = mapper.local_table
    for column in table.columns:  # set defaults now; the database or SQLAlchemy would set them after the flush
        default = column.default or column.server_default
        if getattr(row, column.key) is None and default is not None:
            setattr(row, column.key, default.arg(None) if callable(default.arg) else default.arg)
    row.checksum = row_checksum(table, {c.name: _stored(c, getattr(row, c.key)) for c in table.columns})


event.listen(Checked, "before_insert", _set_checksum, propagate=True)
event.listen(Checked, "before_update", _set_checksum, propagate=True)


class Named(Checked):
    """The common columns of named objects."""

    __abstract__ = True

    id: Mapped[int] = mapped_column(primary_key=True, sort_order=-2)
    name: Mapped[str] = mapped_column(unique=True, sort_order=-1)
    created_at: Mapped[dt.datetime] = mapped_column(default=now, sort_order=1)
