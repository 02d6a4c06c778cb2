"""Commands that read results: top, scores, metrics, ft-pt, trajectory, and so on."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Unpack

import typer

from lark_store.cli.formats import Format
from lark_store.cli.options import (
    AttentionOption,
    CheckpointsOption,
    NewQueryOptions,
    OneCheckpointOption,
    ReadOptions,
    StoreOptions,
)
from lark_store.cli.output import ProgressBar, emit_noted, say, say_coverage
from lark_store.cli.rankings import emit_hits
from lark_store.cli.spec_options import takes
from lark_store.cli.tables import without_blanks
from lark_store.display.table import About
from lark_store.query.methods import METHODS, of_label
from lark_store.specs import (
    Compute,
    CoverageOptions,
    GroupsOptions,
    GroupsSpec,
    MethodOptions,
    MetricsOptions,
    MetricsSpec,
    RankSpec,
    ScoreOptions,
    ScoresOptions,
    SearchSpec,
    SelfInfluenceOptions,
    SimilarTextOptions,
    TopOptions,
    TraceOptions,
    TraceSpec,
)

if TYPE_CHECKING:
    import polars as pl

    from lark_store.results import NewText
    from lark_store.store import Store

_SELF_INFLUENCE = "score: squared norm of the sample's gradient; high: hard, rare or mislabelled"


@takes(SearchSpec, RankSpec, Compute)
def top(
    common: ReadOptions,
    given: NewQueryOptions,
    checkpoint: Annotated[
        list[str],
        typer.Option(
            "--checkpoint",
            "-c",
            metavar="NAME",
            help="The checkpoint; several are shown side by side, or summed with `--over-checkpoints`.",
        ),
    ],
    query: Annotated[
        list[str] | None,
        typer.Argument(help="Ids of queries, or SOURCE/ID for samples of any source; omit them for a new text."),
    ] = None,
    attention: AttentionOption = "auto",
    **options: Unpack[TopOptions],
) -> None:
    """Print the samples with the most influence on one query, with their text and the noise of each score.

    `noise` is the score's standard deviation due to sketching. Of the hits with `q_value` ≤ 0.05, about 5% are false if
    the null holds (`--null`). A new query is sketched on the fly with the checkpoint's model. A sample as the query
    (SOURCE/ID) is left out of its own hits.

    Example: `lark-store top 21645374 --checkpoint epoch-2 -k 10 --source pubmed --where "n_tokens < 300"`

    Example: `lark-store top --prompt "Is aspirin safe?" --response yes --checkpoint epoch-2`

    Example: `lark-store top finetune/q17 --checkpoint base --checkpoint epoch-2`
    """
    from lark_store.query.methods import Method

    is_sum = Method.of(options.get("method"), options.get("over_checkpoints")).over is not None
    ids = query[0] if query and len(query) == 1 else query or None
    asked: dict[str, Any] = {"query": ids, "new": _new_texts(given, attention), **options}
    asked |= {"checkpoint": checkpoint} if len(checkpoint) == 1 or is_sum else {"checkpoints": checkpoint}
    with common.open() as opened:
        hits = opened.top(**asked)
    emit_hits(hits, common)


@takes(
    SearchSpec,
    RankSpec,
    TraceSpec,
    Compute,
    query_checkpoint="The checkpoint that answers (default: the same).",
    query_variant="The question's format variant (default: `chatml`).",
)
def trace(
    common: ReadOptions,
    question: Annotated[str, typer.Argument(help="The question, asked as a chat prompt.")],
    checkpoint: Annotated[
        str | None,
        typer.Option("--checkpoint", "-c", metavar="NAME", help="The checkpoint (default: the newest with sketches)."),
    ] = None,
    **options: Unpack[TraceOptions],
) -> None:
    """Print the model's own answer to a question, and the samples with the most influence on it.

    The answer is greedy: the most likely tokens. Its mean log-probability is in nats per token.

    Example: `lark-store trace "Is aspirin safe for children?" --checkpoint epoch-3 -k 5`

    Example: `lark-store trace "Is aspirin safe?" --checkpoint base --query-checkpoint epoch-3 --sketcher ekfac-1`
    """
    with common.open() as opened:
        result = opened.trace(question, checkpoint=checkpoint, **options)
    if common.form == Format.table:
        print(result.said)  # noqa: T201
    else:
        say(result.said)
    common.emit(result.frame, result.hits.about)
    say(result.hits.how)


def _new_texts(given: NewQueryOptions, attention: str) -> NewText | list[NewText] | None:
    """Return the new query, or those of a file; None without any."""
    if given.file is None or not given.is_file_alone:
        return given.new_text(attention)
    from lark_store.ingest.new_texts import new_texts

    texts = [replace(text, attention=attention) for text in new_texts(given.file)]
    return texts[0] if len(texts) == 1 else texts


@takes(SearchSpec, RankSpec, Compute)
def scores(
    common: ReadOptions,
    checkpoint: CheckpointsOption,
    query: Annotated[list[str] | None, typer.Argument(help="Ids of queries (default: all of one source).")] = None,
    **options: Unpack[ScoresOptions],
) -> None:
    """Print the score of every sample for every query, one row per pair, for use by other programs.

    Example: `lark-store scores --checkpoint epoch-2 --source finetune -f csv`
    """
    with common.open() as opened:
        result = opened.scores(query, checkpoint=checkpoint, **options)
    common.emit(result.frame, result.about)
    say(f"{result.score} of {len(result.samples)} samples for {len(result.query_ids)} queries{result.across}")
    for note in result.notes:
        say(f"note: {note}")


@takes(SearchSpec, RankSpec, GroupsSpec, Compute)
def groups(
    common: ReadOptions,
    checkpoint: CheckpointsOption,
    query: Annotated[list[str] | None, typer.Argument(help="Ids of queries (default: all).")] = None,
    **options: Unpack[GroupsOptions],
) -> None:
    """Print the influence of groups of samples: of each topic, format, source, or any key of their metadata.

    A group's value is the mean, sum or maximum of its samples' scores, averaged over the queries. Intervals (95%) are
    over queries, for one query over the group's samples. `wins` is the share of queries for which no group has more.

    Example: `lark-store groups --by topic --by format --checkpoint epoch-2`
    """
    with common.open() as opened:
        frame = opened.groups(query, checkpoint=checkpoint, **options)
    about = _about(frame)
    if common.form == Format.table:
        frame, legend = without_blanks(frame if frame["subgroup_name"].count() else frame.drop("subgroup_name"))
        about = replace(about, legend=[*about.legend, *legend])
    emit_noted(_shown(frame, common), common.form, about, wide=common.wide)


@takes(SearchSpec)
def ft_pt(common: ReadOptions, checkpoint: CheckpointsOption, **options: Unpack[ScoreOptions]) -> None:
    """Print per query whether fine-tuning or pretraining has more influence, and by how much.

    Computed on the fly: one row per query and pair of a fine-tuning and a pretraining group.
    """
    with common.open() as opened:
        frame = opened.ft_pt(checkpoint, **options)
        coverage = _coverage(opened, frame, options.get("sketcher"))
    emit_noted(_shown(frame, common), common.form, _about(frame), wide=common.wide)
    say_coverage(coverage, frame)


def _coverage(opened: Store, frame: pl.DataFrame, sketcher: str | None, **scores: Any) -> pl.DataFrame:
    """Return the coverage of the given sketcher, or of the one that made a frame's scores, such as `adam · cosine`."""
    name, separator, _ = next(iter(frame["scored_by"]), "").partition(" · ")
    used = sketcher or (name if separator else opened.default_sketcher)
    coverage = opened.coverage(sketcher=used, **scores)
    return opened.coverage(**scores) if coverage.is_empty() else coverage


