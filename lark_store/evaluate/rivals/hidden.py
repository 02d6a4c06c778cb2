"""Representations: how alike a query and a sample look to the model, or to a sentence encoder. Nothing of gradients.

Shape letters: Q queries, N samples, B samples of a batch, T tokens, H the model's width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from lark_store.errors import InputError
from lark_store.ingest.batches import batches, budget
from lark_store.ingest.encoders import open_encoder
from lark_store.ingest.gradients import pick_device
from lark_store.ingest.losses import Batch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from lark_store.evaluate.material import Loaded, Material
    from lark_store.evaluate.rivals.given import Given, Matrix
    from lark_store.ingest.variants import Tokens


@dataclass(frozen=True)
class Reading:
    """Which hidden states: after `layer` layers (0: the embeddings; None: the last), their mean or the last token's."""

    layer: int | None = None
    tokens: Literal["mean", "last"] = "mean"


def repsim(material: Material, given: Given) -> Matrix:
    """Score by the cosine of hidden states, (Q, N): RepSim, `repsim[:LAYER][,tokens=last]@CHECKPOINT`.

    Taken are the tokens that carry a sample's own characters, not the template's alone.

    Raises
    ------
    InputError
        The model has no such layer.
    """
    how = given.settings(Reading)
    loaded = given.loaded(material)
    unit_QH, unit_NH = (_states(loaded, loaded.tokens(texts), how, given) for texts in _both(material))
    return unit_QH @ unit_NH.T


def encoder(material: Material, given: Given) -> Matrix:
    """Score by the cosine of a sentence encoder's embeddings, (Q, N): `encoder:FOLDER_OR_HUB`; no checkpoint.

    Raises
    ------
    InputError
        No encoder is named.
    CheckpointError
        It can't be used.
    """
    if not given.argument:
        raise InputError("`encoder` needs the files of one", "say `encoder:FOLDER` or `encoder:HUB/NAME`")
    opened = open_encoder(given.argument, pick_device(given.device))
    made = []
    for texts in _both(material):
        found: dict[int, NDArray[np.float32]] = {}
        for numbers, unit_BD in opened.encode([text.whole for text in texts]):
            found.update(zip(numbers, unit_BD, strict=True))
            given.say("embedding", len(found), len(texts))
        made.append(np.stack([found[i] for i in range(len(texts))]))
    return made[0] @ made[1].T


def _both(material: Material) -> tuple[Any, Any]:
    return material.queries, material.samples


@torch.no_grad()
def _states(loaded: Loaded, samples: Sequence[Tokens], how: Reading, given: Given) -> NDArray[np.float32]:
    """Return each sample's hidden state, scaled to norm 1, (N, H)."""
    model, size = loaded.model, budget(None, loaded.device.type, None)
    found: dict[int, NDArray[np.float32]] = {}
    for some in batches(list(enumerate(samples)), lambda one: len(one[1].input_ids), lambda: size):
        batch = Batch([sample for _, sample in some], loaded.device)
        layers = model(**batch.inputs(model), use_cache=False, output_hidden_states=True).hidden_states
        last = len(layers) - 1
        layer = last if how.layer is None else how.layer
        if not 0 <= layer <= last:
            raise InputError(f"`{given.spec}`: the model has no layer {layer}", f"its layers are 0 to {last}")
        for (i, _), state_TH, content_T in zip(some, layers[layer].float(), batch.content, strict=True):
            kept_TH = state_TH[content_T]
            made_H = kept_TH.mean(dim=0) if how.tokens == "mean" else kept_TH[-1]
            found[i] = torch.nn.functional.normalize(made_H, dim=0).cpu().numpy()
        given.say("hidden states", len(found), len(samples))
    return np.stack([found[i] for i in range(len(samples))])
