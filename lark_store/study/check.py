"""What a recipe and its pools can be known to fail of is said before hours of training."""

from __future__ import annotations

import json
import os
from collections import Counter
from typing import TYPE_CHECKING

from lark_store.errors import CheckpointError, InputError
from lark_store.ingest.checkpoints import examine
from lark_store.ingest.gradients import choose_parameters
from lark_store.ingest.models import context_length, load_tokenizer, meta_model
from lark_store.ingest.sketchers import make_sketcher
from lark_store.ingest.variants import Tokens
from lark_store.study import pools
from lark_store.study.finetune import check_options
from lark_store.study.recipe import EVALUATION
from lark_store.study.render import renderer_of

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

    from lark_store.ingest.sources import Sample
    from lark_store.study.recipe import Recipe, Source


def check(recipe: Recipe, paths: dict[str, Path]) -> None:
    """Try the model, the sketcher, the training's options, each source's formats, the labels and the truth's column.

    `paths` are those of the pools. No weights are loaded and nothing is written.

    Raises
    ------
    InputError, CheckpointError
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise InputError("a study trains in one process", "run it without `torchrun` and the like")
    how = recipe.sketch
    make_sketcher("study", k=how.k, seed=how.seed, parameters=how.parameters, exclude=how.exclude)
    folder = examine(recipe.place(recipe.model.path), recipe.model.revision).folder
    model = meta_model(folder)
    _whole(folder)
    choose_parameters(model, how.parameters, how.exclude)
    check_options(recipe)
    tokenizer, context = load_tokenizer(folder), context_length(model)
    samples = {name: pools.read(path) for name, path in paths.items()}
    for source in recipe.source:
        for variant in source.variants:
            _format(recipe, source, variant, samples[source.name], tokenizer, context)
    if recipe.evaluate:
        _labels(recipe.evaluate.labels, samples[EVALUATION])
    if recipe.truth:
        _truth(recipe, recipe.truth.column, samples)


def _whole(folder: Path) -> None:
    """Refuse weights that were cut off, before their hash stands for the base model."""
    from safetensors import SafetensorError, safe_open

    for path in folder.glob("*.safetensors"):
        try:
            with safe_open(path, "pt"):
                pass
        except SafetensorError as error:
            raise CheckpointError(f"`{path}` can't be read: {error}", "is the file whole?") from error


def _format(
    recipe: Recipe, source: Source, variant: str, samples: list[Sample], tokenizer: Any, context: int | None
) -> None:
    """Refuse a variant that no sample has a form in, that leaves out their texts, or gives nothing to learn."""
    renderer = renderer_of(recipe, variant, tokenizer, context)
    tried = [renderer.attempt(sample) for sample in samples]
    made = [found for found in tried if isinstance(found, Tokens)]
    name = f"`{source.name}` as `{variant}`"
    if not made:
        ((reason, _),) = Counter(str(found) for found in tried).most_common(1)
        raise InputError(
            f"no sample of {name} can be used; most often: {reason}",
            "see the variant's template and `max_length`, the model's context, and the samples",
        )
    if len(made) > 1 and len({tuple(found.input_ids) for found in made}) == 1:
        raise InputError(
            f"all {len(made)} samples of {name} are one and the same text",
            "does the template print `prompt`, `response` and `text`?",
        )
    if source.stage != "finetune" or variant != source.variant:
        return
    if len(made) < len(samples):
        at, why = next((i, found) for i, found in enumerate(tried) if not isinstance(found, Tokens))
        raise InputError(
            f"{len(samples) - len(made)} samples of {name} can't be trained on; `{samples[at].sample_id}`: {why}",
            "take them out of the file, or raise the variant's `max_length`",
        )
    guessed = sum(found.rule == "predicted" for found in made)
    if guessed:
        raise InputError(
            f"{guessed} samples of {name} have no response: the model would be trained on its own predictions",
            'give them a prompt and a response, or a `[[variant]]` of your own with `targets = "text"`',
        )


def _labels(labels: list[str], samples: list[Sample]) -> None:
    if any(sample.response in labels for sample in samples):
        return
    found = Counter(sample.response for sample in samples if sample.response).most_common(3)
    are = ", ".join(f"`{response[:40]}`" for response, _ in found) or "missing"
    raise InputError(
        f"none of {len(samples)} questions has one of the labels as its answer; the answers are {are}",
        "set `labels` of `[evaluate]` to how the answers are written, or leave `[evaluate]` out",
    )


def _truth(recipe: Recipe, column: str, samples: dict[str, list[Sample]]) -> None:
    def values(names: list[str]) -> set[str]:
        found = [sample.meta.get(column) for name in names for sample in samples[name]]
        return {json.dumps(value, sort_keys=True) for value in found if value is not None and value != ""}

    others = [source.name for source in (recipe.tuning, *recipe.pretraining)]
    if values([recipe.queries.name]).isdisjoint(values(others)):
        raise InputError(
            f"no query of `{recipe.queries.name}` has the same value of `{column}` as a sample",
            "`[truth]` names a column that rows of queries and of other sources both have",
        )
