"""Preflight checks: fail before training starts."""

from __future__ import annotations

import json
import os
from collections import Counter
from typing import TYPE_CHECKING

from lark_store.errors import CheckpointError, InputError
from lark_store.gradients.paths.hooks import choose_parameters
from lark_store.gradients.sketch.layout import make_sketcher
from lark_store.modeling.checkpoints import examine
from lark_store.modeling.loading import context_length, load_tokenizer, meta_model
from lark_store.modeling.predicted_answers import AnswerPrompt
from lark_store.modeling.tokens import Tokens
from lark_store.specs import PREDICTED_ANSWER
from lark_store.study import pools
from lark_store.study.finetune import check_options
from lark_store.study.recipe import EVALUATION
from lark_store.study.render import renderer_of

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

    from lark_store.modeling.sample import Sample
    from lark_store.study.recipe import Recipe, Source


def check(recipe: Recipe, paths: dict[str, Path]) -> None:
    """Check model, sketcher, training options, each source's formats, the labels and the truth column.

    `paths` are the pools. Loads no weights and writes nothing.

    Raises
    ------
    InputError, CheckpointError
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise InputError("a study trains in one process", "run it without `torchrun`")
    sketch = recipe.sketch
    make_sketcher("study", **sketch.sketcher)
    folder = examine(recipe.place(recipe.model.path), recipe.model.revision).folder
    model = meta_model(folder)
    _check_weights(folder)
    choose_parameters(model, sketch.parameters, sketch.exclude, sketch.min_ndim)
    check_options(recipe)
    tokenizer, context = load_tokenizer(folder), context_length(model)
    samples = {name: pools.read(path) for name, path in paths.items()}
    for source in recipe.source:
        for variant in source.variants:
            _check_format(recipe, source, variant, samples[source.name], tokenizer, context)
    if recipe.evaluate:
        _check_labels(recipe.evaluate.labels, samples[EVALUATION])
    if recipe.truth:
        _check_truth(recipe, recipe.truth.column, samples)


def _check_weights(folder: Path) -> None:
    """Refuse truncated weights before their hash identifies the base model."""
    from safetensors import SafetensorError, safe_open

    for path in folder.glob("*.safetensors"):
        try:
            with safe_open(path, "pt"):
                pass
        except SafetensorError as error:
            raise CheckpointError(f"`{path}` can't be read: {error}", "download the file again") from error


def _check_format(
    recipe: Recipe, source: Source, variant: str, samples: list[Sample], tokenizer: Any, context: int | None
) -> None:
    """Refuse a variant which renders no sample, drops the texts, or leaves nothing to learn."""
    renderer = renderer_of(recipe, variant, tokenizer, context)
    attempts = [renderer.attempt(sample, AnswerPrompt.stand_in) for sample in samples]
    rendered = [tokens for tokens in attempts if isinstance(tokens, Tokens)]
    name = f"`{source.name}` as `{variant}`"
    if not rendered:
        ((reason, _),) = Counter(str(tokens) for tokens in attempts).most_common(1)
        raise InputError(
            f"no sample of {name} can be used; most often: {reason}",
            "check the variant's template and `max_length`, the model's context length, and the samples",
        )
    if len(rendered) > 1 and len({tuple(tokens.input_ids) for tokens in rendered}) == 1:
        raise InputError(
            f"all {len(rendered)} samples of {name} have the same text",
            "check that the template prints `prompt`, `response` and `text`",
        )
    if source.stage != "finetune" or variant != source.variant:
        return
    if len(rendered) < len(samples):
        first, fault = next((s, t) for s, t in zip(samples, attempts, strict=True) if not isinstance(t, Tokens))
        raise InputError(
            f"{len(samples) - len(rendered)} samples of {name} can't be trained on; `{first.sample_id}`: {fault}",
            "remove them from the file, or raise the variant's `max_length`",
        )
    guessed = sum(tokens.rule in {"predicted", PREDICTED_ANSWER} for tokens in rendered)
    if guessed:
        raise InputError(
            f"{guessed} samples of {name} have no response: the model would be trained on its own predictions",
            'give them a prompt and a response, or define a `[[variant]]` with `targets = "text"`',
        )


def _check_labels(labels: list[str], samples: list[Sample]) -> None:
    if any(sample.answer.strip() in labels for sample in samples):
        return
    answers = Counter(sample.answer for sample in samples if sample.answer).most_common(3)
    are = ", ".join(f"`{response[:40]}`" for response, _ in answers) or "missing"
    raise InputError(
        f"no answer of the {len(samples)} questions is a label; the answers are {are}",
        "set `labels` of `[evaluate]` to the answers as written, or omit `[evaluate]`",
    )


def _check_truth(recipe: Recipe, column: str, samples: dict[str, list[Sample]]) -> None:
    def values(names: list[str]) -> set[str]:
        column_values = [sample.meta.get(column) for name in names for sample in samples[name]]
        return {json.dumps(value, sort_keys=True) for value in column_values if value is not None and value != ""}

    sources = [source.name for source in (recipe.tuning, *recipe.pretraining)]
    if values([recipe.queries.name]).isdisjoint(values(sources)):
        raise InputError(
            f"no query of `{recipe.queries.name}` has the same value of `{column}` as a sample",
            "set `column` of `[truth]` to a column of both",
        )
