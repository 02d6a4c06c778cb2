"""Commands for the life of what is stored: remove, optimize, status, upgrade, snapshots."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from lark_store.cli.options import Format, FormatOption, StoreOption, open_store
from lark_store.cli.output import ProgressBar, emit, say

if TYPE_CHECKING:
    from collections.abc import Callable

    import polars as pl

DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Only print what would go.")]


def sample_remove(
    source: Annotated[str, typer.Argument(help="The source.")],
    ids: Annotated[list[str], typer.Argument(metavar="ID...", help="The ids of its samples that are to go.")],
    dry_run: DryRunOption = False,
    store: StoreOption = None,
    form: FormatOption = Format.table,
) -> None:
    """Remove samples from a source, with their sketches, failures and influence.

    Scores of the groups that they were in are no longer true and go too: run `attribute` again.

    Example: `lark-store sample remove pubmed 21645374 --dry-run`
    """
    with open_store(store) as opened:
        _print_removed(opened.sample_remove(source, ids, dry_run=dry_run), form, dry_run=dry_run)


def source_remove(
    name: Annotated[str, typer.Argument(help="The source.")],
    dry_run: DryRunOption = False,
    store: StoreOption = None,
    form: FormatOption = Format.table,
) -> None:
    """Remove a source: its samples, sketches and failures, the runs it took part in and their influence."""
    with open_store(store) as opened:
        _print_removed(opened.source_remove(name, dry_run=dry_run), form, dry_run=dry_run)


def checkpoint_remove(
    name: Annotated[str, typer.Argument(help="The checkpoint.")],
    dry_run: DryRunOption = False,
    store: StoreOption = None,
    form: FormatOption = Format.table,
) -> None:
    """Remove a checkpoint: its sketches, failures, metrics, runs and their influence. Its own files stay."""
    with open_store(store) as opened:
        _print_removed(opened.checkpoint_remove(name, dry_run=dry_run), form, dry_run=dry_run)


def _print_removed(report: pl.DataFrame, form: str, *, dry_run: bool) -> None:
    emit(report, form)
    say(
        "nothing was removed: this is what would go"
        if dry_run
        else "removed; `lark-store db optimize` gives the space back, once versions are old enough"
    )


def db_optimize(
    keep_versions_days: Annotated[
        float, typer.Option(metavar="DAYS", help="Keep old versions of the tables that are younger.")
    ] = 7.0,
    store: StoreOption = None,
    form: FormatOption = Format.table,
) -> None:
    """Make small files into large ones, bring the indices up to date, and let old versions go (snapshots stay).

    Others may read and write meanwhile. Bytes go down when old versions go: at once with `--keep-versions-days 0`, best
    when nobody reads.
    """
    with open_store(store) as opened, ProgressBar() as bar:
        report = opened.db_optimize(keep_versions_days=keep_versions_days, on_progress=bar)
    emit(report, form)


def db_status(store: StoreOption = None, form: FormatOption = Format.table) -> None:
    """Print what each table takes on disk; on stderr, the store's schema version and this lark-store's."""
    import polars as pl

    from lark_store.store import Store

    status = Store.db_status(store)
    say(f"store {status.schema}, lark-store {status.newest}")
    if status.schema == status.newest:
        emit(status.tables, form)
        with open_store(store) as opened:
            notes = opened.coverage().filter(pl.col("chosen").is_not_null())["note"]
        for note in notes:
            say(f"note: {note}")


def db_upgrade(store: StoreOption = None) -> None:
    """Bring an older store's schema up to date, and its snapshots'; its catalog is backed up first."""
    from lark_store.store import Store

    backup = Store.db_upgrade(store)
    say(f"upgraded; the catalog as it was is in `{backup}`" if backup else "nothing to do")


def snapshot_create(
    name: Annotated[str, typer.Argument(help="What to call it, for example `paper`.")], store: StoreOption = None
) -> None:
    """Keep the store as it is now under a name; `top`, `metrics`, `sql` and `show` read it with `--snapshot NAME`.

    Only the catalog is copied. What a snapshot has stays on the disk, whatever is removed from the store.
    """
    with open_store(store) as opened:
        info = opened.snapshot_create(name)
    say(f"snapshot `{info.name}`: {len(info.tables)} tables, {info.n_rows:,} rows")


def snapshot_list(store: StoreOption = None, form: FormatOption = Format.table) -> None:
    """List the snapshots, oldest first."""
    with open_store(store) as opened:
        emit(opened.snapshot_list(), form)


def snapshot_remove(name: Annotated[str, typer.Argument(help="The snapshot.")], store: StoreOption = None) -> None:
    """Let go of a snapshot; `db optimize` then gives back the space that it alone took."""
    with open_store(store) as opened:
        opened.snapshot_remove(name)
    say(f"removed the snapshot `{name}`")


def register(app: typer.Typer) -> None:
    """Put these commands into the tree; some of its groups are there already."""
    groups: list[tuple[str, str, list[Callable[..., None]]]] = [
        ("checkpoint", "", [checkpoint_remove]),
        ("source", "", [source_remove]),
        ("sample", "The texts of a source.", [sample_remove]),
        ("snapshot", "The store as it was, kept under a name.", [snapshot_create, snapshot_list, snapshot_remove]),
        ("db", "The store's files and schema.", [db_status, db_optimize, db_upgrade]),
    ]
    there = {info.name: info.typer_instance for info in app.registered_groups}
    for name, text, commands in groups:
        group = there.get(name)
        if group is None:
            group = typer.Typer(help=text, no_args_is_help=True, rich_markup_mode="markdown")
            app.add_typer(group, name=name)
        for command in commands:
            group.command(command.__name__.removeprefix(f"{name}_"))(command)
