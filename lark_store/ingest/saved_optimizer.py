"""Check that a saved optimizer belongs to a checkpoint, by its steps and by the weights beside it.

An optimizer's step is the largest of its parameters: temporarily frozen ones made fewer. With gradient accumulation,
optimizer steps count, as in the Trainer's `global_step`. A `trainer_state.json` beside the optimizer gives its
`global_step`; the optimizer may have made fewer steps, since mixed precision skips some.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lark_store.core.paths import is_file, is_folder
from lark_store.errors import CheckpointError
from lark_store.modeling.checkpoints import examine, read_json

if TYPE_CHECKING:
    from pathlib import Path

    from lark_store.schema.catalog import Checkpoint

_STATE = "trainer_state.json"
_WEIGHTS = ("config.json", "adapter_config.json")


def steps_of(state: dict[str, Any]) -> int:
    """Return the number of steps of an optimizer, the maximum over its parameters.

    Raises
    ------
    CheckpointError
        The state has no step count, or no step was made.
    """
    steps = [
        int(parameter.get("step", group.get("step", -1)))
        for group in state["param_groups"]
        for parameter in (state["state"].get(number, {}) for number in group["params"])
    ]
    most = max(steps, default=-1)
    if most < 0:
        raise CheckpointError("the optimizer's state has no `step`", "use an optimizer saved by Adam or AdamW")
    if most == 0:
        raise CheckpointError("the optimizer has made no step", "use one saved after a step")
    return most


def check_same(checkpoint: Checkpoint, folder: Path, path: Path, steps: int) -> tuple[str, ...]:
    """Check that an optimizer belongs to a checkpoint with files in `folder`; return notes on skipped checks.

    Raises
    ------
    CheckpointError
        The optimizer was saved at another step or with other weights.
    """
    optimizer_folder = path if is_folder(path) else path.parent
    trainer = _global_step(optimizer_folder)
    recorded = checkpoint.step if checkpoint.step is not None else _global_step(folder)
    step = steps if trainer is None else trainer
    _check_step(checkpoint, recorded, step, path)
    if steps > step:
        raise CheckpointError(
            f"the optimizer in `{path}` has made {steps} steps, but the {_STATE} beside it is of step {step}",
            "give the folder of the checkpoint that the optimizer was saved with",
        )
    is_beside = _check_weights(checkpoint, optimizer_folder)
    notes = []
    if recorded is None and not is_beside:
        notes.append(f"checkpoint `{checkpoint.name}` has no known step to compare with the optimizer's, {steps}")
    if steps < step:
        notes.append(f"the optimizer has made {steps} steps by step {step}: it skipped some or started later")
    return tuple(notes)


def _check_step(checkpoint: Checkpoint, recorded: int | None, step: int, path: Path) -> None:
    if recorded in (None, step):
        return
    origin = "the store" if checkpoint.step is not None else f"the {_STATE} in its folder"
    raise CheckpointError(
        f"the optimizer in `{path}` is of step {step}, but checkpoint `{checkpoint.name}` is of step {recorded} "
        f"according to {origin}",
        f"give the optimizer saved at step {recorded}; if the checkpoint's step is wrong, add it under another name "
        f"with `lark-store checkpoint add NAME {checkpoint.path} --step {step}`",
    )


def _check_weights(checkpoint: Checkpoint, optimizer_folder: Path) -> bool:
    """Compare any weights beside the optimizer with the checkpoint's; return whether there were any."""
    if not checkpoint.parts and not any(is_file(optimizer_folder / name) for name in _WEIGHTS):
        return False
    try:
        weights = examine(str(optimizer_folder), None, checkpoint.parts).weights_sha256
    except CheckpointError:  # no complete model to compare
        return False
    if weights != checkpoint.weights_sha256:
        raise CheckpointError(
            f"the weights beside the optimizer in `{optimizer_folder}` are not those of checkpoint `{checkpoint.name}`",
            "give the optimizer saved with the checkpoint; if the weights were only saved again, copy `optimizer.pt` "
            "with its `trainer_state.json` to a separate folder and give that",
        )
    return True


def _global_step(folder: Path) -> int | None:
    """Return the Trainer's step in a checkpoint's folder, or None."""
    if not is_file(folder / _STATE):
        return None
    step = read_json(folder / _STATE).get("global_step")
    return step if isinstance(step, int) and not isinstance(step, bool) else None
