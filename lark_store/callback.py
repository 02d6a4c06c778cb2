"""A callback for transformers' Trainer: every checkpoint that it saves is added to a store."""

from __future__ import annotations

import logging
import math
import os
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from transformers import TrainerCallback

from lark_store.errors import LarkStoreError, NameInvalidError
from lark_store.ingest.checkpoints import has_tokenizer
from lark_store.schema.names import check_name
from lark_store.store import Store

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from transformers import TrainerControl, TrainerState, TrainingArguments

_LOG = logging.getLogger(__name__)
_EVALUATION = "eval_"
# What Trainer reports of an evaluation besides its metrics, after the name of the set that was evaluated.
_TIMES = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "jit_compilation_time")


class LarkStoreCallback(TrainerCallback):  # type: ignore[misc]
    """Adds each checkpoint that Trainer saves to a store, as `step-500`, with its epoch, learning rate and metrics.

    With `by="epoch"` the names are `epoch-2` and the like, for trainings that save once per epoch.

    Metrics are those of the evaluation at the same step, before or after the save (`eval_accuracy` as `accuracy`), and
    the training loss logged at it (`train_loss`). Hashing the files takes about a second per GB, in the main process.
    A fault of the store is logged as a warning; it never ends the training.

    >>> callback = LarkStoreCallback("lark.store", prefix="medical-")  # doctest: +SKIP
    >>> trainer = Trainer(model, args, callbacks=[callback], ...)  # doctest: +SKIP

    Parameters
    ----------
    store
        The store, a folder or `postgresql://…` (default: `LARK_STORE` or `./lark.store`); it is there before the
        training starts.
    prefix
        What the checkpoints' names begin with, to tell this training from others in the store.
    model
        The model's name in the store (default: the type that its config names).
    by
        What checkpoints are named by: `step` or `epoch`.

    Raises
    ------
    NotAStoreError, OlderSchemaError, NewerSchemaError, NameInvalidError
    """

    def __init__(
        self,
        store: str | Path | None = None,
        *,
        prefix: str = "",
        model: str | None = None,
        by: Literal["step", "epoch"] = "step",
    ) -> None:
        super().__init__()
        try:
            check_name(f"{prefix}step-{(1 << 31) - 1}")
        except NameInvalidError as error:
            raise NameInvalidError(
                f"`{prefix}` can't begin a checkpoint's name: lower-case letters, digits, `.`, `_` and `-` only, "
                "a letter or digit first, at most 85",
                "for example `medical-`",
            ) from error
        self._prefix, self._model, self._by = prefix, model, by
        self._store = store
        if os.environ.get("RANK", "0") == "0":  # the other processes, maybe on other machines, never use the store
            with Store.open(store) as opened:
                self._store = store if opened.place.startswith("postgresql:") else opened.path.absolute()
        self._learning_rate: Any = None
        self._added: dict[int, str] = {}
        self._best: int | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start anew; warn if checkpoints will be deleted before they can be ingested."""
        del control, kwargs
        self._learning_rate, self._best = None, None
        self._added.clear()
        if args.save_total_limit and state.is_world_process_zero:
            _LOG.warning(
                "lark-store: with `save_total_limit=%s` Trainer deletes older checkpoints; "
                "those can't be ingested later, though they stay in the store",
                args.save_total_limit,
            )

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the learning rate of this step, before the scheduler sets the next one."""
        del args, state, control
        groups = getattr(kwargs.get("optimizer"), "param_groups", None)
        self._learning_rate = groups[0].get("lr") if groups else None

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the checkpoint that was saved."""
        del control
        if not state.is_world_process_zero:
            return
        step = state.global_step
        folder = _folder(args, step)
        name = self._added.get(step) or self._name(state)
        with self._guarded(name):
            processor = kwargs.get("processing_class")
            if folder.is_dir() and processor is not None and not has_tokenizer(folder):
                processor.save_pretrained(folder)
            logged = {k: v for entry in state.log_history if entry.get("step") == step for k, v in entry.items()}
            metrics = _metrics(logged)
            if step in self._added:  # saved again at this step: epoch and learning rate are known
                self._write(name, folder, metrics=metrics)
            else:
                rate = self._rate(state)
                self._write(name, folder, metrics=metrics, epoch=state.epoch, step=step, learning_rate=rate)
                self._added[step] = name

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Set the metrics of a checkpoint that was saved before it was evaluated."""
        del control
        step = state.global_step if self._best is None else self._best
        if state.is_world_process_zero and step in self._added:
            with self._guarded(self._added[step]):
                self._write(self._added[step], _folder(args, step), metrics=_metrics(kwargs.get("metrics") or {}))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note which checkpoint's weights the model has from now on."""
        del control, kwargs
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._best = state.best_global_step

    def _name(self, state: TrainerState) -> str:
        at = state.global_step if self._by == "step" else f"{round(state.epoch or 0, 2):g}"
        return f"{self._prefix}{self._by}-{at}"

    def _write(self, name: str, folder: Path, **known: Any) -> None:
        with Store.open(self._store) as store:
            store.checkpoint_add(name, folder, model=self._model, **known)

    def _rate(self, state: TrainerState) -> float | None:
        """Return the learning rate of the last step; without it the newest that was logged."""
        if self._learning_rate is not None:
            return float(self._learning_rate)
        return next((e["learning_rate"] for e in reversed(state.log_history) if "learning_rate" in e), None)

    @contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        """Make a warning of any fault: no training ends for its store."""
        try:
            yield
        except LarkStoreError as error:
            self._warn(name, error.fact, error.hint)
        except Exception as error:  # noqa: BLE001  # such as a full disk or a locked catalog
            self._warn(name, f"{type(error).__name__}: {error}", "add it later with `lark-store checkpoint add`")

    def _warn(self, name: str, fact: str, hint: str | None) -> None:
        tail = f"\nhint: {hint}" if hint else ""
        _LOG.warning("lark-store: checkpoint `%s` was not written to the store: %s%s", name, fact, tail)


def _folder(args: TrainingArguments, step: int) -> Path:
    return Path(args.output_dir).absolute() / f"checkpoint-{step}"


def _metrics(logged: Mapping[str, Any]) -> dict[str, float]:
    """Return the evaluation's metrics and the training loss; figures alone, as a store takes no others."""
    chosen = {
        key.removeprefix(_EVALUATION): value
        for key, value in logged.items()
        if key.startswith(_EVALUATION) and not key.endswith(_TIMES)
    }
    if "loss" in logged:
        chosen.setdefault("train_loss", logged["loss"])  # unless there is a set for evaluation named `train`
    return {key: float(value) for key, value in chosen.items() if isinstance(value, Real) and math.isfinite(value)}
