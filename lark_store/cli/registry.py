"""Commands that manage the store, checkpoints, sources, variants and sketchers."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Annotated, Unpack

import typer

from lark_store.cli.interchange import sketcher_import
from lark_store.cli.options import ReadOptions, StoreOption, StoreOptions, VectorsOption, open_store
from lark_store.cli.output import emit_frames, say
from lark_store.cli.spec_options import takes
from lark_store.errors import CheckpointError, InputError
from lark_store.modeling.forms import FORMS, forms_help
from lark_store.readers import extensions
from lark_store.specs import (
    CheckpointOptions,
    CheckpointSpec,
    SketcherOptions,
    SketcherSpec,
    SourceOptions,
    SourceSpec,
    VariantOptions,
    VariantSpec,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from lark_store.results import CheckpointInfo, SourceReport


def _pairs(values: list[str] | None, option: str, example: str) -> dict[str, str]:
    """Parse NAME=VALUE options."""
    pairs = {}
    for value in values or []:
        name, equals, rest = value.partition("=")
        if not (name and equals and rest):
            raise InputError(f"`{option} {value}` is not NAME=VALUE", f"for example `{option} {example}`")
        pairs[name] = rest
    return pairs


def _number(option: str, name: str, value: str) -> float:
    try:
        return float(value)
    except ValueError as error:
        raise InputError(f"`{option} {name}={value}`: not a number", f"for example `{name}=0.74`") from error


def init(
    vectors: VectorsOption = None,
    sketcher: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The store's sketcher: `lark` (the paper's; default) or `adam`."),
    ] = None,
    store: StoreOption = None,
) -> None:
    """Create a store with the variants `raw` and `chatml` and the sketchers `lark` (the paper's) and `adam`.

    Example: `lark-store init --store postgresql://lab@db.example/lark --vectors s3://lab/lark`
    """
    from lark_store.store import Store

    with Store.create(store, vectors=vectors, sketcher=sketcher) as created:
        say(f"created store `{created.place}`; its default sketcher is `{created.default_sketcher}`")


@takes()
def show(common: ReadOptions) -> None:
    """Show the checkpoints, sources, variants, sketchers and sketches of the store."""
    with common.open() as opened:
        emit_frames(opened.show().frames(), common.form, wide=common.wide)


@takes(CheckpointSpec)
def checkpoint_add(
    name: Annotated[str, typer.Argument(help="Its name, for example `epoch-2`.")],
    path: Annotated[
        str,
        typer.Argument(
            help="A folder written by `save_pretrained`, a Trainer's run folder, a quoted pattern like "
            "`'run/checkpoint-*'`, or a hub name like `org/model`."
        ),
    ],
    metric: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="A metric of the checkpoint, such as `accuracy=0.74`; repeatable."),
    ] = None,
    store: StoreOption = None,
    **options: Unpack[CheckpointOptions],
) -> None:
    """Add a checkpoint. Its files are hashed, not copied; adding it again updates the given metrics.

    A Trainer's run folder adds all its checkpoints, named `NAME-500`, `NAME-1000` and so on, and a final model of its
    own as `NAME-final`. Step, epoch, learning rate and metrics come from each `trainer_state.json`. Adding a run again
    adds its new checkpoints.

    Example: `lark-store checkpoint add epoch-2 ./ckpt/epoch-2 --epoch 2 --learning-rate 2e-4 --metric accuracy=0.74`

    Example: `lark-store checkpoint add run1 ./run`
    """
    metrics = {n: _number("--metric", n, v) for n, v in _pairs(metric, "--metric", "accuracy=0.74").items()}
    with open_store(store) as opened:
        run = opened.checkpoint_add_run(name, path, metrics=metrics, **options)
    for info in run.checkpoints:
        known = "" if info.name in run.new else ", already in the store"
        say(f"checkpoint `{info.name}`: {info.model}, weights {info.weights_sha256[:12]}{_facts(info)}{known}")
        for note in info.notes:
            say(f"note: `{info.name}`: {note}")
    for folder, reason in run.skipped.items():
        say(f"skipped `{folder}`: {reason}")
    for note in run.notes:
        say(f"note: {note}")


def _facts(info: CheckpointInfo) -> str:
    """Return a checkpoint's known step, epoch, learning rate and metrics, for one line."""
    facts = {"step": info.step, "epoch": info.epoch, "learning rate": info.learning_rate, **info.metrics}
    return "".join(f", {name} {value:.6g}" for name, value in facts.items() if value is not None)


@takes()
def checkpoint_distance(
    common: StoreOptions,
    name: Annotated[str, typer.Argument(help="The checkpoint.")],
    origin: Annotated[str, typer.Argument(help="The checkpoint it was trained from.")],
) -> None:
    """Print the distance of a checkpoint's weights from another's: ‖θ − θ₀‖ / ‖θ₀‖.

    Over all tensors, and over the linear layers of MLPs and attention alone: no embeddings, output head, norms and
    biases. Computed once. `top` and `attribute` print it if samples and queries use different checkpoints.
    """
    from polars import DataFrame

    with common.open() as opened:
        values = {"all": opened.checkpoint_distance(name, origin)}
        try:
            values["linear"] = opened.checkpoint_distance(name, origin, layers="linear")
        except CheckpointError as error:
            say(f"note: {error.fact}")
    common.emit(DataFrame({"layers": list(values), "distance": list(values.values())}))


_NOT_ADDED = {
    "stripped": "stored by an older lark-store without the white space around their text or id",
    "duplicate": "duplicate rows skipped",
    "empty": "empty rows skipped",
    "changed": "rows skipped: their id exists with different content",
}


_SOURCE_EXAMPLES = """Example: `lark-store source add chats 'data/*.jsonl.gz' --stage finetune --dry-run`

Example: `lark-store source add test qiaojin/PubMedQA --config pqa_labeled --split train --stage query --column
sample_id=pubid --column answer=final_decision --column context=context.contexts`"""


@takes(SourceSpec)
def source_add(
    name: Annotated[str, typer.Argument(help="Its name, for example `pubmed`.")],
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="PATH",
            help=f"Files ({extensions()}), quoted patterns, folders, a hub name, or `-` for standard input.",
        ),
    ],
    stage: Annotated[str, typer.Option(help="`finetune`, `pretrain` or `query`.")],
    columns: Annotated[
        list[str] | None,
        typer.Option(
            "--column",
            metavar="FIELD=COLUMN",
            help="Read a field from another column, also inside others: `text=abstract.sections.0.text`. "
            "`messages.role=from` names a key of messages, `role.user=Customer` a role. Repeatable.",
        ),
    ] = None,
    mapped: Annotated[
        list[str] | None, typer.Option("--map", hidden=True, help="The older name of `--column`.")
    ] = None,
    store: StoreOption = None,
    **options: Unpack[SourceOptions],
) -> None:
    """Add a source of samples, or new samples to an existing source.

    The id is the column `sample_id` or `id`, in every row or in none; without one, the id is derived from the content.
    Texts are stored byte for byte, columns that no form uses as metadata. Which form a row has follows from its
    columns:
    """
    with open_store(store) as opened:
        mapping = _pairs([*(columns or []), *(mapped or [])], "--column", "text=abstract")
        report = opened.source_add(name, paths, stage=stage, columns=mapping, **options)
    replace, dry_run = options.get("replace"), options.get("dry_run")
    replaced = f", {report.n_replaced} replaced" if replace else ""
    would = " would be" if dry_run else ""
    say(f"source `{name}`: {report.n_added} samples{would} added, {report.n_existing} already stored{replaced}")
    say(f"  read {report.summary}")
    if dry_run:
        for form, count in report.forms.items():
            say(f"  {count} {'row' if count == 1 else 'rows'} of form `{form}`: {FORMS[form].looks_like}")
    for kind, description in _NOT_ADDED.items():
        count = getattr(report, f"n_{kind}")
        if count:
            say(f"  {count} {description}: {', '.join(report.examples[kind])}{', …' if count > 3 else ''}")
    for note in report.notes:
        say(f"note: {note}")
    _print_previews(report)
    if report.n_stripped and not replace:
        say("\nhint: store the original texts under the same ids with `--replace`")
    if report.n_changed:
        advice = "give changed rows new ids, or map another column with `--column sample_id=COLUMN`"
        say(f"\nhint: {advice}" if replace else f"\nhint: replace the stored samples with `--replace`, {advice}")
        raise typer.Exit(1)