def _shown(frame: pl.DataFrame, common: StoreOptions) -> pl.DataFrame:
    """Return a frame for printing: a table without the queries' checkpoint where it is the samples' own."""
    is_table = common.form == Format.table and not common.wide
    is_same = (frame["query_checkpoint"] == frame["checkpoint"]).all()
    return frame.drop("query_checkpoint") if is_table and is_same else frame


@takes(SearchSpec)
def trajectory(
    common: ReadOptions,
    query: Annotated[str, typer.Argument(help="The id of a query.")],
    sample_id: Annotated[str, typer.Argument(help="The id of a sample.")],
    source: Annotated[str | None, typer.Option("--source", "-s", metavar="NAME", help="The sample's source.")] = None,
    variant: Annotated[
        str | None, typer.Option("--variant", "-v", metavar="NAME", help="The sample's format variant.")
    ] = None,
    **options: Unpack[MethodOptions],
) -> None:
    """Print one sample's influence on one query, checkpoint by checkpoint."""
    with common.open() as opened:
        frame = opened.trajectory(query, sample_id, source=source, variant=variant, **options)
    common.emit(_shown(frame, common), _about(frame))


@takes(RankSpec, SearchSpec)
def similar_text(
    common: ReadOptions,
    query: Annotated[str | None, typer.Argument(help="The id of a query.")] = None,
    text: Annotated[str | None, typer.Option(help="Search for this text instead.")] = None,
    **options: Unpack[SimilarTextOptions],
) -> None:
    """Print the samples with the texts most similar to a query's, by BM25."""
    with common.open() as opened:
        frame = opened.similar_text(query, text=text, **options)
    common.emit(frame, About(legend=[f"score: {METHODS['bm25'].scale}"]))


