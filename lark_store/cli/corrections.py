"""Commands for corrections: fit the factors of corrected sketchers at a checkpoint."""

from __future__ import annotations

from typing import Unpack

import typer

from lark_store.cli.options import CheckpointOption, StoreOption, open_store
from lark_store.cli.output import ProgressBar, say
from lark_store.cli.spec_options import takes
from lark_store.specs import Compute, FitOptions, FitSpec


@takes(FitSpec, Compute)
def correction_fit(checkpoint: CheckpointOption, store: StoreOption = None, **options: Unpack[FitOptions]) -> None:
    """Fit the factors of a correction at a checkpoint.

    `adam`: the second moments of the gradients, as means of each matrix's rows and columns. `kfac`, `ekfac`: the
    curvature of each linear layer, with labels drawn from the model; `ekfac` takes two passes over the samples.
    `ingest` fits missing factors itself; fit them first to choose the samples, or to use the second moments of the
    Trainer's saved optimizer. Fitting the same factors twice is harmless. A stopped fit, even by `kill -9`, resumes
    and loses at most about a minute.

    Example: `lark-store correction fit --checkpoint epoch-2 --source finetune`

    Example: `lark-store correction fit --checkpoint base --kind ekfac --source pubmed --samples 500`

    Example: `lark-store correction fit --checkpoint epoch-2 --from-optimizer ckpt/checkpoint-500/optimizer.pt`
    """
    with open_store(store) as opened, ProgressBar() as bar:
        info = opened.correction_fit(checkpoint, on_progress=bar, **options)
    origin = "the optimizer" if info.origin == "optimizer" else f"{info.n_samples} samples of {info.sources}"
    state = "" if info.is_new else ", existing"
    size = f"{info.n_bytes / 2**20:.2f} MiB"
    say(f"correction `{info.kind}` of checkpoint `{info.checkpoint}`: from {origin}, {size}, {info.sha256[:12]}{state}")
    for note in info.notes:
        say(f"note: {note}")


def register(app: typer.Typer) -> None:
    """Add these commands to the app."""
    group = typer.Typer(help="Factors of gradient corrections.", no_args_is_help=True, rich_markup_mode="markdown")
    group.command("fit")(correction_fit)
    app.add_typer(group, name="correction")