source_add.__doc__ = f"{inspect.cleandoc(source_add.__doc__ or '')}\n\n{forms_help()}\n\n{_SOURCE_EXAMPLES}"


def _print_previews(report: SourceReport) -> None:
    """Print the samples of a dry run on stdout."""
    for sample in report.previews:
        typer.echo(f"--- {sample['sample_id']}\n{sample['content']}")
        if "rendered" in sample:
            typer.echo(f"--- as `{sample['variant']}`, targets in ⟦ ⟧\n{sample['rendered']}")
        elif "note" in sample:
            say(f"note: sample `{sample['sample_id']}` is not rendered: {sample['note']}")


@takes(VariantSpec)
def variant_add(
    name: Annotated[str, typer.Argument(help="Its name, for example `short-chatml`.")],
    store: StoreOption = None,
    **options: Unpack[VariantOptions],
) -> None:
    """Add a format variant: a template that formats samples, and a rule for the target tokens of the loss.

    A Jinja template prints `prompt` and `response`, or `text`, or `messages`, each part once; use `{% if text %}` to
    test for a part. A sample with an unprinted part fails.

    With `predicted-answer`, the target is the answer that the checkpoint itself predicts to a prompt, or to a question
    on a text: the paper's formatted pretraining text.

    Example: `lark-store variant add formatted --targets predicted-answer --question 'Is this statement true?' --label
    yes --label no --label maybe`
    """
    with open_store(store) as opened:
        info = opened.variant_add(name, **options)
    say(f"variant `{info.name}`: {info.template}, targets {info.targets}, at most {info.max_length} tokens")


