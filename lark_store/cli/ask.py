"""Commands that answer: top and metrics."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003  typer reads it
from typing import Annotated

import typer

from lark_store.cli.options import (
    CheckpointsOption,
    DeviceOption,
    Format,
    FormatOption,
    MethodOption,
    OverOption,
    QueriesOption,
    QueryCheckpointOption,
    QueryVariantOption,
    SketcherOption,
    SnapshotOption,
    SourcesOption,
    StoreOption,
    VariantsOption,
    open_store,
)
from lark_store.cli.output import ProgressBar, emit, emit_noted, say, say_coverage


def top(
    checkpoint: Annotated[
        list[str],
        typer.Option("--checkpoint", "-c", metavar="NAME", help="The checkpoint; several with `--over-checkpoints`."),
    ],
    query: Annotated[str | None, typer.Argument(help="The id of a query; or leave it out and give a text.")] = None,
    k: Annotated[int, typer.Option("-k", help="How many samples.")] = 10,
    source: SourcesOption = None,
    variant: VariantsOption = None,
    where: Annotated[
        str | None,
        typer.Option(metavar="SQL", help="Only samples that satisfy this, as `n_tokens < 300 and year > 2015`."),
    ] = None,
    opponents: Annotated[
        bool, typer.Option("--opponents", help="The most negative influence instead of the most positive.")
    ] = False,
    prompt: Annotated[str | None, typer.Option(help="A new query's prompt, with `--response`.")] = None,
    response: Annotated[str | None, typer.Option(help="A new query's response.")] = None,
    text: Annotated[str | None, typer.Option(help="A new query that is one text.")] = None,
    file: Annotated[
        Path | None, typer.Option(help="A new query from a file: text, or the first row of a .jsonl, .parquet or .csv.")
    ] = None,
    queries: QueriesOption = None,
    query_checkpoint: QueryCheckpointOption = None,
    query_variant: QueryVariantOption = None,
    sketcher: SketcherOption = None,
    method: MethodOption = None,
    over_checkpoints: OverOption = None,
    null: Annotated[
        str | None,
        typer.Option(help="What p-values are against: `sources`, `signs`, `none` or the name of a source."),
    ] = None,
    approximate: Annotated[bool, typer.Option("--approximate", help="Search by the index (`index build`).")] = False,
    device: DeviceOption = "auto",
    store: StoreOption = None,
    snapshot: SnapshotOption = None,
    form: FormatOption = Format.table,
) -> None:
    """Print the samples with the most influence on one query, with their text and how far to trust each score.

    `noise` is the score's standard deviation from sketching; `q_value` at most 0.05 means: of such hits 5% are false,
    if the null is right (`--null`). A new query is sketched on the spot, with the checkpoint's model.

    Example: `lark-store top 21645374 --checkpoint epoch-2 -k 10 --source pubmed --where "n_tokens < 300"`

    Example: `lark-store top --prompt "Is aspirin safe?" --response yes --checkpoint epoch-2`
    """
    from lark_store.schema.records import NewText

    given = [prompt, response, text, file]
    new = None if given == [None] * 4 else NewText(prompt, response, text, file)
    with open_store(store, snapshot) as opened:
        hits = opened.top(
            query,
            checkpoint=checkpoint,
            k=k,
            sources=source or (),
            variants=variant or (),
            where=where,
            opponents=opponents,
            queries=queries,
            query_checkpoint=query_checkpoint,
            query_variant=query_variant,
            sketcher=sketcher,
            method=method,
            over_checkpoints=over_checkpoints,
            null=null,
            approximate=approximate,
            new=new,
            device=device,
        )
    emit(hits.frame, form)
    say(hits.how)


def scores(
    checkpoint: CheckpointsOption,
    query: Annotated[list[str] | None, typer.Argument(help="Ids of queries (default: all of one source).")] = None,
    source: SourcesOption = None,
    variant: VariantsOption = None,
    where: Annotated[str | None, typer.Option(metavar="SQL", help="Only samples that satisfy this.")] = None,
    queries: QueriesOption = None,
    query_checkpoint: QueryCheckpointOption = None,
    query_variant: QueryVariantOption = None,
    sketcher: SketcherOption = None,
    method: MethodOption = None,
    over_checkpoints: OverOption = None,
    device: DeviceOption = "auto",
    memory: Annotated[int, typer.Option(metavar="MIB", help="Memory for queries and for `whitened`, in MiB.")] = 1024,
    store: StoreOption = None,
    snapshot: SnapshotOption = None,
    form: FormatOption = Format.table,
) -> None:
    """Print the score of every sample for every query, a row each: for other programs.

    Example: `lark-store scores --checkpoint epoch-2 --source finetune -f csv`
    """
    with open_store(store, snapshot) as opened:
        found = opened.scores(
            query,
            checkpoint=checkpoint,
            sources=source or (),
            variants=variant or (),
            where=where,
            queries=queries,
            query_checkpoint=query_checkpoint,
            query_variant=query_variant,
            sketcher=sketcher,
            method=method,
            over_checkpoints=over_checkpoints,
            device=device,
            memory=memory << 20,
        )
    emit(found.frame, form)
    say(f"{found.score} of {len(found.samples)} samples for {len(found.query_ids)} queries")
    for note in found.notes:
        say(f"note: {note}")


def ft_pt(
    checkpoint: CheckpointsOption,
    queries: QueriesOption = None,
    query_variant: QueryVariantOption = None,
    sketcher: SketcherOption = None,
    method: MethodOption = None,
    over_checkpoints: OverOption = None,
    store: StoreOption = None,
    snapshot: SnapshotOption = None,
    form: FormatOption = Format.table,
) -> None:
    """Print, query by query, whether fine-tuning or pretraining reaches further, and by how much.

    Computed on the spot: a row per query and pair of a fine-tuning and a pretraining group.
    """
    with open_store(store, snapshot) as opened:
        frame = opened.ft_pt(
            checkpoint,
            queries=queries,
            query_variant=query_variant,
            sketcher=sketcher,
            method=method,
            over_checkpoints=over_checkpoints,
        )
        coverage = opened.coverage(sketcher=sketcher or opened.default_sketcher)
    emit_noted(frame, form)
    say_coverage(coverage, frame)


def trajectory(
    query: Annotated[str, typer.Argument(help="The id of a query.")],
    sample_id: Annotated[str, typer.Argument(help="The id of a sample.")],
    source: Annotated[str | None, typer.Option("--source", "-s", metavar="NAME", help="The sample's source.")] = None,
    variant: Annotated[str | None, typer.Option(metavar="NAME", help="The sample's format variant.")] = None,
    queries: QueriesOption = None,
    query_variant: QueryVariantOption = None,
    sketcher: SketcherOption = None,
    method: MethodOption = None,
    store: StoreOption = None,
    snapshot: SnapshotOption = None,
    form: FormatOption = Format.table,
) -> None:
    """Print one sample's influence on one query over the checkpoints."""
    with open_store(store, snapshot) as opened:
        frame = opened.trajectory(
            query,
            sample_id,
            source=source,
            variant=variant,
            queries=queries,
            query_variant=query_variant,
            sketcher=sketcher,
            method=method,
        )
    emit(frame, form)


