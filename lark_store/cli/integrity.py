"""Commands that check and protect a store: check, repair, backup, restore, doctor."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Annotated

import typer

from lark_store.cli.formats import Format
from lark_store.cli.options import DeviceOption, StoreOption, StoreOptions, VectorsOption, open_store
from lark_store.cli.output import ProgressBar, say
from lark_store.cli.spec_options import takes
from lark_store.display.table import About

if TYPE_CHECKING:
    from collections.abc import Callable

    import polars as pl

    from lark_store.results import BackupInfo

_WHOLE_DETAIL = About(whole=["detail"])


@takes()
def db_check(
    common: StoreOptions,
    deep: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Also recompute N sketches and the scores of N queries, and hash the checkpoints' files.",
        ),
    ] = 0,
    seed: Annotated[int | None, typer.Option(help="Seed of the sample of `--deep` (default: random).")] = None,
    device: DeviceOption = "auto",
) -> None:
    """Check the catalog and the tables: checksums, counts, keys, vectors, scores, indices, files, snapshots.

    Reads every row; an ingest may continue meanwhile. Exit status 1 if there are errors.
    """
    if deep and seed is None:
        seed = random.randrange(1 << 32)  # noqa: S311  not a secret
    with common.open() as opened, ProgressBar() as bar:
        findings = opened.db_check(deep=deep, seed=seed, device=device, on_progress=bar)
    if deep:
        say(f"the sample was drawn with `--seed {seed}`")
    _print(findings, common)


@takes()
def db_repair(
    common: StoreOptions,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the planned repairs.")] = False,
) -> None:
    """Repair the findings of `db check`: delete wrong rows that can be recomputed, recount runs.

    Prints the remaining findings (with `--dry-run` the planned repairs); repairs are reported on stderr. Exit status 1
    if errors remain.
    """
    with common.open() as opened, ProgressBar() as bar:
        report = opened.db_repair(dry_run=dry_run, on_progress=bar)
    if dry_run:
        common.emit(report.mended, _WHOLE_DETAIL)
        say("dry run: nothing was changed")
        return
    for _, kind, location, n, _, repair in report.mended.rows():
        say(f"{kind}: {location}: {repair} ({n})")
    _print(report.left, common)


def _print(findings: pl.DataFrame, common: StoreOptions) -> None:
    common.emit(findings, _WHOLE_DETAIL)
    counts = dict(findings.group_by("severity").len().rows())
    summary = ", ".join(f"{counts[kind]} {kind}s" for kind in ("error", "warning", "note") if kind in counts)
    say(summary or "no problems found")
    if "error" in counts:
        raise typer.Exit(1)


def db_backup(
    path: Annotated[str, typer.Argument(help="A new folder, best on another disk.")],
    damaged: Annotated[
        bool, typer.Option("--damaged", help="Copy the store as it is, even if `db check` finds errors.")
    ] = False,
    store: StoreOption = None,
) -> None:
    """Copy the store's current state: catalog, vectors and snapshots. An ingest may continue meanwhile.

    The store is checked first, which reads every row; a store with errors is refused. The copy is itself a store, with
    a hash of each file. Example: `lark-store db backup /backups/monday`
    """
    with open_store(store) as opened, ProgressBar() as bar:
        info = opened.db_backup(path, damaged=damaged, on_progress=bar)
    _say_backup("backed up to", info)


def db_restore(
    path: Annotated[str, typer.Argument(help="The backup.")],
    to: Annotated[str | None, typer.Option(metavar="STORE", help="Location of the restored store.")] = None,
    vectors: VectorsOption = None,
    damaged: Annotated[
        bool, typer.Option("--damaged", help="Restore a damaged backup, or a backup of a damaged store, as it is.")
    ] = False,
    store: StoreOption = None,
) -> None:
    """Restore a backup to a location without a store (default: `--store`). Every file's hash is checked first.

    The new location may differ from the old one. Example: `lark-store db restore monday --to postgresql://… --vectors s3://…`
    """
    from lark_store.store import Store

    with ProgressBar() as bar:
        info = Store.db_restore(path, to=to or store, vectors=vectors, damaged=damaged, on_progress=bar)
    _say_backup("restored to", info)


def _say_backup(verb: str, info: BackupInfo) -> None:
    size = f"{info.n_files} files, {info.n_bytes:,} bytes, {info.n_rows:,} rows"
    say(f"{verb} `{info.path}`: {size}, as of {info.created_at:%Y-%m-%d %H:%M:%S} UTC")
    for error in info.damaged:
        say(f"damaged: {error}")


@takes()
def doctor(common: StoreOptions) -> None:
    """Print versions, machine, devices, environment and store state for a bug report; secrets are masked."""
    from lark_store.store import Store

    report = Store.doctor(common.store)
    if common.form != Format.table:
        common.emit(report)
        return
    for (section,), lines in report.group_by("section", maintain_order=True):
        print(section)  # noqa: T201
        for _, name, value in lines.rows():
            print(f"  {name}: {value}")  # noqa: T201


def register(app: typer.Typer) -> None:
    """Add these commands to the app; the group `db` exists already."""
    group = next(info.typer_instance for info in app.registered_groups if info.name == "db")
    assert group is not None
    commands: list[Callable[..., None]] = [db_check, db_repair, db_backup, db_restore]
    for command in commands:
        group.command(command.__name__.removeprefix("db_"))(command)
    app.command()(doctor)
