"""A saved optimizer's second moments, by parameter: the `optimizer.pt` that transformers' Trainer writes.

It is read with torch's `weights_only`, which runs no code; anything else that a pickle may hold is refused. The file
numbers parameters; their names follow from the order in which the Trainer hands them over: those with weight decay in
the model's order, then those without. Sharded optimizers (FSDP, DeepSpeed) are not read.
"""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import torch

from lark_store.errors import CheckpointError, InputError
from lark_store.ingest.corrections import Moments
from lark_store.ingest.models import trained_parameters
from lark_store.schema.hashes import file_hash
from lark_store.schema.paths import is_file, is_folder

if TYPE_CHECKING:
    from pathlib import Path

_NAME = "optimizer.pt"
_SECOND = "exp_avg_sq"


def read_optimizer(path: Path) -> tuple[dict[str, Any], str]:
    """Return an optimizer's state, as its `state_dict` has it, and the hash of its file.

    Raises
    ------
    InputError
        There is no such file, or it holds more than tensors and plain values, or no optimizer.
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
            "save the optimizer's `state_dict()` with `torch.save`; other pickles are not read",
        ) from error
    if not (isinstance(state, dict) and isinstance(state.get("state"), dict) and state.get("param_groups")):
        raise InputError(f"`{file}` holds no optimizer's state", "it has `state` and `param_groups`")
    return state, file_hash(file)


def moments_of(state: dict[str, Any], model: torch.nn.Module) -> tuple[dict[str, Moments], int]:
    """Return the second moments of a model's parameters by name, and the optimizer's steps.

    Raises
    ------
    CheckpointError
        The optimizer is another model's, or keeps no second moments.
    """
    try:
        return _moments_of(state, model)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(
            f"the optimizer's state is not one of Adam's: {type(error).__name__} {error}", "Adam and AdamW are read"
        ) from error


def _moments_of(state: dict[str, Any], model: torch.nn.Module) -> tuple[dict[str, Moments], int]:
    names, shapes = _ordered(state, model), dict(model.named_parameters())
    moments, steps = {}, 0
    for group in state["param_groups"]:
        for number in group["params"]:
            name, held = names[number], state["state"].get(number, {})
            second = held.get(_SECOND)
            if not isinstance(second, torch.Tensor):
                raise CheckpointError(
                    f"the optimizer keeps no second moments of `{name}`", "Adam and AdamW do, once they made a step"
                )
            if second.shape != shapes[name].shape:
                raise CheckpointError(
                    f"the optimizer's state for `{name}` has the shape {tuple(second.shape)}, "
                    f"not {tuple(shapes[name].shape)}",
                    "does it belong to this checkpoint?",
                )
            steps = int(held["step"])
            started = 1 - float(group["betas"][1]) ** steps  # it starts from zero: Adam corrects for that too
            moments[name] = Moments.of(second.float() / started)
    return moments, steps


def _ordered(state: dict[str, Any], model: torch.nn.Module) -> dict[int, str]:
    """Return the names of an optimizer's numbered parameters: in the Trainer's two groups, or in one."""
    trained = trained_parameters(model)
    everything = [name for name, _ in model.named_parameters() if trained is None or name in trained]
    groups: list[list[int]] = [group["params"] for group in state["param_groups"]]
    names = [everything] if len(groups) == 1 else _decayed(model, everything)
    if [len(group) for group in groups] != [len(group) for group in names]:
        sizes = " + ".join(str(len(group)) for group in groups)
        expected = " + ".join(str(len(group)) for group in names)
        raise CheckpointError(
            f"the optimizer has {sizes} parameters, not {expected} as the Trainer gives it for this checkpoint",
            "does it belong to this checkpoint? were all parameters trained?",
        )
    return {n: name for group, some in zip(groups, names, strict=True) for n, name in zip(group, some, strict=True)}


def _decayed(model: torch.nn.Module, names: list[str]) -> list[list[str]]:
    """Split names as the Trainer does: with weight decay, and without (norms and biases)."""
    from transformers import Trainer

    decay = set(Trainer.get_decay_parameter_names(None, model))  # it asks the model alone
    return [[name for name in names if name in decay], [name for name in names if name not in decay]]
