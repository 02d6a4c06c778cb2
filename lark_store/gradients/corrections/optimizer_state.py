"""Second moments from a saved optimizer: the `optimizer.pt` of the transformers Trainer.

The file is read with torch's `weights_only`, which runs no code and refuses other pickles. It numbers the parameters
and may name them. Without names, the Trainer's order applies: parameters with weight decay in the model's order, then
those without. Sharded optimizers (FSDP, DeepSpeed) are not supported.
"""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import torch

from lark_store.core.hashing import file_hash
from lark_store.core.paths import is_file, is_folder
from lark_store.errors import CheckpointError, InputError
from lark_store.gradients.corrections.second_moments import Moments
from lark_store.modeling.loading import trained_parameters

if TYPE_CHECKING:
    from pathlib import Path

_NAME = "optimizer.pt"
_SECOND = "exp_avg_sq"
_CHECK_OPTIMIZER = "check that it belongs to this checkpoint and that all parameters were trained"
_USE_ADAM = "use an optimizer saved by Adam or AdamW"


def read_optimizer(path: Path) -> tuple[dict[str, Any], str]:
    """Read an optimizer's `state_dict`; return it with the hash of its file.

    Raises
    ------
    InputError
        The file is missing, holds no optimizer, or holds more than tensors and plain values.
    """
    file = path / _NAME if is_folder(path) else path
    if not is_file(file):
        raise InputError(f"there is no file `{file}`", f"the Trainer saves `{_NAME}` unless `save_only_model` is set")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        fact = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(
            f"`{file}` can't be read without running code from it: {fact}",
            "save the optimizer's `state_dict()` with `torch.save`; other pickles are never read",
        ) from error
    if not (isinstance(state, dict) and isinstance(state.get("state"), dict) and state.get("param_groups")):
        raise InputError(f"`{file}` holds no optimizer state", "an optimizer state has `state` and `param_groups`")
    return state, file_hash(file)


def moments_of(state: dict[str, Any], model: torch.nn.Module) -> dict[str, Moments]:
    """Extract a model's second moments by parameter name.

    Raises
    ------
    CheckpointError
        The optimizer belongs to another model or has no second moments.
    """
    try:
        return _moments_of(state, model)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(
            f"the optimizer's state is not of Adam: {type(error).__name__} {error}", _USE_ADAM
        ) from error


def _moments_of(state: dict[str, Any], model: torch.nn.Module) -> dict[str, Moments]:
    names, shapes = _ordered(state, model), dict(model.named_parameters())
    moments = {}
    for group in state["param_groups"]:
        for number in group["params"]:
            name, parameter = names[number], state["state"].get(number, {})
            second = parameter.get(_SECOND)
            steps = int(parameter.get("step", group.get("step", 0)))
            if not isinstance(second, torch.Tensor) or steps < 1:
                raise CheckpointError(
                    f"the optimizer has no second moments of `{name}`", "use Adam or AdamW, saved after a step"
                )
            if second.shape != shapes[name].shape:
                raise CheckpointError(
                    f"the optimizer's state for `{name}` has the shape {tuple(second.shape)}, "
                    f"not {tuple(shapes[name].shape)}",
                    "check that it belongs to this checkpoint",
                )
            beta = float(group["betas"][1])
            if not 0 <= beta < 1 or bool((second < 0).any()):
                raise CheckpointError(
                    f"the optimizer's state for `{name}` is not of Adam: β2 is {beta}, or a number is below 0",
                    _USE_ADAM,
                )
            moments[name] = Moments.of(second.float() / (1 - beta**steps))  # bias correction
    return moments


def _ordered(state: dict[str, Any], model: torch.nn.Module) -> dict[int, str]:
    """Map an optimizer's parameter numbers to names, for one group or the Trainer's two."""
    trained = trained_parameters(model)
    everything = [name for name, _ in model.named_parameters() if trained is None or name in trained]
    groups: list[list[int]] = [group["params"] for group in state["param_groups"]]
    stored_names = [group.get("param_names") for group in state["param_groups"]]
    if all(stored_names):
        return _stored_names(groups, stored_names, everything)
    names = [everything] if len(groups) == 1 else _decayed(model, everything)
    if [len(group) for group in groups] != [len(group) for group in names]:
        sizes = " + ".join(str(len(group)) for group in groups)
        expected = " + ".join(str(len(group)) for group in names)
        raise CheckpointError(
            f"the optimizer has {sizes} parameters, but the Trainer trains {expected} of this checkpoint",
            _CHECK_OPTIMIZER,
        )
    return _numbered(groups, names)


def _numbered(groups: list[list[int]], names: list[list[str]]) -> dict[int, str]:
    pairs = zip(groups, names, strict=True)
    return {n: name for group, group_names in pairs for n, name in zip(group, group_names, strict=True)}


def _stored_names(groups: list[list[int]], group_names: list[list[str]], expected: list[str]) -> dict[int, str]:
    """Map parameter numbers to the file's own names, checked against the model."""
    names = _numbered(groups, group_names)
    different = sorted(set(names.values()) ^ set(expected))
    if different or len(names) != len(expected):
        raise CheckpointError(
            f"the optimizer has {len(names)} parameters, and the checkpoint trains {len(expected)}; "
            f"they differ in `{different[0] if different else expected[0]}`",
            _CHECK_OPTIMIZER,
        )
    return names


def _decayed(model: torch.nn.Module, names: list[str]) -> list[list[str]]:
    """Split names like the Trainer: with weight decay, and without (norms and biases)."""
    from transformers import Trainer

    decay = set(Trainer.get_decay_parameter_names(None, model))  # needs no instance
    return [[name for name in names if name in decay], [name for name in names if name not in decay]]
