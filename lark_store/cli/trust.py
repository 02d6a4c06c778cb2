"""Commands for a store that people trust: check, repair, backup, restore, doctor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from lark_store.cli.options import DeviceOption, Format, FormatOption, StoreOption, VectorsOption, open_store
from lark_store.cli.output import ProgressBar, emit, say

if TYPE_CHECKING:
    from collections.abc import Callable

    import polars as pl

    from lark_store.schema.records import BackupInfo


def db_check(
    deep: Annotated[
        int, typer.Option(metavar="N", help="Compute N sketches again too, and hash the checkpoints' files.")
    ] = 0,
    device: DeviceOption = "auto",
    store: StoreOption = None,
    form: FormatOption = Format.table,
) -> None:
    """Check the catalog and the tables against each other: counts, keys, vectors, scores, files, snapshots.

    Reads every row; an ingest may go on meanwhile. Exit status 1 if there is an error among the findings.
    """
    with open_store(store) as opened, ProgressBar() as bar:
        found = opened.db_check(deep=deep, device=device, on_progress=bar)
    _print(found, form)


def db_repair(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be done.")] = False,
    store: StoreOption = None,
    form: FormatOption = Format.table,
) -> None:
    """Mend what `db check` finds: what can be made again is deleted where it is wrong, runs are counted again.

    Prints what is left (with `--dry-run` what would be mended); what was done is said on stderr. Exit status 1 if an
    error is left.
    """
    with open_store(store) as opened, ProgressBar() as bar:
        report = opened.db_repair(dry_run=dry_run, on_progress=bar)
    if dry_run:
        emit(report.mended, form)
        say("nothing was changed: this is what would be mended")
        return
    for _, what, where, n, _, repair in report.mended.rows():
        say(f"{what}: {where}: {repair} ({n})")
    _print(report.left, form)


def _print(found: pl.DataFrame, form: str) -> None:
    emit(found, form)
    counts = dict(found.group_by("severity").len().rows())
    say(
        ", ".join(f"{counts[kind]} {kind}s" for kind in ("error", "warning", "note") if kind in counts) or "all is well"
    )
    if "error" in counts:
        raise typer.Exit(1)


def db_backup(
    path: Annotated[str, typer.Argument(help="A folder that is not there yet, best on another disk.")],
    store: StoreOption = None,
) -> None:
    """Copy the store as it is now, catalog, vectors and snapshots together; an ingest may go on meanwhile.

    The copy is a store itself, with a hash of each file. Example: `lark-store db backup /backups/monday`
    """
    with open_store(store) as opened, ProgressBar() as bar:
        info = opened.db_backup(path, on_progress=bar)
    _say_backup("backed up to", info)


def db_restore(
    path: Annotated[str, typer.Argument(help="The backup.")],
    to: Annotated[str | None, typer.Option(metavar="STORE", help="Where the store is to be.")] = None,
    vectors: VectorsOption = None,
    store: StoreOption = None,
) -> None:
    """Make a store of a backup, where there is none (default: `--store`); every file's hash is checked first.

    It may come back in another place. Example: `lark-store db restore monday --to postgresql://… --vectors s3://…`
    """
    from lark_store.store import Store

    with ProgressBar() as bar:
        info = Store.db_restore(path, to=to or store, vectors=vectors, on_progress=bar)
    _say_backup("restored to", info)


def _say_backup(what: str, info: BackupInfo) -> None:
    size = f"{info.n_files} files, {info.n_bytes:,} bytes, {info.n_rows:,} rows"
    say(f"{what} `{info.path}`: {size}, as of {info.created_at:%Y-%m-%d %H:%M:%S} UTC")


def doctor(store: StoreOption = None, form: FormatOption = Format.table) -> None:
    """Print versions, machine, devices, environment and the store's state, for a bug report; secrets are masked."""
    from lark_store.store import Store

    report = Store.doctor(store)
    if form != Format.table:
        emit(report, form)
        return
    for (section,), lines in report.group_by("section", maintain_order=True):
        print(section)  # noqa: T201
        for _, name, value in lines.rows():
            print(f"  {name}: {value}")  # noqa: T201


def register(app: typer.Typer) -> None:
    """Put these commands into the tree; the group `db` is there already."""
    group = next(info.typer_instance for info in app.registered_groups if info.name == "db")
    assert group is not None
    commands: list[Callable[..., None]] = [db_check, db_repair, db_backup, db_restore]
    for command in commands:
        group.command(command.__name__.removeprefix("db_"))(command)
    app.command()(doctor)
