"""Find invalid catalog values: undecodable, or outside the range of their column."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import TypeDecorator, inspect, text

from lark_store.schema.catalog import METADATA, Run, SnapshotCopy, StoreMeta, WorkNote
from lark_store.schema.catalog_base import Base
from lark_store.schema.column_types import UnreadableValueError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Column, Connection, RowMapping, Table

_SKIPPED = {SnapshotCopy.__tablename__, WorkNote.__tablename__}  # their readers raise their own errors


@dataclass(frozen=True)
class WrongValue:
    """An invalid value: its table, the name or key of its row, its column, and the reason.

    `is_of_clock`: a time that a clock set back may have produced.
    """

    table: str
    row: str
    column: str
    reason: str
    is_unreadable: bool = False
    is_of_clock: bool = False

    def __str__(self) -> str:
        return f"`{self.column}` of {self.table} {self.row}: {self.reason}"


def wrong_values(connection: Connection) -> Iterator[WrongValue]:
    """Yield the invalid values of the catalog, read undecoded."""
    present = set(inspect(connection).get_table_names())
    for table in METADATA.sorted_tables:
        if table.name in present and table.name not in _SKIPPED:
            n_rows = 0
            for row in connection.execute(text(f"SELECT * FROM {table.name}")).mappings():  # noqa: S608
                n_rows += 1
                yield from _wrong_in_row(table, row)
            if table.name == StoreMeta.__tablename__ and not n_rows:
                yield WrongValue(table.name, "1", "id", "the row is missing")


def _wrong_in_row(table: Table, row: RowMapping) -> Iterator[WrongValue]:
    label = f"`{row['name']}`" if "name" in row else "/".join(str(row[c.name]) for c in table.primary_key)
    values: dict[str, Any] = {}
    for column in table.columns:
        if column.name not in row:  # an older schema
            continue
        try:
            values[column.name] = _decoded(column, row[column.name])
        except UnreadableValueError as error:
            yield WrongValue(table.name, label, column.name, error.fact, is_unreadable=True)
            continue
        reason = _out_of_range(column, values[column.name])
        if reason:
            yield WrongValue(table.name, label, column.name, reason)
    if issubclass(_MODELS.get(table.name, Base), Run):
        started, finished = values.get("started_at"), values.get("finished_at")
        if started and finished and finished < started:
            yield WrongValue(table.name, label, "finished_at", "the run finished before it started", is_of_clock=True)


_MODELS = {mapper.class_.__tablename__: mapper.class_ for mapper in Base.registry.mappers}


def _decoded(column: Column[Any], value: Any) -> Any:
    kind = column.type
    return kind.process_result_value(value, None) if isinstance(kind, TypeDecorator) else value  # type: ignore[arg-type]


def _out_of_range(column: Column[Any], value: Any) -> str | None:
    if value is None:
        return None if column.nullable else "is null"
    if isinstance(value, int | float) and value < 0 and (column.name.startswith("n_") or column.name in _POSITIVE):
        return f"{value} is negative"
    if column.name == "k" and value < 1:
        return f"{value} is not a valid number of bins"
    return None


_POSITIVE = {"seconds", "candidates"}
