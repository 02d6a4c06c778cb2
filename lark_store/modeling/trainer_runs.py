"""Folders of transformers' Trainer: the checkpoints of a run, and the facts in `trainer_state.json`."""

from __future__ import annotations

import glob
import math
import re
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lark_store.core.paths import is_file, is_folder
from lark_store.errors import CheckpointError
from lark_store.modeling.checkpoints import read_json

if TYPE_CHECKING:
    from collections.abc import Mapping

STATE = "trainer_state.json"
_CHECKPOINT = re.compile(r"checkpoint-([0-9]+)")
_DIGITS = re.compile(r"([0-9]+)")
_NOT_IN_NAMES = re.compile(r"[^a-z0-9._-]+")
_EVALUATION = "eval_"
# Trainer's timings of an evaluation, after the name of the evaluated set.
_TIMES = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "jit_compilation_time")


@dataclass(frozen=True)
class TrainerFacts:
    """The training so far, from a checkpoint's `trainer_state.json`; unknown values are None."""

    step: int | None = None
    epoch: float | None = None
    learning_rate: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_facts(folder: Path) -> TrainerFacts:
    """Read the facts of a Trainer's checkpoint; all unknown without `trainer_state.json`.

    The learning rate is the newest logged one; a note says if it is of an earlier step.

    Raises
    ------
    CheckpointError
        The file is not JSON.
    """
    if not is_file(folder / STATE):
        return TrainerFacts()
    state = read_json(folder / STATE)
    step, history = state.get("global_step"), state.get("log_history")
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        return TrainerFacts(notes=(f"`{folder / STATE}` has no `global_step`",))
    logged = [entry for entry in history if isinstance(entry, dict)] if isinstance(history, list) else []
    here = {key: value for entry in logged if entry.get("step") == step for key, value in entry.items()}
    rate, rate_step = _learning_rate(logged)
    notes = (
        () if rate is None or rate_step == step else (f"the learning rate, {rate:g}, was logged at step {rate_step}",)
    )
    return TrainerFacts(step, _finite(state.get("epoch")), rate, metrics_of(here), notes)


def _learning_rate(logged: list[dict[str, Any]]) -> tuple[float | None, Any]:
    """Return the newest logged learning rate and its step."""
    for entry in reversed(logged):
        rate = _finite(entry.get("learning_rate"))
        if rate is not None:
            return rate, entry.get("step")
    return None, None


def _finite(value: Any) -> float | None:
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def metrics_of(logged: Mapping[str, Any]) -> dict[str, float]:
    """Return the evaluation metrics and the training loss that Trainer logged; only finite numbers.

    >>> metrics_of({"loss": 1.5, "eval_loss": 2.0, "eval_runtime": 3.0, "epoch": 1.0})
    {'loss': 2.0, 'train_loss': 1.5}
    """
    metrics = {
        key.removeprefix(_EVALUATION): value
        for key, value in logged.items()
        if key.startswith(_EVALUATION) and not key.endswith(_TIMES)
    }
    if "loss" in logged:
        metrics.setdefault("train_loss", logged["loss"])  # an evaluation set may be named `train`
    return {key: float(value) for key, value in metrics.items() if isinstance(value, Real) and math.isfinite(value)}


def is_pattern(path: str) -> bool:
    """Tell whether a path is a glob pattern, such as `run/checkpoint-*`."""
    return glob.has_magic(path) and not is_folder(Path(path))


def checkpoint_folders(name: str, path: str) -> dict[str, Path]:
    """Return the checkpoints of a run folder or glob pattern by name, in order of step; empty for anything else.

    `run/checkpoint-500` is `NAME-500`. Another folder keeps its name: `epoch-2` is `NAME-epoch-2`.

    Raises
    ------
    CheckpointError
        A pattern matches no folder, or two of the same name.
    """
    if is_pattern(path):
        folders = [Path(match) for match in glob.glob(path) if is_folder(Path(match))]  # noqa: PTH207  # any pattern
        if not folders:
            raise CheckpointError(f"no folder matches `{path}`", "check the pattern, and keep it in quotes")
    elif is_folder(Path(path)):
        folders = [child for child in Path(path).iterdir() if _CHECKPOINT.fullmatch(child.name) and is_folder(child)]
    else:
        return {}
    named: dict[str, Path] = {}
    for folder in sorted(folders, key=_natural):
        key = f"{name}-{_suffix(folder)}"
        if key in named:
            raise CheckpointError(
                f"`{named[key]}` and `{folder}` would both be checkpoint `{key}`", "add each run under its own name"
            )
        named[key] = folder
    return named


def step_in_name(folder: Path) -> int | None:
    """Return the step in the name of a Trainer's folder.

    >>> step_in_name(Path("run/checkpoint-500")), step_in_name(Path("run"))
    (500, None)
    """
    step = _CHECKPOINT.fullmatch(folder.name)
    return int(step[1]) if step else None


def _suffix(folder: Path) -> str:
    step = step_in_name(folder)
    return str(step) if step is not None else _NOT_IN_NAMES.sub("-", folder.name.lower()).strip("-._")


def _natural(folder: Path) -> list[tuple[int, str]]:
    """Return a sort key that orders numbers in a path by value."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in _DIGITS.split(str(folder))]
