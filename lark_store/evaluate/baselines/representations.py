"""Similarity of representations of query and sample, in the model or a sentence encoder. No gradients.

Shape letters: Q queries, N samples, B samples of a batch, T tokens, H the model's width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from lark_store.core.device import pick_device
from lark_store.errors import InputError
from lark_store.evaluate.baselines.checks import check_model
from lark_store.modeling.auto_models import text_config
from lark_store.modeling.batching import batches, budget
from lark_store.modeling.loading import meta_model
from lark_store.modeling.losses import Batch
from lark_store.modeling.sentence_encoders import open_encoder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from lark_store.evaluate.baselines.context import BaselineContext, Matrix
    from lark_store.evaluate.dataset import Loaded, Material
    from lark_store.modeling.sentence_encoders import Encoder
    from lark_store.modeling.tokens import Tokens


@dataclass(frozen=True)
class RepsimSettings:
    """The hidden states: after `layer` layers, their mean or the last token's.

    Layer 0 is the embeddings, -1 the last layer, -2 the penultimate. The default is -1, and across two checkpoints -2.
    """

    layer: int | None = None
    tokens: Literal["mean", "last"] = "mean"


def repsim(material: Material, context: BaselineContext) -> Matrix:
    """Score by the cosine of hidden states, (Q, N): RepSim, `repsim[:LAYER][,tokens=last]@CHECKPOINT`.

    Uses only tokens with characters of the sample itself, not those of the template alone. `@CHECKPOINT>QUERIES_AT`
    takes the samples' states at one checkpoint and the queries' at another; by default of the penultimate layer, as in
    the paper on influence over several stages of training.

    Raises
    ------
    InputError
        The model has no such layer.
    """
    settings = context.settings(RepsimSettings)
    of_samples = context.loaded(material)
    of_queries = context.loaded_for_queries(material, of_samples)
    unit_QH = _states(of_queries, of_queries.tokens(material.queries), settings, context)
    with context.preparation.candidates():
        unit_NH = _states(of_samples, of_samples.tokens(material.samples), settings, context)
    return unit_QH @ unit_NH.T


def check_repsim(material: Material, context: BaselineContext) -> None:
    """Check the settings, the checkpoints, the layer, and that two models have states of one width."""
    settings = check_model(material, context, RepsimSettings)
    of_samples = context.loaded(material)
    of_queries = context.loaded_for_queries(material, of_samples)
    configs = [text_config(meta_model(loaded.folder)) for loaded in (of_samples, of_queries)]
    for config in configs:
        last = getattr(config, "num_hidden_layers", None)
        if last is not None:
            _layer(settings, last, context)
    widths = [config.hidden_size for config in configs]
    if len(set(widths)) > 1:
        raise InputError(
            f"`{context.spec}`: the models' states have {widths[0]} and {widths[1]} dimensions",
            "compare two checkpoints of one model",
        )


def _layer(settings: RepsimSettings, last: int, context: BaselineContext) -> int:
    """Return the number of the layer, from 0 to `last`.

    Raises
    ------
    InputError
        There is no such layer.
    """
    default = -1 if context.queries_at is None else -2
    layer = default if settings.layer is None else settings.layer
    if not -last - 1 <= layer <= last:
        raise InputError(
            f"`{context.spec}`: the model has no layer {layer}",
            f"choose a layer from 0 to {last}, or from the end: -1 is the last",
        )
    return layer % (last + 1)


def encoder(material: Material, context: BaselineContext) -> Matrix:
    """Score by the cosine of a sentence encoder's embeddings, (Q, N): `encoder:FOLDER_OR_HUB`; no checkpoint.

    Raises
    ------
    InputError
        There is no encoder in the name.
    CheckpointError
        The encoder can't be used.
    """
    opened = encoder_of(context)
    embeddings = []
    for texts in _text_lists(material):
        vectors: dict[int, NDArray[np.float32]] = {}
        for numbers, unit_BD in opened.encode([text.whole for text in texts]):
            vectors.update(zip(numbers, unit_BD, strict=True))
            context.say("embedding", len(vectors), len(texts))
        embeddings.append(np.stack([vectors[i] for i in range(len(texts))]))
    return embeddings[0] @ embeddings[1].T


def check_encoder(_: Material, context: BaselineContext) -> None:
    """Check that the encoder can be opened."""
    encoder_of(context)


def encoder_of(context: BaselineContext) -> Encoder:
    """Find the encoder's files without loading weights.

    Raises
    ------
    InputError, CheckpointError
    """
    if not context.argument:
        raise InputError("`encoder` needs a sentence encoder", "use `encoder:FOLDER` or `encoder:HUB/NAME`")
    return open_encoder(context.argument, pick_device(context.device))


def _text_lists(material: Material) -> tuple[Any, Any]:
    return material.queries, material.samples


@torch.no_grad()
def _states(
    loaded: Loaded, samples: Sequence[Tokens], settings: RepsimSettings, context: BaselineContext
) -> NDArray[np.float32]:
    """Return each sample's hidden state with norm 1, (N, H)."""
    model, size = loaded.model, budget(None, loaded.device.type, None)
    states: dict[int, NDArray[np.float32]] = {}
    for batch_rows in batches(list(enumerate(samples)), lambda one: len(one[1].input_ids), lambda: size):
        batch = Batch([sample for _, sample in batch_rows], loaded.device)
        layers = model(**batch.inputs(model), use_cache=False, output_hidden_states=True).hidden_states
        layer = _layer(settings, len(layers) - 1, context)
        for (i, _), state_TH, content_T in zip(batch_rows, layers[layer].float(), batch.content, strict=True):
            content_TH = state_TH[content_T]
            mean_H = content_TH.mean(dim=0) if settings.tokens == "mean" else content_TH[-1]
            states[i] = torch.nn.functional.normalize(mean_H, dim=0).cpu().numpy()
        context.say("hidden states", len(states), len(samples))
    return np.stack([states[i] for i in range(len(samples))])