def similar_text(
    query: Annotated[str | None, typer.Argument(help="The id of a query.")] = None,
    text: Annotated[str | None, typer.Option(help="Any text instead.")] = None,
    k: Annotated[int, typer.Option("-k", help="How many samples.")] = 10,
    source: SourcesOption = None,
    store: StoreOption = None,
    snapshot: SnapshotOption = None,
    form: FormatOption = Format.table,
) -> None:
    """Print the samples whose texts share most with a query's, by BM25."""
    with open_store(store, snapshot) as opened:
        emit(opened.similar_text(query, text=text, k=k, sources=source or ()), form)


def self_influence(
    checkpoint: CheckpointsOption,
    source: SourcesOption = None,
    k: Annotated[int, typer.Option("-k", help="How many samples.")] = 10,
    sketcher: SketcherOption = None,
    store: StoreOption = None,
    snapshot: SnapshotOption = None,
    form: FormatOption = Format.table,
) -> None:
    """Print the samples with the longest gradients: hard, rare or mislabelled ones.

    Self-influence is the squared norm of a sample's gradient, over several checkpoints weighted by learning rate.

    Example: `lark-store self-influence --checkpoint epoch-2 --source finetune`
    """
    with open_store(store, snapshot) as opened:
        emit(opened.self_influence(checkpoints=checkpoint, sources=source or (), k=k, sketcher=sketcher), form)


