"""An open Lance table: pylance reads it, LanceDB writes it and is imported by the first write.

Both work on the same files. Importing lancedb takes two seconds, most of it for the models of a cloud client; pylance
takes a quarter of that. So commands that only read never import lancedb.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lark_store.core.fork import use_lance

if TYPE_CHECKING:
    from collections.abc import Callable

    import pyarrow as pa


class Table:
    """A table at one version; a write through it moves it to the version written.

    Methods not defined here (`add`, `delete`, `merge_insert`, `create_index`, `checkout_latest`, …) are LanceDB's.
    """

    def __init__(self, name: str, dataset: Any, open_lancedb: Callable[[], Any]) -> None:
        self.name = name
        self._dataset = dataset
        self._open_lancedb = open_lancedb
        self._lancedb: Any = None

    def to_lance(self) -> Any:
        """Return the table as a `lance.LanceDataset`."""
        if self._dataset is None:
            self._dataset = self._lancedb.to_lance()
        return self._dataset

    @property
    def version(self) -> int:
        """The number of the open version."""
        return int(self.to_lance().version if self._lancedb is None else self._lancedb.version)

    @property
    def schema(self) -> pa.Schema:
        """The columns and their types."""
        return self.to_lance().schema

    def count_rows(self, filter: str | None = None) -> int:  # noqa: A002  # as LanceDB has it
        """Count the rows, or those that satisfy a filter."""
        return int(self.to_lance().count_rows(filter))

    def __getattr__(self, name: str) -> Any:
        """Return a method of LanceDB's table, and read the table again after it."""
        if self._lancedb is None:
            self._lancedb = self._open_lancedb()
        self._dataset = None
        return getattr(self._lancedb, name)


def open_table(name: str, path: str, version: int | None, connect: Callable[[], Any]) -> Table:
    """Open the table at `path`, at a version or (None) its newest; `connect` returns the LanceDB connection."""
    use_lance()
    import lance

    def open_lancedb() -> Any:
        table = connect().open_table(name)
        if version is not None:
            table.checkout(version)
        return table

    return Table(name, lance.dataset(path, version=version), open_lancedb)
