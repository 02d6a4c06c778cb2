"""Commands that find out which of the store's scores are true: a kind of evaluation each."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lark_store.cli.options import CheckpointOption, DeviceOption, Format, FormatOption, StoreOption, open_store
from lark_store.cli.output import ProgressBar, emit, say

if TYPE_CHECKING:
    from collections.abc import Callable

_Scores = Annotated[
    list[str],
    typer.Option(
        "--score",
        metavar="SCORE",
        help="`SKETCHER:METHOD@CHECKPOINT` (joined by `+`: their sum), or a rival such as `bm25`, `random`, "
        "`length`, `same:KEY`; several, compared with the first.",
    ),
]
_Sources = Annotated[
    list[str] | None,
    typer.Option("--source", "-s", metavar="NAME", help="A source of candidates; several (default: stage `finetune`)."),
]
_Variants = Annotated[
    list[str] | None, typer.Option("--variant", metavar="NAME", help="Their format variant (default: `chatml`).")
]
_Queries = Annotated[
    str | None, typer.Option("--queries", "-q", metavar="NAME", help="The queries' source (default: the only one).")
]
_QueryVariant = Annotated[str, typer.Option("--query-variant", metavar="NAME", help="The queries' format variant.")]
_MaxQueries = Annotated[int | None, typer.Option(help="Only the first queries.")]
_MaxSamples = Annotated[int | None, typer.Option(help="Only so many candidates, drawn at random.")]
_Seed = Annotated[int, typer.Option(help="The seed of all that is drawn.")]
_Precision = Annotated[str, typer.Option(help="The model's: `float32`, `bfloat16`, or `auto`.")]
_Out = Annotated[
    Path, typer.Option("--out", "-o", metavar="FOLDER", help="Where tables, charts and what is done so far go.")
]
_Name = Annotated[
    str | None, typer.Option(metavar="NAME", help="Its name in the view `evaluations` (default: made up).")
]
_Optimizer = Annotated[str, typer.Option(help="`adam` (without decay; with second moments of the training) or `sgd`.")]
_Rate = Annotated[float, typer.Option(help="The step's.")]
_MomentSamples = Annotated[int, typer.Option(help="Measure Adam's second moments on so many training samples.")]
_OUT = Path("evaluations")


def lds(
    scores: _Scores,
    checkpoint: CheckpointOption,
    half_sets: Annotated[int, typer.Option(help="How many half sets.")] = 40,
    seeds: Annotated[int, typer.Option(help="Train on each with so many seeds.")] = 1,
    epochs: Annotated[int, typer.Option(help="Epochs of each training.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="AdamW's, the same at all steps.")] = 1e-4,
    batch_size: Annotated[int, typer.Option(help="Samples of a step.")] = 4,
    weight_decay: Annotated[float, typer.Option(help="AdamW's.")] = 0.0,
    max_grad_norm: Annotated[float, typer.Option(help="Longer gradients are cut to this norm.")] = 1.0,
    sources: _Sources = None,
    variants: _Variants = None,
    queries: _Queries = None,
    query_variant: _QueryVariant = "chatml",
    max_queries: _MaxQueries = None,
    max_samples: _MaxSamples = None,
    seed: _Seed = 0,
    device: DeviceOption = "auto",
    precision: _Precision = "float32",
    out: _Out = _OUT,
    name: _Name = None,
    store: StoreOption = None,
    form: FormatOption = Format.table,
) -> None:
    """Retrain on random half sets, and see whether summed scores foretell the queries' losses.

    The linear datamodeling score: per query the rank correlation, over the half sets, of the sum of the scores of the
    samples in it with −loss. Killed and run again it goes on; more half sets or seeds can be added later.

    Example: `lark-store evaluate lds --score lark:cosine@base --score bm25 --checkpoint base --half-sets 40`
    """
    from lark_store.evaluate import lds as run

    training = {"epochs": epochs, "learning_rate": learning_rate, "batch_size": batch_size}
    training |= {"weight_decay": weight_decay, "max_grad_norm": max_grad_norm}
    how = {"checkpoint": checkpoint, "half_sets": half_sets, "seeds": seeds} | training
    _run(run, scores, store, form, how | _options(locals()))


def facts(
    scores: _Scores,
    key: Annotated[str, typer.Option(metavar="COLUMN", help="Metadata by which a query's own samples are known.")],
    at: Annotated[
        list[int] | None, typer.Option(metavar="K", help="Recall among the first K; several (1, 10).")
    ] = None,
    rerank: Annotated[
        bool, typer.Option("--rerank", help="Also among candidates that are hard to tell apart.")
    ] = False,
    trials: Annotated[int, typer.Option(help="Of the rerank protocol.")] = 3,
    sources: _Sources = None,
    variants: _Variants = None,
    queries: _Queries = None,
    query_variant: _QueryVariant = "chatml",
    max_queries: _MaxQueries = None,
    max_samples: _MaxSamples = None,
    seed: _Seed = 0,
    device: DeviceOption = "auto",
    precision: _Precision = "float32",
    out: _Out = _OUT,
    name: _Name = None,
    store: StoreOption = None,
    form: FormatOption = Format.table,
) -> None:
    """Rank the samples that are known to state each query's answer: MRR and recall.

    `--rerank` asks among the own samples, the 100 best by BM25, 100 with the same answer and 100 at random, in three
    trials.

    Example: `lark-store evaluate facts --score lark:cosine@epoch-1 --score bm25 --key fact --rerank`
    """
    from lark_store.evaluate import facts as run

    how = {"key": key, "at": tuple(at or (1, 10)), "rerank": rerank, "trials": trials}
    _run(run, scores, store, form, how | _options(locals()))


def causal(
    scores: _Scores,
    checkpoint: CheckpointOption,
    optimizer: _Optimizer = "adam",
    learning_rate: _Rate = 2e-5,
    moment_samples: _MomentSamples = 100,
    sources: _Sources = None,
    variants: _Variants = None,
    queries: _Queries = None,
    query_variant: _QueryVariant = "chatml",
    max_queries: _MaxQueries = None,
    max_samples: _MaxSamples = None,
    seed: _Seed = 0,
    device: DeviceOption = "auto",
    precision: _Precision = "float32",
    out: _Out = _OUT,
    name: _Name = None,
    store: StoreOption = None,
    form: FormatOption = Format.table,
) -> None:
    """Make one real optimizer step on each sample, and see whether scores foretell what it does to the queries' losses.

    Per query the rank correlation of scores with the fall of its loss, and the share of right signs where the effect is
    large. Killed and run again it goes on.

    Example: `lark-store evaluate causal --score lark:cosine@base --score bm25 --checkpoint base --max-samples 200`
    """
    from lark_store.evaluate import causal as run

    how = {"checkpoint": checkpoint, "optimizer": optimizer, "learning_rate": learning_rate}
    _run(run, scores, store, form, how | {"moment_samples": moment_samples} | _options(locals()))


def tail_patch(
    scores: _Scores,
    checkpoint: CheckpointOption,
    k: Annotated[int, typer.Option("-k", help="How many samples a step is made on, together.")] = 10,
    optimizer: _Optimizer = "adam",
    learning_rate: _Rate = 2e-5,
    moment_samples: _MomentSamples = 100,
    sources: _Sources = None,
    variants: _Variants = None,
    queries: _Queries = None,
    query_variant: _QueryVariant = "chatml",
    max_queries: _MaxQueries = None,
    max_samples: _MaxSamples = None,
    seed: _Seed = 0,
    device: DeviceOption = "auto",
    precision: _Precision = "float32",
    out: _Out = _OUT,
    name: _Name = None,
    store: StoreOption = None,
    form: FormatOption = Format.table,
) -> None:
    """Make one real optimizer step on a query's top samples together, and see what its answer's log-probability gains.

    Those of `random` and `bm25` are there for comparison. Killed and run again it goes on.

    Example: `lark-store evaluate tail-patch --score lark:cosine@base --checkpoint base --max-queries 50`
    """
    from lark_store.evaluate import tail_patch as run

    how = {"checkpoint": checkpoint, "k": k, "optimizer": optimizer, "learning_rate": learning_rate}
    _run(run, scores, store, form, how | {"moment_samples": moment_samples} | _options(locals()))


def format_(
    scores: _Scores,
    against_rest: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A source to be told from all others; several.")
    ] = None,
    domains: Annotated[
        list[str] | None, typer.Option("--domain", metavar="NAME", help="A domain to be told from all others; several.")
    ] = None,
    sources: _Sources = None,
    variants: _Variants = None,
    queries: _Queries = None,
    query_variant: _QueryVariant = "chatml",
    max_queries: _MaxQueries = None,
    max_samples: _MaxSamples = None,
    seed: _Seed = 0,
    device: DeviceOption = "auto",
    precision: _Precision = "float32",
    out: _Out = _OUT,
    name: _Name = None,
    store: StoreOption = None,
    form: FormatOption = Format.table,
) -> None:
    """See how well scores tell apart formats, which they should not, and sources and domains: the AUC.

    Give `--variant` twice; the same samples in one are held against those in the others.

    Example: `lark-store evaluate format --score lark:cosine@base -s songs -s medical --variant raw --variant chatml
    --against-rest medical`
    """
    from lark_store.evaluate import format as run

    how = {"against_rest": against_rest or [], "domains": domains or []}
    _run(run, scores, store, form, how | _options(locals()))


def spearman(
    scores: _Scores,
    reference: Annotated[str, typer.Option(metavar="SCORE", help="The score that is taken for the truth.")],
    sources: _Sources = None,
    variants: _Variants = None,
    queries: _Queries = None,
    query_variant: _QueryVariant = "chatml",
    max_queries: _MaxQueries = None,
    max_samples: _MaxSamples = None,
    seed: _Seed = 0,
    device: DeviceOption = "auto",
    precision: _Precision = "float32",
    out: _Out = _OUT,
    name: _Name = None,
    store: StoreOption = None,
    form: FormatOption = Format.table,
) -> None:
    """Correlate scores with a reference's over all candidates, query by query.

    Example: `lark-store evaluate spearman --reference exact:dot@base --score lark:dot@base --score bm25`
    """
    from lark_store.evaluate import spearman as run

    _run(run, scores, store, form, {"reference": reference} | _options(locals()))


_SHARED = "sources variants queries query_variant max_queries max_samples seed device precision out name".split()  # noqa: SIM905


def _options(given: dict[str, Any]) -> dict[str, Any]:
    """Return the options that all kinds share, of a command's arguments; those not given are left to their defaults."""
    return {name: given[name] for name in _SHARED if given.get(name) is not None}


def _run(run: Callable[..., Any], scores: list[str], store: str | None, form: Format, how: dict[str, Any]) -> None:
    with open_store(store) as opened, ProgressBar() as bar:
        found = run(opened, scores, on_progress=bar, **how)
    emit(found.table, form)
    for note in found.notes:
        say(f"note: {note}")
    say(f"kept as `{found.name}` in the view `evaluations`; the chart is `{found.files[-1]}`")


def register(app: typer.Typer) -> None:
    """Put these commands into the tree."""
    group = typer.Typer(
        name="evaluate",
        no_args_is_help=True,
        rich_markup_mode="markdown",
        help="Which of the store's scores are true: held against retraining, real steps and known facts.",
    )
    for command in (lds, facts, causal, tail_patch, spearman):
        group.command()(command)
    group.command("format")(format_)
    app.add_typer(group)
