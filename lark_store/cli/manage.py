"""Commands for what people manage: the store, checkpoints, sources, variants, sketchers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from lark_store.cli.doors import sketcher_import
from lark_store.cli.options import Format, FormatOption, SnapshotOption, StoreOption, VectorsOption, open_store
from lark_store.cli.output import emit, emit_frames, say
from lark_store.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable


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
        raise InputError(f"`{option} {name}={value}`: the value is no number", f"for example `{name}=0.74`") from error


def init(
    vectors: VectorsOption = None,
    sketcher: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Used where no sketcher is named: `lark`, the paper's (default), or `adam`."),
    ] = None,
    store: StoreOption = None,
) -> None:
    """Make a fresh store, with the variants `raw` and `chatml` and the sketchers `lark` (the paper's) and `adam`.

    Example: `lark-store init --store postgresql://lab@db.example/lark --vectors s3://lab/lark`
    """
    from lark_store.store import Store

    with Store.create(store, vectors=vectors, sketcher=sketcher) as made:
        say(f"made the store `{made.place}`; it sketches by `{made.default_sketcher}` where no other is named")


def show(store: StoreOption = None, snapshot: SnapshotOption = None, form: FormatOption = Format.table) -> None:
    """Show what the store holds: checkpoints, sources, variants, sketchers, and sketches with their bytes."""
    with open_store(store, snapshot) as opened:
        emit_frames(opened.show().frames(), form)


def checkpoint_add(
    name: Annotated[str, typer.Argument(help="What to call it, for example `epoch-2`.")],
    path: Annotated[str, typer.Argument(help="A folder made by `save_pretrained`, or a hub name like `org/model`.")],
    epoch: Annotated[float | None, typer.Option(help="Epochs trained.")] = None,
    step: Annotated[int | None, typer.Option(help="Optimizer steps trained.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="The learning rate at this point.")] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="A figure measured here, as `accuracy=0.74`; may be repeated."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="The model's name, if the config does not say it.")] = None,
    revision: Annotated[str | None, typer.Option(help="The revision of a hub name.")] = None,
    store: StoreOption = None,
) -> None:
    """Add a checkpoint. Its files are hashed and stay where they are; adding it again sets the metrics given.

    Example: `lark-store checkpoint add epoch-2 ./ckpt/epoch-2 --epoch 2 --learning-rate 2e-4 --metric accuracy=0.74`
    """
    metrics = {n: _number("--metric", n, v) for n, v in _pairs(metric, "--metric", "accuracy=0.74").items()}
    with open_store(store) as opened:
        info = opened.checkpoint_add(
            name,
            path,
            epoch=epoch,
            step=step,
            learning_rate=learning_rate,
            metrics=metrics,
            model=model,
            revision=revision,
        )
    say(f"checkpoint `{info.name}`: {info.model}, weights {info.weights_sha256[:12]}")


def checkpoint_distance(
    name: Annotated[str, typer.Argument(help="The checkpoint.")],
    origin: Annotated[str, typer.Argument(help="The one it was trained from.")],
    store: StoreOption = None,
) -> None:
    """Print how far a checkpoint's weights are from another's: ‖θ − θ₀‖ / ‖θ₀‖.

    It is measured once. `top` and `attribute` print it where samples and queries are at different checkpoints.
    """
    with open_store(store) as opened:
        typer.echo(f"{opened.checkpoint_distance(name, origin):.6g}")


def source_add(
    name: Annotated[str, typer.Argument(help="What to call it, for example `pubmed`.")],
    path: Annotated[
        str, typer.Argument(help="A .jsonl, .parquet, .csv or .tsv file, a dataset folder, or a hub name.")
    ],
    stage: Annotated[str, typer.Option(help="`finetune`, `pretrain` or `query`.")],
    domain: Annotated[str | None, typer.Option(help="What it is about, for example `medical`.")] = None,
    licence: Annotated[str | None, typer.Option(help="The text's licence.")] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option("--map", metavar="FIELD=COLUMN", help="Take a field from another column; may be repeated."),
    ] = None,
    config: Annotated[str | None, typer.Option(help="A Hugging Face dataset's configuration.")] = None,
    split: Annotated[str | None, typer.Option(help="A Hugging Face dataset's split.")] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Put rows with other content in the place of samples with their id.")
    ] = False,
    store: StoreOption = None,
) -> None:
    """Add a source of samples, or the new samples of one that is there.

    Rows have `prompt` and `response`, or `question`, `answer` and maybe `context`, or `text`. The id is the column
    `sample_id` or `id`, else it is made from the content. All other columns are kept as metadata.

    Example: `lark-store source add test qiaojin/PubMedQA --config pqa_labeled --split train --stage query --map
    sample_id=pubid --map answer=final_decision --map context=context.contexts`
    """
    with open_store(store) as opened:
        report = opened.source_add(
            name,
            path,
            stage=stage,
            domain=domain,
            licence=licence,
            columns=_pairs(columns, "--map", "text=abstract"),
            config=config,
            split=split,
            replace=replace,
        )
    replaced = f", {report.n_replaced} replaced" if replace else ""
    say(f"source `{name}`: {report.n_added} samples added, {report.n_existing} there already{replaced}")
    for kind in ("duplicate", "empty", "changed"):
        count = getattr(report, f"n_{kind}")
        if count:
            what = {"duplicate": "duplicates left out", "empty": "empty rows left out"}.get(
                kind, "with an id that is there with other content, not taken"
            )
            say(f"  {count} {what}: {', '.join(report.examples[kind])}{', …' if count > 3 else ''}")
    if report.n_changed:
        new = "give changed rows new ids, or map another column with `--map sample_id=COLUMN`"
        say(f"\nhint: {new}" if replace else f"\nhint: put them in the place of the old with `--replace`, {new}")
        raise typer.Exit(1)


def variant_add(
    name: Annotated[str, typer.Argument(help="What to call it, for example `short-chatml`.")],
    template: Annotated[str, typer.Option(help="`raw`, `chatml` or the path of a Jinja template.")],
    targets: Annotated[str, typer.Option(help="`response`, `text`, `predicted` or `auto`.")] = "auto",
    max_length: Annotated[int, typer.Option(help="The longest sample, in tokens; targets are never cut off.")] = 1024,
    store: StoreOption = None,
) -> None:
    """Add a format variant: how a sample becomes text, and which of its tokens the loss is taken on.

    A Jinja template prints `prompt` and `response`, or `text` (those a sample lacks are none), or `messages`.
    """
    with open_store(store) as opened:
        info = opened.variant_add(name, template=template, targets=targets, max_length=max_length)
    say(f"variant `{info.name}`: {info.template}, targets {info.targets}, at most {info.max_length} tokens")


def variant_show(
    name: Annotated[str, typer.Argument(help="The variant.")],
    sample: Annotated[str, typer.Option(help="The id of a sample in the store.")],
    source: Annotated[str | None, typer.Option("--source", "-s", help="Its source, if several have it.")] = None,
    checkpoint: Annotated[
        str | None, typer.Option("--checkpoint", "-c", help="Whose tokenizer (default: the one added last).")
    ] = None,
    store: StoreOption = None,
) -> None:
    """Print one sample as a model sees it; its targets, the tokens that the loss is taken on, stand in ⟦ ⟧."""
    with open_store(store) as opened:
        seen = opened.variant_show(name, sample=sample, source=source, checkpoint=checkpoint)
    typer.echo(seen.marked)
    cut = f", {seen.n_cut} cut off" if seen.n_cut else ""
    say(f"\n{len(seen.pieces)} tokens{cut}, {sum(seen.is_target)} of them targets (rule `{seen.rule}`)")


def sketcher_add(
    name: Annotated[str, typer.Argument(help="What to call it, for example `last-layers`.")],
    k: Annotated[int, typer.Option("--k", "-k", help="Bins: a power of two from 256 to 1,048,576.")] = 65_536,
    seed: Annotated[int, typer.Option(help="The seed of the random map.")] = 0,
    dtype: Annotated[str, typer.Option(help="How sketches are stored: `float16` or `float32`.")] = "float16",
    parameters: Annotated[
        str | None, typer.Option(metavar="REGEX", help="Sketch the parameters whose names match (default: all).")
    ] = None,
    exclude: Annotated[str | None, typer.Option(metavar="REGEX", help="But not those that match this.")] = None,
    correction: Annotated[
        str,
        typer.Option(
            help="`none`, `adam` (Adam's geometry, V^(−1/4)), `adam2` (V^(−1/2)), `tensor` (each parameter to norm 1), "
            "`kfac` or `ekfac` (the curvature G, linear layers alone)."
        ),
    ] = "none",
    damping: Annotated[
        float | None,
        typer.Option(help="What is added to V or G, times its mean (default: 0.1; 10 loses less to the sketch)."),
    ] = None,
    power: Annotated[
        float | None,
        typer.Option(help="Of (G + λ)⁻¹: `0.5` (default), or `1` for samples and queries at different checkpoints."),
    ] = None,
    min_ndim: Annotated[
        int | None, typer.Option(help="Leave out parameters of fewer dimensions: 2 leaves out norms and biases.")
    ] = None,
    mask_template: Annotated[
        bool, typer.Option("--mask-template", help="Leave out what the template's positions, and the first, say.")
    ] = False,
    store: StoreOption = None,
) -> None:
    r"""Add a sketcher: what of a gradient is sketched, and how.

    Example: `lark-store sketcher add last-layers --parameters 'model\.layers\.2[4-9]\.'`

    Example: `lark-store sketcher add adam2 --correction adam2 --min-ndim 2 --mask-template`

    Example: `lark-store sketcher add ekfac-1 --correction ekfac --power 1`
    """
    with open_store(store) as opened:
        info = opened.sketcher_add(
            name,
            k=k,
            seed=seed,
            dtype=dtype,
            parameters=parameters,
            exclude=exclude,
            correction=correction,
            damping=damping,
            power=power,
            min_ndim=min_ndim,
            mask_template=mask_template,
        )
    how = [f"k = {info.k}", f"seed {info.seed}", info.dtype]
    if info.correction != "none":
        of = [f"{what} {value:g}" for what, value in (("damping", info.damping), ("power", info.power)) if value]
        how.append(f"correction {info.correction}" + (f" ({', '.join(of)})" if of else ""))
    if info.min_ndim:
        how.append(f"parameters of {info.min_ndim} dimensions and more")
    how += [f"{what} `{regex}`" for what, regex in (("only", info.parameters), ("without", info.exclude)) if regex]
    if info.positions == "content":
        how.append("template masked")
    say(f"sketcher `{info.name}`: {', '.join(how)}")


def sketcher_default(
    name: Annotated[str, typer.Argument(help="The sketcher.")],
    store: StoreOption = None,
) -> None:
    """Set the sketcher that commands use where none is named.

    Example: `lark-store sketcher default adam`
    """
    with open_store(store) as opened:
        opened.sketcher_default(name)
    say(f"`{name}` is used where no sketcher is named")


def sketcher_show(
    name: Annotated[str, typer.Argument(help="The sketcher.")],
    checkpoint: Annotated[str, typer.Option("--checkpoint", "-c", metavar="NAME", help="Of this checkpoint's model.")],
    store: StoreOption = None,
    form: FormatOption = Format.table,
) -> None:
    """List a model's parameters, and which of them the sketcher takes."""
    with open_store(store) as opened:
        frame = opened.sketcher_show(name, checkpoint=checkpoint)
    emit(frame, form)
    taken = frame.filter(frame["sketched"])
    of = sum(frame["coordinates"])
    say(f"{len(taken)} of {len(frame)} parameters, {sum(taken['coordinates']):,} of {of:,} coordinates")


def register(app: typer.Typer) -> None:
    """Put these commands into the tree."""
    groups: list[tuple[str, str, list[Callable[..., None]]]] = [
        ("checkpoint", "Models at one moment of their training.", [checkpoint_add, checkpoint_distance]),
        ("source", "Sets of samples: fine-tuning data, pretraining text, queries.", [source_add]),
        ("variant", "How samples become text and targets.", [variant_add, variant_show]),
        (
            "sketcher",
            "What of a gradient is sketched.",
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
