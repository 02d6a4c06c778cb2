"""The linear layers in a model's blocks: those of MLPs and attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_EXPERTS = ".experts."  # in the files' names of the weights of experts, stacked or not


def linear_modules(model: Any) -> Iterator[tuple[str, Any, bool]]:
    """Yield each linear layer's path, the layer, and whether its weight is transposed (GPT-2's `Conv1D`).

    Without the output head and layers with a weight tied to an embedding.
    """
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for path, layer in model.named_modules():
        is_conv1d = type(layer).forward is Conv1D.forward
        if not (is_conv1d or type(layer).forward is nn.Linear.forward):
            continue
        if layer is not model.get_output_embeddings() and id(layer.weight) not in embedded:
            yield path, layer, is_conv1d


def linear_tensors(model: Any, tensors: Iterable[str]) -> set[str] | None:
    """Return which tensors of a checkpoint's files are weights of its model's linear layers, experts included.

    None where the files name such weights in another way than the model.
    """
    names = {f"{path}.weight" for path, _, _ in linear_modules(model)}
    weights = [name for name in tensors if name.endswith("weight") or (_EXPERTS in name and "bias" not in name)]
    own = {name for name in weights if {name, f"{model.base_model_prefix}.{name}"} & names}
    return own | {name for name in weights if _EXPERTS in name} if len(own) == len(names) else None
