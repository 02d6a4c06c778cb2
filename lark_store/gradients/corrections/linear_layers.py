"""The linear layers of a curvature.

In merged attention projections, the curvature has one block per head on one side of the weight. Biases, norms,
embeddings and the output head are not corrected.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lark_store.errors import InputError
from lark_store.gradients.paths.hooks import choose_parameters
from lark_store.modeling.linear_modules import linear_modules

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lark_store.gradients.paths.hooks import NamedParameters

# Names of attention projections in transformers: to queries, keys and values, and from the heads' outputs. Heads are
# contiguous in both.
_INTO_HEADS = {"q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn", "Wqkv"}
_FROM_HEADS = {"o_proj", "out_proj", "c_proj", "dense"}


@dataclass(frozen=True)
class Linear:
    """A linear layer whose weight (L, R) is corrected.

    `inputs` is the weight's side of the inputs, `rows` or `columns`; `blocks` the number of equal blocks per side.
    """

    name: str
    layer: Any
    inputs: str
    blocks: dict[str, int]


def linears_of(model: Any) -> list[Linear]:
    """Return a model's linear layers, except the output head and weights tied to an embedding."""
    names = {id(p): name for name, p in model.named_parameters()}
    linears = []
    for path, layer, of_conv1d in linear_modules(model):
        inputs, outputs = ("rows", "columns") if of_conv1d else ("columns", "rows")
        n_in, n_out = _heads(model, path, layer.weight.shape, inputs)
        linears.append(Linear(names[id(layer.weight)], layer, inputs, {inputs: n_in, outputs: n_out}))
    return linears


def fitted_linears(model: Any) -> list[Linear]:
    """Return the linear layers to fit factors for; with adapters, only the adapters' layers.

    Raises
    ------
    InputError
        The model has none.
    """
    names = {name for name, _ in linear_weights(model, choose_parameters(model, None, None))}
    return [linear for linear in linears_of(model) if linear.name in names]


def _heads(model: Any, path: str, shape: torch.Size, inputs: str) -> tuple[int, int]:
    """Return the numbers of blocks of a layer's inputs and outputs: one per head in attention projections."""
    above, _, local = path.rpartition(".")
    around = model.get_submodule(above)
    if "attention" not in type(around).__name__.lower():
        return 1, 1
    n_in, n_out = (shape[0], shape[1]) if inputs == "rows" else (shape[1], shape[0])
    size = _head_size(around, model.config)
    if local in _INTO_HEADS and n_out % size == 0:
        return 1, n_out // size
    if local in _FROM_HEADS and n_in % size == 0:
        return n_in // size, 1
    return 1, 1


def _head_size(attention: nn.Module, config: Any) -> int:
    for holder in (attention, config):
        for name in ("head_dim", "head_size"):
            size = getattr(holder, name, None)
            if isinstance(size, int) and size > 0:
                return size
    return int(config.hidden_size // config.num_attention_heads)


def linear_weights(model: Any, parameters: NamedParameters) -> NamedParameters:
    """Keep the weights of linear layers.

    Raises
    ------
    InputError
        No parameter is left.
    """
    names = {linear.name for linear in linears_of(model)}
    weights = [(name, p) for name, p in parameters if name in names]
    if not weights:
        raise InputError(
            f"none of the {len(parameters)} selected parameters is the weight of a linear layer in the model's blocks",
            "`kfac` and `ekfac` only correct such weights; `adam` corrects any parameter",
        )
    return weights