@takes(RankSpec, SearchSpec)
def self_influence(common: ReadOptions, checkpoint: CheckpointsOption, **options: Unpack[SelfInfluenceOptions]) -> None:
    """Print the samples with the largest gradients: hard, rare or mislabelled ones.

    Self-influence is the squared norm of a sample's gradient. Several checkpoints are weighted by learning rate.

    Example: `lark-store self-influence --checkpoint epoch-2 --source finetune`
    """
    with common.open() as opened:
        frame = opened.self_influence(checkpoints=checkpoint, **options)
    common.emit(frame, About(legend=[_SELF_INFLUENCE]))


@takes()
def index_build(
    common: StoreOptions,
    sketcher: Annotated[str | None, typer.Argument(help="The sketcher (default: the store's).")] = None,
) -> None:
    """Measure how many candidates `top --approximate` must read.

    The index, 512 bytes per sketch, is written with the sketches; this command adds it to older tables.
    """
    with common.open() as opened, ProgressBar() as bar:
        frame = opened.index_build(sketcher, on_progress=bar)
    common.emit(frame)


@takes(
    SearchSpec,
    MetricsSpec,
    method="The scores' method: `cosine` (default), `dot` (default with `--query-checkpoint`), `tracin`, …",
    query_checkpoint="The scores of queries at this checkpoint, samples at others (default: at the same).",
)
def metrics(
    common: ReadOptions,
    checkpoint: Annotated[
        list[str] | None,
        typer.Option(
            "--checkpoint",
            "-c",
            metavar="NAME",
            help="Only this checkpoint (default: all). For a sum: its checkpoints, or the last of them.",
        ),
    ] = None,
    **options: Unpack[MetricsOptions],
) -> None:
    """Print mean max influence, FT/PT ratio, FT wins, PT dominance and format effect, with 95% intervals and p-values.

    The FT/PT ratio and the format effect (each variant against `raw`) are ratios of means over queries, empty unless
    both means are above 0. `r_median`, `r_q1` and `r_q3` are the median and quartiles of single queries' ratios.

    Intervals are bootstrapped over queries; p-values come from paired permutation tests over queries. Both generalise
    to similar queries, not to other models or seeds. `sketch_error` bounds the change of a figure under another
    sketcher seed; more queries do not reduce it. Run `attribute` first.
    """
    with common.open() as opened:
        frame = opened.metrics(checkpoint=checkpoint or None, **options)
        name = of_label(frame["scored_by"][0]).name
        at = options.get("query_checkpoint")
        coverage = _coverage(opened, frame, options.get("sketcher"), method=name, query_checkpoint=at)
    common.emit(_shown(frame, common), _about(frame), by="metric" if "metric" in frame.columns else None)
    say_coverage(coverage, frame)


@takes(
    SearchSpec,
    sketcher="Only this sketcher (default: all).",
    method="Coverage of the scores by this method (default: of the sketches).",
    query_checkpoint="With `--method`: of queries at this checkpoint (default: the samples').",
)
def coverage(
    common: ReadOptions,
    checkpoint: OneCheckpointOption = None,
    **options: Unpack[CoverageOptions],
) -> None:
    """Print the share of each source that is sketched or scored; answers cover only that part."""
    with common.open() as opened:
        frame = opened.coverage(checkpoint=checkpoint, **options)
    common.emit(frame.drop("note"))
    for note in frame["note"].drop_nulls():
        say(f"note: {note}")


def _about(frame: pl.DataFrame) -> About:
    """Explain the scores of a frame, by its labels in `scored_by`."""
    methods = [of_label(label) for label in frame["scored_by"].unique(maintain_order=True)]
    return About(legend=[f"scores: {scale}" for scale in dict.fromkeys(method.scale for method in methods)])


def register(app: typer.Typer) -> None:
    """Add these commands to the app."""
    for command in (top, trace, scores, groups, metrics, coverage, ft_pt, trajectory, similar_text, self_influence):
        app.command()(command)
    group = typer.Typer(help="The approximate search.", no_args_is_help=True, rich_markup_mode="markdown")
    group.command("build")(index_build)
    app.add_typer(group, name="index")
