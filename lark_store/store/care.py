"""`Store`, the life of what is stored: removal, optimize, status, upgrade, snapshots."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lark_store import migrations
from lark_store.schema.records import StoreStatus
from lark_store.store.part import Part, location_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import polars as pl

    from lark_store.schema.records import OnProgress, SnapshotInfo


class Care(Part):
    """The methods that take away, tidy up and keep."""

    def sample_remove(self, source: str, sample_ids: Sequence[str], *, dry_run: bool = False) -> pl.DataFrame:
        """Remove samples of a source, and all that was made of them: sketches, failures, influence.

        Score runs of the groups that they belong to are superseded: `attribute` scores those again. Killed at any
        moment and run again, it does what is left. Returns what went, with `dry_run` what would go, as rows of kind,
        table and rows. Snapshots keep what they have.

        Raises
        ------
        NameUnknownError
            A sample or the source is not there; nothing is removed.
        StoreBusyError, InputError
        """
        from lark_store.upkeep.remove import remove_samples

        return remove_samples(self._writable, source, sample_ids, dry_run=dry_run)

    def source_remove(self, name: str, *, dry_run: bool = False) -> pl.DataFrame:
        """Remove a source: its samples, their sketches and failures, the runs it took part in and their influence.

        The name may be used again. For the rest see `sample_remove`.

        Raises
        ------
        NameUnknownError, StoreBusyError
        """
        from lark_store.upkeep.remove import remove_source

        return remove_source(self._writable, name, dry_run=dry_run)

    def checkpoint_remove(self, name: str, *, dry_run: bool = False) -> pl.DataFrame:
        """Remove a checkpoint: the sketches and failures made at it, its metrics, its runs and their influence.

        The checkpoint's own files stay where they are. The name may be used again. For the rest see `sample_remove`.

        Raises
        ------
        NameUnknownError, StoreBusyError
        """
        from lark_store.upkeep.remove import remove_checkpoint

        return remove_checkpoint(self._writable, name, dry_run=dry_run)

    def db_optimize(self, *, keep_versions_days: float = 7.0, on_progress: OnProgress | None = None) -> pl.DataFrame:
        """Make small files into large ones, bring the indices up to date, and let old versions of the tables go.

        Versions older than `keep_versions_days` go, those of snapshots never; so do, from the catalog, runs that ended
        before that and of which nothing is left: superseded scores, ingests whose sketches were all removed. Others
        may read and write meanwhile; with 0 days a reader that began before may find its version gone, and has to ask
        again. Returns a row per table: rows, files and bytes before and after, seconds.

        Raises
        ------
        StoreBusyError
            Another such job is under way, or the table was written to all the while.
        InputError
        """
        from lark_store.upkeep.optimize import optimize

        return optimize(self._writable, keep_versions_days, on_progress)

    @staticmethod
    def db_status(path: str | Path | None = None) -> StoreStatus:
        """Return the schema version of the store at `path`, that of this lark-store, and what each table takes on disk.

        Raises
        ------
        NotAStoreError
        """
        import polars as pl

        from lark_store.upkeep.status import TABLES, tables

        location = location_of(path)
        found, ours = migrations.version(location), migrations.newest()
        return StoreStatus(found, ours, tables(location) if found == ours else pl.DataFrame(schema=TABLES))

    @staticmethod
    def db_upgrade(path: str | Path | None = None) -> Path | str | None:
        """Bring an older store and its snapshots up to date.

        Returns the backup of its catalog (a file, or in PostgreSQL a schema), None if there was nothing to do.
        """
        return migrations.upgrade(location_of(path))

    def snapshot_create(self, name: str) -> SnapshotInfo:
        """Keep the store as it is at this moment, under a name; `Store.open(path, snapshot=name)` reads it.

        Nothing is copied but the catalog. What a snapshot has stays on the disk until the snapshot is removed, whatever
        is removed from the store or optimized.

        Raises
        ------
        NameInvalidError, NameTakenError, StoreBusyError
        """
        from lark_store.upkeep.snapshots import create

        return create(self._writable, name)

    def snapshot_list(self) -> pl.DataFrame:
        """Return the snapshots, oldest first: name, created_at, tables and rows."""
        from lark_store.upkeep.snapshots import snapshots

        return snapshots(self._db.location)

    def snapshot_remove(self, name: str) -> None:
        """Let go of a snapshot; `db_optimize` then frees what only it had.

        Raises
        ------
        NameUnknownError, StoreBusyError
        """
        from lark_store.upkeep.snapshots import remove

        remove(self._writable, name)
