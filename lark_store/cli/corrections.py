"""Commands for corrections: the factors that corrected sketchers need at a checkpoint."""

from __future__ import annotations

from typing import Annotated

import typer

from lark_store.cli.options import CheckpointOption, DeviceOption, PrecisionOption, StoreOption, open_store
from lark_store.cli.output import ProgressBar, say


def correction_fit(
    checkpoint: CheckpointOption,
    kind: Annotated[str, typer.Option(help="`adam` (which `adam2` uses too), `kfac` or `ekfac`.")] = "adam",
    source: Annotated[
        list[str] | None,
        typer.Option(
            "--source", "-s", metavar="NAME", help="Fit to samples of this source; several (default: stage `finetune`)."
        ),
    ] = None,
    variant: Annotated[str, typer.Option(metavar="NAME", help="The samples' format variant.")] = "chatml",
    samples: Annotated[int, typer.Option(help="How many samples, drawn at random, the same each time.")] = 500,
    seed: Annotated[int, typer.Option(help="The seed of the draw, and of the labels.")] = 0,
    from_optimizer: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Take the second moments of this `optimizer.pt`, or of the one in a folder."),
    ] = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    store: StoreOption = None,
) -> None:
    """Fit what sketchers with a correction need at a checkpoint.

    `adam`: the second moments of the gradients, as means of each matrix's rows and columns. `kfac`, `ekfac`: the
    curvature of each linear layer, with labels that the model draws itself; `ekfac` takes two passes over the samples.
    `ingest` fits what is missing by itself; fit it before to choose the samples, or to take the second moments of the
    optimizer that the Trainer saved. Fitting in the same way again is harmless; a fit that is stopped, even by
    `kill -9`, goes on where it was about a minute before.

    Example: `lark-store correction fit --checkpoint epoch-2 --source finetune`

    Example: `lark-store correction fit --checkpoint base --kind ekfac --source pubmed --samples 500`

    Example: `lark-store correction fit --checkpoint epoch-2 --from-optimizer ckpt/checkpoint-500/optimizer.pt`
    """
    with open_store(store) as opened, ProgressBar() as bar:
        info = opened.correction_fit(
            checkpoint,
            kind=kind,
            sources=source or (),
            variant=variant,
            samples=samples,
            seed=seed,
            from_optimizer=from_optimizer,
            device=device,
            precision=precision,
            on_progress=bar,
        )
    of = "the optimizer" if info.origin == "optimizer" else f"{info.n_samples} samples of {info.sources}"
    there = "" if info.is_new else ", there already"
    size = f"{info.n_bytes / 2**20:.2f} MiB"
    say(f"correction `{info.kind}` of checkpoint `{info.checkpoint}`: from {of}, {size}, {info.sha256[:12]}{there}")


def register(app: typer.Typer) -> None:
    """Put these commands into the tree."""
    group = typer.Typer(
        help="What gradients are corrected by, at a checkpoint.", no_args_is_help=True, rich_markup_mode="markdown"
    )
    group.command("fit")(correction_fit)
    app.add_typer(group, name="correction")