def index_build(
    sketcher: Annotated[str | None, typer.Argument(help="The sketcher (default: the store's).")] = None,
    store: StoreOption = None,
    form: FormatOption = Format.table,
) -> None:
    """Measure how many candidates an approximate search must read, for `top --approximate`.

    The index itself, 512 bytes beside every sketch, is written with the sketches; where it is missing it is added.
    """
    with open_store(store) as opened, ProgressBar() as bar:
        frame = opened.index_build(sketcher, on_progress=bar)
    emit(frame, form)


def metrics(
    checkpoint: Annotated[
        list[str] | None,
        typer.Option(
            "--checkpoint",
            "-c",
            metavar="NAME",
            help="Only this checkpoint (default: all); those of a sum, or its last.",
        ),
    ] = None,
    view: Annotated[
        str,
        typer.Option(
            help="`all`, `influence` (the paper's Table I), `dominance` (Table II) or `comparisons` (of two sources, "
            "and of a checkpoint with the one before, with q-values)."
        ),
    ] = "all",
    method: Annotated[
        str, typer.Option(help="What `attribute` scored by: `cosine`, `dot`, `tracin`, `bm25`, …")
    ] = "cosine",
    over_checkpoints: OverOption = None,
    sketcher: SketcherOption = None,
    query_variant: QueryVariantOption = None,
    store: StoreOption = None,
    snapshot: SnapshotOption = None,
    form: FormatOption = Format.table,
) -> None:
    """Print mean max influence, FT/PT ratio, FT wins, PT dominance and format effect, with 95% intervals and p-values.

    Intervals are bootstrapped over queries; p-values are of paired permutation tests over queries. Both speak of
    queries like these, not of other models or seeds. `attribute` must have scored before.
    """
    from lark_store.query.methods import Method

    with open_store(store, snapshot) as opened:
        frame = opened.metrics(
            checkpoint=checkpoint or None,
            view=view,
            method=method,
            over_checkpoints=over_checkpoints,
            sketcher=sketcher,
            query_variant=query_variant,
        )
        scored = Method.of(method, over_checkpoints).name
        coverage = opened.coverage(sketcher=sketcher or opened.default_sketcher, method=scored)
    emit(frame, form)
    say_coverage(coverage, frame)


def coverage(
    checkpoint: Annotated[
        str | None, typer.Option("--checkpoint", "-c", metavar="NAME", help="Only this checkpoint (default: all).")
    ] = None,
    sketcher: Annotated[
        str | None, typer.Option("--sketcher", metavar="NAME", help="Only this sketcher (default: all).")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="Of what `attribute` scored by this method (default: of what is sketched).")
    ] = None,
    store: StoreOption = None,
    snapshot: SnapshotOption = None,
    form: FormatOption = Format.table,
) -> None:
    """Print how much of each source was looked at: answers about a source are about that part of it."""
    with open_store(store, snapshot) as opened:
        frame = opened.coverage(checkpoint=checkpoint, sketcher=sketcher, method=method)
    emit(frame.drop("note"), form)
    for note in frame["note"].drop_nulls():
        say(f"note: {note}")


def register(app: typer.Typer) -> None:
    """Put these commands into the tree."""
    for command in (top, scores, metrics, coverage, ft_pt, trajectory, similar_text, self_influence):
        app.command()(command)
    group = typer.Typer(help="The approximate search.", no_args_is_help=True, rich_markup_mode="markdown")
    group.command("build")(index_build)
    app.add_typer(group, name="index")
