"""`Store`, trust in what is stored: check, repair, backup, restore, doctor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lark_store import migrations
from lark_store.errors import CheckpointError, InputError
from lark_store.schema.location import check_vectors
from lark_store.store.fresh import vacant
from lark_store.store.part import Part, location_of

if TYPE_CHECKING:
    import polars as pl

    from lark_store.schema.database import Database
    from lark_store.schema.records import BackupInfo, OnProgress, RepairReport
    from lark_store.upkeep.findings import Finding


class Trust(Part):
    """The methods that find out what is wrong, mend it, and keep a copy."""

    def db_check(self, *, deep: int = 0, device: str = "auto", on_progress: OnProgress | None = None) -> pl.DataFrame:
        """Check the catalog and the tables against each other; returns a row per finding, none if all is well.

        Columns: severity (`error`: an answer is wrong or data is lost, `warning`, `note`), what, where, n (how many),
        detail, and repair: what `db_repair` would do, null where nothing can. Every row and vector is read, streamed;
        with `deep` all codes too, `deep` sketches are computed again, and the checkpoints' files are hashed.

        Work may go on meanwhile: the store is looked at as it was at one moment. Removal, optimize and snapshots wait.

        Raises
        ------
        StoreBusyError, InputError
        """
        from lark_store.upkeep.check import check
        from lark_store.upkeep.findings import frame

        if deep < 0:
            raise InputError(f"{deep} sketches can't be computed again", "try `--deep 20`")
        db = self._writable
        found = check(db, deep=deep > 0, on_progress=on_progress)
        return frame([*found, *(_again(db, deep, device, on_progress) if deep else [])])

    def db_repair(self, *, dry_run: bool = False, on_progress: OnProgress | None = None) -> RepairReport:
        """Mend what `db_check` names and can be mended, then check once more.

        Sketches that are wrong, doubled or of no run are deleted, for `ingest` to make them again; runs are counted
        again or, where they were cut off, committed with what they have; score runs that no longer agree are
        superseded, for `attribute` to score them again; indices are built, and what killed processes left is removed.
        Samples and what was added to the catalog stay as they are.

        Raises
        ------
        StoreBusyError
            Somebody is at work on the store; nothing is repaired.
        """
        from lark_store.upkeep.repair import repair

        return repair(self._writable, dry_run=dry_run, on_progress=on_progress)

    def db_backup(self, path: str | Path, *, on_progress: OnProgress | None = None) -> BackupInfo:
        """Copy the store as it is at this moment to a folder that is not there yet, snapshots included.

        The copy is a store itself, and `backup.json` in it has the SHA-256 of each file. An ingest may go on; what it
        commits later is not in the backup. Cut off at any moment, there is no folder of that name.

        Raises
        ------
        StoreExistsError, StoreBusyError, StoreError, InputError
        """
        from lark_store.upkeep.backup import backup

        return backup(self._writable, Path(path), migrations.newest(), on_progress)

    @staticmethod
    def db_restore(
        path: str | Path,
        *,
        to: str | Path | None = None,
        vectors: str | None = None,
        on_progress: OnProgress | None = None,
    ) -> BackupInfo:
        """Make a store of the backup at `path`, where there is none yet (default: `LARK_STORE` or `./lark.store`).

        `to` and `vectors` are those of `Store.create`: a store may come back in another place, from a folder into
        PostgreSQL and S3 or the other way. Each file is compared with its hash before anything is written. A backup of
        an older schema is restored as it is, for `db_upgrade` to upgrade; with `vectors`, it is upgraded here.

        Raises
        ------
        StoreExistsError
            There is something at that path.
        StoreError
            There is no backup, or it is not whole.
        """
        from lark_store.upkeep.backup import restore, restore_apart

        target, source = location_of(to), Path(path)
        if target.root is not None and vectors is None:
            return restore(source, target.root, on_progress)
        vacant(target, vectors)
        return restore_apart(source, target, check_vectors(vectors or ""), migrations, on_progress)

    @staticmethod
    def doctor(path: str | Path | None = None) -> pl.DataFrame:
        """Return what a bug report needs, as rows of section, name and value: all text, without secrets.

        Sections: versions, machine, devices, environment and store. Nothing has to be there, or whole.
        """
        from lark_store.upkeep.doctor import doctor

        return doctor(location_of(path), migrations.newest, migrations.version)


def _again(db: Database, n: int, device: str, on_progress: OnProgress | None) -> list[Finding]:
    """Compute sketches again, those of each checkpoint whose files are as they were; needs ingest, so it is here."""
    from sqlalchemy import select

    from lark_store.ingest.checkpoints import verify as verify_files
    from lark_store.ingest.verify import verify
    from lark_store.schema.catalog import Checkpoint
    from lark_store.upkeep.findings import Finding

    with db.session() as session:
        checkpoints = list(session.scalars(select(Checkpoint).order_by(Checkpoint.id)))
    found = []
    for checkpoint in checkpoints:
        try:
            verify_files(checkpoint)
            rows = verify(db, -(-n // len(checkpoints)), None, checkpoint.name, device, "auto", on_progress)
        except CheckpointError as error:
            detail = f"{error.fact}; its sketches were not computed again"
            found.append(Finding("note", "checkpoint files", f"checkpoint {checkpoint.name}", 1, detail))
            continue
        except InputError:  # it has no sketches of ours
            continue
        for row in rows.filter(~rows["ok"]).iter_rows(named=True):
            key = "/".join(row[name] for name in ("checkpoint", "source", "variant", "sample_id"))
            cosine = "none" if row["cosine"] is None else f"{row['cosine']:.6f}"
            detail = f"computed again it is another: cosine {cosine}, at least {row['limit']} was expected"
            hint = "; has the sample's text changed? `sample remove` it and add it again"
            found.append(Finding("error", "sketch", f"{row['sketcher']}: {key}", 1, detail + hint))
    return found