def variant_show(
    name: Annotated[str, typer.Argument(help="The variant.")],
    sample: Annotated[str, typer.Option(help="The id of a sample in the store.")],
    source: Annotated[str | None, typer.Option("--source", "-s", help="Its source, if several have the id.")] = None,
    checkpoint: Annotated[
        str | None, typer.Option("--checkpoint", "-c", help="Whose tokenizer to use (default: the newest's).")
    ] = None,
    store: StoreOption = None,
) -> None:
    """Print one sample as the model sees it, with the target tokens of the loss in ⟦ ⟧."""
    with open_store(store) as opened:
        rendered = opened.variant_show(name, sample=sample, source=source, checkpoint=checkpoint)
    typer.echo(rendered.marked)
    cut = f", {rendered.n_cut} truncated" if rendered.n_cut else ""
    say(f"\n{len(rendered.pieces)} tokens{cut}, {sum(rendered.is_target)} of them targets (rule `{rendered.rule}`)")
    for note in rendered.notes:
        say(f"note: {note}")


@takes(SketcherSpec)
def sketcher_add(
    name: Annotated[str, typer.Argument(help="Its name, for example `last-layers`.")],
    store: StoreOption = None,
    **options: Unpack[SketcherOptions],
) -> None:
    r"""Add a sketcher: a selection of parameters, a correction and a random map to k bins.

    Example: `lark-store sketcher add last-layers --parameters 'model\.layers\.2[4-9]\.'`

    Example: `lark-store sketcher add adam2 --correction adam2 --min-ndim 2 --mask-template`

    Example: `lark-store sketcher add ekfac-1 --correction ekfac --power 1`
    """
    with open_store(store) as opened:
        info = opened.sketcher_add(name, **options)
    facts = [f"k = {info.k}", f"seed {info.seed}", info.dtype]
    if info.correction != "none":
        figures = [f"{label} {value:g}" for label, value in (("damping", info.damping), ("power", info.power)) if value]
        facts.append(f"correction {info.correction}" + (f" ({', '.join(figures)})" if figures else ""))
    if info.min_ndim:
        facts.append(f"parameters with at least {info.min_ndim} dimensions")
    facts += [f"{label} `{regex}`" for label, regex in (("only", info.parameters), ("without", info.exclude)) if regex]
    if info.positions == "content":
        facts.append("template masked")
    say(f"sketcher `{info.name}`: {', '.join(facts)}")


def sketcher_default(
    name: Annotated[str, typer.Argument(help="The sketcher.")],
    store: StoreOption = None,
) -> None:
    """Set the default sketcher.

    Example: `lark-store sketcher default adam`
    """
    with open_store(store) as opened:
        opened.sketcher_default(name)
    say(f"the default sketcher is `{name}`")


@takes()
def sketcher_show(
    common: StoreOptions,
    name: Annotated[str, typer.Argument(help="The sketcher.")],
    checkpoint: Annotated[str, typer.Option("--checkpoint", "-c", metavar="NAME", help="The checkpoint of the model.")],
) -> None:
    """List a model's parameters and mark those the sketcher uses."""
    with common.open() as opened:
        frame = opened.sketcher_show(name, checkpoint=checkpoint)
    common.emit(frame)
    sketched = frame.filter(frame["sketched"])
    total = sum(frame["coordinates"])
    say(f"{len(sketched)} of {len(frame)} parameters, {sum(sketched['coordinates']):,} of {total:,} coordinates")


def register(app: typer.Typer) -> None:
    """Add these commands to the app."""
    groups: list[tuple[str, str, list[Callable[..., None]]]] = [
        ("checkpoint", "Models at a step of their training.", [checkpoint_add, checkpoint_distance]),
        ("source", "Sets of samples: fine-tuning data, pretraining text, queries.", [source_add]),
        ("variant", "Formats of samples and their targets.", [variant_add, variant_show]),
        (
            "sketcher",
            "Configurations for sketching gradients.",
            [sketcher_add, sketcher_default, sketcher_show, sketcher_import],
        ),
    ]
    app.command()(init)
    for name, text, commands in groups:
        group = typer.Typer(help=text, no_args_is_help=True, rich_markup_mode="markdown")
        for command in commands:
            group.command(command.__name__.removeprefix(f"{name}_"))(command)
        app.add_typer(group, name=name)
    app.command()(show)
