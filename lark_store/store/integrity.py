"""`Store`, integrity: check, repair, backup, restore, doctor."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING

from lark_store import migrations
from lark_store.errors import CheckpointError, InputError, StoreError
from lark_store.schema.backends.open import check_vectors
from lark_store.schema.faults import FAULTS, first_line
from lark_store.store.base import Part, location_of
from lark_store.store.create import vacant

if TYPE_CHECKING:
    from collections.abc import Iterator

    import polars as pl

    from lark_store.maintenance.check.findings import Finding
    from lark_store.results import BackupInfo, OnProgress, RepairReport
    from lark_store.schema.database import Database


class IntegrityMethods(Part):
    """The methods that verify, repair and back up the store."""

    def db_check(
        self, *, deep: int = 0, seed: int | None = None, device: str = "auto", on_progress: OnProgress | None = None
    ) -> pl.DataFrame:
        """Check the catalog and the tables against each other; returns a row per finding, none if all is well.

        Columns: severity (`error`: an answer is wrong or data is lost, `warning`, `note`), what, where, n (how many),
        detail, and repair (the action of `db_repair`, null if there is none). Streams every row and vector, compares it
        with its checksum, and reads every index. `deep` also recomputes that many sketches from the models and the
        scores of that many queries from the sketches, compares all codes with their vectors, and hashes the
        checkpoints' files. It draws them at random, or by `seed`.

        Other work may continue: the check sees the store as of one moment. Removal, optimize and snapshots wait.

        Raises
        ------
        StoreBusyError, InputError
        """
        from lark_store.maintenance.check.findings import frame
        from lark_store.maintenance.check.run import check

        if deep < 0:
            raise InputError(f"`--deep` must not be negative, not {deep}", "try `--deep 20`")
        db = self._writable
        findings = check(db, deep=deep > 0, on_progress=on_progress)
        if deep:
            drawn = random.randrange(1 << 32) if seed is None else seed  # noqa: S311  no secret
            findings += [
                *_recheck_sketches(db, deep, drawn, device, on_progress),
                *_recheck_scores(db, deep, drawn, device, on_progress),
            ]
        return frame(findings)

    def db_repair(self, *, dry_run: bool = False, on_progress: OnProgress | None = None) -> RepairReport:
        """Repair what `db_check` finds, where possible, then check again.

        Deletes wrong, duplicate and orphaned sketches, for `ingest` to recompute. Recounts runs, and commits
        interrupted ones with the rows they have. Supersedes inconsistent score runs, for `attribute` to recompute.
        Builds indices and removes leftovers of killed processes. Never touches samples or other catalog entries.

        Raises
        ------
        StoreBusyError
            Another process is working on the store; nothing is repaired.
        """
        from lark_store.maintenance.repair import repair

        return repair(self._writable, dry_run=dry_run, on_progress=on_progress)

    def db_backup(
        self, path: str | Path, *, damaged: bool = False, on_progress: OnProgress | None = None
    ) -> BackupInfo:
        """Copy the store as it is now, with its snapshots, to a folder that doesn't exist yet.

        The copy is itself a store; its `backup.json` has the SHA-256 of each file. An ingest may continue; its later
        commits are not in the backup. An interrupted backup leaves no folder of that name.

        Checks the store first, like `db_check` without `deep`, and refuses a store with errors. With `damaged` it
        copies all files as they are and records the errors.

        Raises
        ------
        StoreExistsError, StoreBusyError, InputError
        StoreError
            The store is damaged, or it can't be copied.
        """
        from lark_store.maintenance.backup import backup

        return backup(self._writable, Path(path), migrations.newest(), on_progress, damaged=damaged)

    @staticmethod
    def db_restore(
        path: str | Path,
        *,
        to: str | Path | None = None,
        vectors: str | None = None,
        damaged: bool = False,
        on_progress: OnProgress | None = None,
    ) -> BackupInfo:
        """Restore the backup at `path` to a place without a store (default: `LARK_STORE` or `./lark.store`).

        `to` and `vectors` are as in `Store.create`, so a store can move: from a folder to PostgreSQL and S3 or back.
        Each file is compared with its hash before anything is written. A backup of an older schema is restored
        unchanged, for `db_upgrade` to upgrade; with `vectors` it is upgraded here.

        Refuses a damaged backup and a backup of a damaged store; with `damaged` it restores what is left. Checks the
        backup here if the version that took it did not check the store.

        Raises
        ------
        StoreExistsError
            The target is already in use.
        StoreError
            There is no backup, or it is damaged.
        """
        from lark_store.maintenance.restore import restore, restore_apart

        target, source = location_of(to), Path(path)
        if target.root is not None and vectors is None:
            return restore(source, target.root, migrations.newest(), on_progress, damaged=damaged)
        vacant(target, vectors)
        vectors_location = check_vectors(vectors or "")
        return restore_apart(source, target, vectors_location, migrations, on_progress, damaged=damaged)

    @staticmethod
    def doctor(path: str | Path | None = None) -> pl.DataFrame:
        """Return the facts for a bug report, as rows of section, name and value: all text, without secrets.

        Sections: versions, machine, devices, environment and store. Works without a store or with a broken one.
        """
        from lark_store.maintenance.doctor import doctor

        return doctor(location_of(path), migrations.newest, migrations.version)


def _recheck_sketches(db: Database, n: int, seed: int, device: str, on_progress: OnProgress | None) -> list[Finding]:
    """Recompute sketches of each checkpoint whose files are unchanged. Lives here because it needs `ingest`."""
    from sqlalchemy import select

    from lark_store.ingest.verify import verify
    from lark_store.maintenance.check.findings import Finding
    from lark_store.modeling.checkpoints import verify as verify_files
    from lark_store.schema.catalog import Checkpoint
    from lark_store.specs import Compute

    findings, compute = [], Compute(device=device)
    try:
        with db.session() as session:
            checkpoints = list(session.scalars(select(Checkpoint).order_by(Checkpoint.id)))
    except StoreError as error:  # a damaged catalog, reported by its own findings
        return [_unreadable(error)]
    for checkpoint in checkpoints:
        try:
            verify_files(checkpoint)
            rows = verify(db, -(-n // len(checkpoints)), None, checkpoint.name, compute, on_progress, seed=seed)
        except CheckpointError as error:
            detail = f"{error.fact}; its sketches were not recomputed"
            findings.append(Finding("note", "checkpoint files", f"checkpoint {checkpoint.name}", 1, detail))
            continue
        except InputError:  # no sketches at this checkpoint
            continue
        except (*FAULTS, StoreError) as error:
            findings.append(_unreadable(error))
            continue
        for row in rows.filter(~rows["ok"]).iter_rows(named=True):
            key = "/".join(row[name] for name in ("checkpoint", "source", "variant", "sample_id"))
            cosine = "none" if row["cosine"] is None else f"{row['cosine']:.6f}"
            detail = f"the recomputed sketch differs: cosine {cosine}, expected at least {row['limit']}"
            hint = "; if the sample's text changed, `sample remove` it and add it again"
            findings.append(Finding("error", "sketch", f"{row['sketcher']}: {key}", 1, detail + hint))
    return findings


def _unreadable(error: Exception) -> Finding:
    """Return the finding for sketches or scores that can't be read and so not recomputed."""
    from lark_store.maintenance.check.findings import Finding

    return Finding("error", "unreadable", "sketches and scores", 1, f"not recomputed: {first_line(error)}")


def _recheck_scores(db: Database, n: int, seed: int, device: str, on_progress: OnProgress | None) -> Iterator[Finding]:
    """Recompute scores from the sketches; yield a finding for each run with differing scores."""
    from itertools import groupby

    from lark_store.maintenance.check.findings import Finding
    from lark_store.query.answers.recheck import recheck

    try:
        wrong = list(recheck(db, n, seed, device, on_progress))
    except (*FAULTS, StoreError) as error:
        yield _unreadable(error)
        return
    for number, run_figures in groupby(wrong, key=lambda score: score.run.id):
        figures = list(run_figures)
        first = figures[0]
        detail = f"{first.figure} of query `{first.query_id}` is {first.stored:.6g}, recomputed {first.computed:.6g}"
        location = f"score run {number}: {first.run.source.name} · {first.run.variant.name}"
        yield Finding(
            "error",
            "scores",
            location,
            len(figures),
            f"{detail}; run `attribute` with another `--hits` to score it again",
        )
