"""Commands that show: sample show, sample list, and the lists of checkpoints, sources, variants and sketchers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Unpack

import typer

from lark_store.cli.formats import Format
from lark_store.cli.options import ReadOptions
from lark_store.cli.output import emit_frames, say
from lark_store.cli.spec_options import takes
from lark_store.specs import SampleListOptions, SampleListSpec

if TYPE_CHECKING:
    from lark_store.query.answers.samples import SampleDetails


@takes()
def checkpoint_list(common: ReadOptions) -> None:
    """List the checkpoints, by epoch."""
    with common.open() as opened:
        common.emit(opened.checkpoint_list())


@takes()
def source_list(common: ReadOptions) -> None:
    """List the sources, with their numbers of samples."""
    with common.open() as opened:
        common.emit(opened.source_list())


@takes()
def variant_list(common: ReadOptions) -> None:
    """List the format variants."""
    with common.open() as opened:
        common.emit(opened.variant_list())


@takes()
def sketcher_list(common: ReadOptions) -> None:
    """List the sketchers; `is_default` marks the default one."""
    with common.open() as opened:
        common.emit(opened.sketcher_list())


@takes()
def sample_show(
    common: ReadOptions,
    name: Annotated[str, typer.Argument(help="SOURCE/ID, or an id that only one source has.")],
) -> None:
    """Print a sample whole: its text, metadata, sketches, failures, and its text in each format variant.

    Chat templates are those of the newest checkpoint. `variant show` prints the tokens and their targets.

    Example: `lark-store sample show finetune/q17`
    """
    with common.open() as opened:
        sample = opened.sample_show(name)
    if common.form == Format.table:
        _print_sample(sample)
    else:
        emit_frames(sample.frames(), common.form)


def _print_sample(sample: SampleDetails) -> None:
    lines = [f"{sample.source}/{sample.sample_id} (stage {sample.stage})"]
    lines += [] if sample.label is None else [f"label: {sample.label}"]
    lines += [f"{key}: {value}" for key, value in sample.meta.items()]
    for name, part in sample.parts.items():
        lines += ["", f"{name}:", part]
    for variant, text, error in sample.rendered.iter_rows():
        lines += ["", f"as `{variant}`:" if error is None else f"as `{variant}` it fails: {error}"]
        lines += [] if text is None else [text]
    print("\n".join(lines), end="\n\n")  # noqa: T201
    frames = {"sketches": sample.sketches, "failures": sample.failures}
    emit_frames({name: frame for name, frame in frames.items() if not frame.is_empty()}, Format.table)
    if sample.sketches.is_empty():
        say("it has no sketch")


@takes(SampleListSpec)
def sample_list(
    common: ReadOptions,
    source: Annotated[str, typer.Argument(help="The source.")],
    **options: Unpack[SampleListOptions],
) -> None:
    """List samples of a source, in its order.

    Example: `lark-store sample list pubmed --where "year > 2015" -n 5`
    """
    limit, offset = options.get("limit", SampleListSpec.limit), options.get("offset", SampleListSpec.offset)
    options["limit"] = limit + (limit > 0)  # one more: is this the last page?
    with common.open() as opened:
        frame = opened.sample_list(source, **options)
    common.emit(frame.head(limit))
    if len(frame) > limit:
        say(f"there are more samples; `--offset {offset + limit}` shows the next")


def register(app: typer.Typer) -> None:
    """Add these commands to the groups, which exist already."""
    groups = {info.name: info.typer_instance for info in app.registered_groups}
    for name, command in (
        ("checkpoint", checkpoint_list),
        ("source", source_list),
        ("variant", variant_list),
        ("sketcher", sketcher_list),
        ("sample", sample_list),
        ("sample", sample_show),
    ):
        group = groups[name]
        assert group is not None
        group.command(command.__name__.removeprefix(f"{name}_"))(command)
