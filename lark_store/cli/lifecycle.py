"""Maintenance commands: remove, optimize, status, upgrade, snapshots."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from lark_store.cli.options import StoreOption, StoreOptions, open_store
from lark_store.cli.output import ProgressBar, say
from lark_store.cli.spec_options import takes

if TYPE_CHECKING:
    from collections.abc import Callable

    import polars as pl

DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Only print what would be removed.")]


@takes()
def sample_remove(
    common: StoreOptions,
    source: Annotated[str, typer.Argument(help="The source.")],
    ids: Annotated[list[str], typer.Argument(metavar="ID...", help="The ids of the samples to remove.")],
    dry_run: DryRunOption = False,
) -> None:
    """Remove samples from a source, with their sketches, failures and influence.

    Scores of their groups become stale and are removed too: run `attribute` again.

    Example: `lark-store sample remove pubmed 21645374 --dry-run`
    """
    with common.open() as opened:
        _print_removed(opened.sample_remove(source, ids, dry_run=dry_run), common, dry_run=dry_run)


@takes()
def source_remove(
    common: StoreOptions,
    name: Annotated[str, typer.Argument(help="The source.")],
    dry_run: DryRunOption = False,
) -> None:
    """Remove a source: its samples, sketches, failures, runs and their influence."""
    with common.open() as opened:
        _print_removed(opened.source_remove(name, dry_run=dry_run), common, dry_run=dry_run)


@takes()
def checkpoint_remove(
    common: StoreOptions,
    name: Annotated[str, typer.Argument(help="The checkpoint.")],
    dry_run: DryRunOption = False,
) -> None:
    """Remove a checkpoint: its sketches, failures, metrics, runs and their influence.

    The model's files stay, except those of a model saved in the store.
    """
    with common.open() as opened:
        _print_removed(opened.checkpoint_remove(name, dry_run=dry_run), common, dry_run=dry_run)


def _print_removed(report: pl.DataFrame, common: StoreOptions, *, dry_run: bool) -> None:
    common.emit(report)
    say(
        "dry run: nothing was removed"
        if dry_run
        else "removed; `lark-store db optimize` frees the disk space once the old versions expire"
    )


@takes()
def db_optimize(
    common: StoreOptions,
    keep_versions_days: Annotated[
        float, typer.Option(metavar="DAYS", help="Keep table versions younger than this.")
    ] = 7.0,
) -> None:
    """Merge small files, update the indices and delete old versions (snapshots stay).

    Other processes may read and write meanwhile. Disk space is freed when old versions are deleted: at once with
    `--keep-versions-days 0`, best when no other process reads.
    """
    with common.open() as opened, ProgressBar() as bar:
        report = opened.db_optimize(keep_versions_days=keep_versions_days, on_progress=bar)
    common.emit(report)


@takes()
def db_status(common: StoreOptions) -> None:
    """Print each table's disk usage; on stderr, the schema versions of the store and of this lark-store."""
    import polars as pl

    from lark_store.store import Store

    status = Store.db_status(common.store)
    say(f"store {status.schema}, lark-store {status.newest}")
    if status.schema == status.newest:
        common.emit(status.tables)
        with common.open() as opened:
            notes = opened.coverage().filter(pl.col("chosen").is_not_null())["note"]
        for note in notes:
            say(f"note: {note}")


def db_upgrade(store: StoreOption = None) -> None:
    """Upgrade the schema of an older store and of its snapshots; the catalog is backed up first."""
    from lark_store.store import Store

    backup = Store.db_upgrade(store)
    say(f"upgraded; the old catalog is saved in `{backup}`" if backup else "the schema is up to date")


def snapshot_create(
    name: Annotated[str, typer.Argument(help="Its name, for example `paper`.")], store: StoreOption = None
) -> None:
    """Save the store's current state under a name; `top`, `metrics`, `sql` and `show` read it with `--snapshot NAME`.

    Only the catalog is copied. The snapshot's data stay on disk even if the store removes them.
    """
    with open_store(store) as opened:
        info = opened.snapshot_create(name)
    say(f"snapshot `{info.name}`: {len(info.tables)} tables, {info.n_rows:,} rows")


@takes()
def snapshot_list(common: StoreOptions) -> None:
    """List the snapshots, oldest first."""
    with common.open() as opened:
        common.emit(opened.snapshot_list())


def snapshot_remove(name: Annotated[str, typer.Argument(help="The snapshot.")], store: StoreOption = None) -> None:
    """Remove a snapshot; `db optimize` then frees the disk space only it used."""
    with open_store(store) as opened:
        opened.snapshot_remove(name)
    say(f"removed snapshot `{name}`")


def register(app: typer.Typer) -> None:
    """Add these commands to the app; some of its groups exist already."""
    groups: list[tuple[str, str, list[Callable[..., None]]]] = [
        ("checkpoint", "", [checkpoint_remove]),
        ("source", "", [source_remove]),
        ("sample", "Samples of a source.", [sample_remove]),
        ("snapshot", "Named states of the store.", [snapshot_create, snapshot_list, snapshot_remove]),
        ("db", "The store's files and schema.", [db_status, db_optimize, db_upgrade]),
    ]
    existing = {info.name: info.typer_instance for info in app.registered_groups}
    for name, text, commands in groups:
        group = existing.get(name)
        if group is None:
            group = typer.Typer(help=text, no_args_is_help=True, rich_markup_mode="markdown")
            app.add_typer(group, name=name)
        for command in commands:
            group.command(command.__name__.removeprefix(f"{name}_"))(command)
