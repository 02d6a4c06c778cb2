"""`Store`, maintenance: remove, optimize, upgrade, snapshots."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lark_store import migrations
from lark_store.results import StoreStatus
from lark_store.store.base import Part, location_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import polars as pl

    from lark_store.results import OnProgress, SnapshotInfo


class LifecycleMethods(Part):
    """The methods that remove, compact and preserve."""

    def sample_remove(self, source: str, sample_ids: Sequence[str], *, dry_run: bool = False) -> pl.DataFrame:
        """Remove samples of a source with everything derived from them: sketches, failures, influence.

        Score runs of their groups are superseded; `attribute` scores those groups again. Safe to kill at any moment: a
        second run finishes the work. Returns the removed rows (with `dry_run`, those that would be removed) as kind,
        table and rows. Snapshots are unaffected.

        Raises
        ------
        NameUnknownError
            A sample or the source does not exist; nothing is removed.
        StoreBusyError, InputError
        """
        from lark_store.maintenance.remove import remove_samples

        return remove_samples(self._writable, source, sample_ids, dry_run=dry_run)

    def source_remove(self, name: str, *, dry_run: bool = False) -> pl.DataFrame:
        """Remove a source: its samples, their sketches and failures, its runs and their influence.

        The name can be reused. Otherwise like `sample_remove`.

        Raises
        ------
        NameUnknownError, StoreBusyError
        """
        from lark_store.maintenance.remove import remove_source

        return remove_source(self._writable, name, dry_run=dry_run)

    def checkpoint_remove(self, name: str, *, dry_run: bool = False) -> pl.DataFrame:
        """Remove a checkpoint: its sketches and failures, its metrics, its runs and their influence.

        The checkpoint's own files stay where they are, except those of a model saved in the store. The name can be
        reused. Otherwise like `sample_remove`.

        Raises
        ------
        NameUnknownError, StoreBusyError
        """
        from lark_store.maintenance.remove import remove_checkpoint

        return remove_checkpoint(self._writable, name, dry_run=dry_run)

    def db_optimize(self, *, keep_versions_days: float = 7.0, on_progress: OnProgress | None = None) -> pl.DataFrame:
        """Compact small files, update the indices and delete old versions of the tables.

        Deletes versions older than `keep_versions_days`, except those of snapshots. Also deletes from the catalog runs
        that ended before then and have no rows left: superseded scores, ingests whose sketches were all removed. Other
        processes may read and write meanwhile; with 0 days a reader that started earlier may lose its version and must
        retry. Returns a row per table: rows, files and bytes before and after, seconds.

        Raises
        ------
        StoreBusyError
            Another such job is running, or the table was written to throughout.
        InputError
        """
        from lark_store.maintenance.compact import optimize

        return optimize(self._writable, keep_versions_days, on_progress)

    @staticmethod
    def db_status(path: str | Path | None = None) -> StoreStatus:
        """Return the schema version of the store at `path` and of this lark-store, and each table's size on disk.

        Raises
        ------
        NotAStoreError
        """
        import polars as pl

        from lark_store.maintenance.disk_usage import TABLES, tables

        location = location_of(path)
        current, supported = migrations.version(location), migrations.newest()
        return StoreStatus(
            current, supported, tables(location) if current == supported else pl.DataFrame(schema=TABLES)
        )

    @staticmethod
    def db_upgrade(path: str | Path | None = None) -> Path | str | None:
        """Upgrade an older store and its snapshots to the current schema.

        Returns the backup of its catalog (a file, or in PostgreSQL a schema), None if there was nothing to do.
        """
        return migrations.upgrade(location_of(path))

    def snapshot_create(self, name: str) -> SnapshotInfo:
        """Preserve the store as it is now under a name; read it with `Store.open(path, snapshot=name)`.

        Copies only the catalog. The snapshot's data stays on disk until the snapshot is removed, whatever is removed
        from the store or optimized.

        Raises
        ------
        NameInvalidError, NameTakenError, StoreBusyError
        """
        from lark_store.maintenance.snapshots import create

        return create(self._writable, name)

    def snapshot_list(self) -> pl.DataFrame:
        """Return the snapshots, oldest first: name, created_at, tables and rows."""
        from lark_store.maintenance.snapshots import snapshots

        return snapshots(self._db.location)

    def snapshot_remove(self, name: str) -> None:
        """Remove a snapshot; `db_optimize` then frees the data that only it used.

        Raises
        ------
        NameUnknownError, StoreBusyError
        """
        from lark_store.maintenance.snapshots import remove

        remove(self._writable, name)
