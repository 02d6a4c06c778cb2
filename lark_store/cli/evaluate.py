"""Commands that evaluate attribution scores, one per kind of evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Unpack

import typer

from lark_store.cli.options import CheckpointOption, StoreOptions
from lark_store.cli.output import ProgressBar, say
from lark_store.cli.spec_options import takes
from lark_store.specs import (
    EvaluateSpec,
    FactsOptions,
    FactsSpec,
    FormatOptions,
    FormatSpec,
    LdsOptions,
    LdsSpec,
    RankSpec,
    SpearmanOptions,
    SpearmanSpec,
    StepOptions,
    StepSpec,
    TailPatchOptions,
    TrainingSpec,
)

if TYPE_CHECKING:
    from collections.abc import Callable

_Scores = Annotated[
    list[str],
    typer.Option(
        "--score",
        metavar="SCORE",
        help="`SKETCHER:METHOD@CHECKPOINT` (joined by `+`: their sum; `'…@BASE>TUNED'` in quotes: samples at one, "
        "queries at the other), or a baseline such as `bm25`, `random`, `length`, `same:KEY`; repeatable, each "
        "compared with the first.",
    ),
]


@takes(LdsSpec, TrainingSpec, EvaluateSpec)
def lds(common: StoreOptions, scores: _Scores, checkpoint: CheckpointOption, **options: Unpack[LdsOptions]) -> None:
    """Retrain on random half sets and test whether summed scores predict the queries' losses.

    The linear datamodeling score: per query, the rank correlation over the half sets between the summed scores of the
    samples in a set and −loss. Run it again to resume; more half sets or seeds can be added later.

    Example: `lark-store evaluate lds --score lark:cosine@base --score bm25 --checkpoint base --half-sets 40`
    """
    from lark_store.evaluate import lds as run

    _run(common, run, scores, checkpoint=checkpoint, **options)


@takes(FactsSpec, EvaluateSpec)
def facts(
    common: StoreOptions,
    scores: _Scores,
    key: Annotated[str, typer.Option(metavar="COLUMN", help="Metadata column that links a query to its own samples.")],
    **options: Unpack[FactsOptions],
) -> None:
    """Rank the samples known to state each query's answer: MRR and recall.

    `--rerank` ranks a query's own samples, the 100 best by BM25, 100 with the same answer and 100 at random, in
    `--trials` trials.

    Example: `lark-store evaluate facts --score lark:cosine@epoch-1 --score bm25 --key fact --rerank`
    """
    from lark_store.evaluate import facts as run

    _run(common, run, scores, key=key, **options)


@takes(StepSpec, EvaluateSpec)
def causal(common: StoreOptions, scores: _Scores, checkpoint: CheckpointOption, **options: Unpack[StepOptions]) -> None:
    """Take one real optimizer step per sample and test whether scores predict its effect on the queries' losses.

    Per query, the rank correlation of the scores with the decrease of its loss, and the share of correct signs where
    the effect is large. Run it again to resume.

    Example: `lark-store evaluate causal --score lark:cosine@base --score bm25 --checkpoint base --max-samples 200`
    """
    from lark_store.evaluate import causal as run

    _run(common, run, scores, checkpoint=checkpoint, **options)


@takes(RankSpec, StepSpec, EvaluateSpec, k="Samples per step.")
def tail_patch(
    common: StoreOptions, scores: _Scores, checkpoint: CheckpointOption, **options: Unpack[TailPatchOptions]
) -> None:
    """Take one real optimizer step on a query's top samples and measure the gain in its answer's log-probability.

    The top samples of `random` and `bm25` serve as baselines. Run it again to resume.

    Example: `lark-store evaluate tail-patch --score lark:cosine@base --checkpoint base --max-queries 50`
    """
    from lark_store.evaluate import tail_patch as run

    _run(common, run, scores, checkpoint=checkpoint, **options)


@takes(FormatSpec, EvaluateSpec)
def format_(common: StoreOptions, scores: _Scores, **options: Unpack[FormatOptions]) -> None:
    """Measure the AUC with which scores tell apart formats (ideally 0.5), sources and domains.

    Give `--variant` at least twice; the same samples are compared across variants.

    Example: `lark-store evaluate format --score lark:cosine@base -s songs -s medical --variant raw --variant chatml
    --against-rest medical`
    """
    from lark_store.evaluate import format as run

    _run(common, run, scores, **options)


@takes(SpearmanSpec, EvaluateSpec)
def spearman(
    common: StoreOptions,
    scores: _Scores,
    reference: Annotated[str, typer.Option(metavar="SCORE", help="The reference score.")],
    **options: Unpack[SpearmanOptions],
) -> None:
    """Rank-correlate scores with a reference score over all candidates, per query, and time them.

    `overhead_seconds` is the time to prepare a score, once; `pairwise_seconds` to score all candidates for one query.
    With `--trials`, each trial draws queries and candidates, and `trial_sd` is the spread of the trials' means.

    Example: `lark-store evaluate spearman --reference cg:0.1@base --score lark:dot@base --score gdp@base --trials 10
    --max-queries 10 --max-samples 500`
    """
    from lark_store.evaluate import spearman as run

    _run(common, run, scores, reference=reference, **options)


def _run(common: StoreOptions, run: Callable[..., Any], scores: list[str], **options: Any) -> None:
    with common.open() as opened, ProgressBar() as bar:
        result = run(opened, scores, on_progress=bar, **options)
    common.emit(result.table)
    for note in result.notes:
        say(f"note: {note}")
    say(f"saved as `{result.name}` in the view `evaluations`; the chart is `{result.files[-1]}`")


def register(app: typer.Typer) -> None:
    """Add these commands to the app."""
    group = typer.Typer(
        name="evaluate",
        no_args_is_help=True,
        rich_markup_mode="markdown",
        help="Evaluate scores against retraining, real optimizer steps and known facts.",
    )
    for command in (lds, facts, causal, tail_patch, spearman):
        group.command()(command)
    group.command("format")(format_)
    app.add_typer(group)
