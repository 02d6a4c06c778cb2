"""A callback for transformers' Trainer that adds every saved checkpoint to a store."""

from __future__ import annotations

import logging
import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from transformers import TrainerCallback

from lark_store.core.names import check_name
from lark_store.errors import LarkStoreError, NameInvalidError
from lark_store.modeling.checkpoints import has_tokenizer
from lark_store.modeling.trainer_runs import metrics_of
from lark_store.store import Store

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import TrainerControl, TrainerState, TrainingArguments

_LOG = logging.getLogger(__name__)


class LarkStoreCallback(TrainerCallback):  # type: ignore[misc]
    """Adds each checkpoint saved by Trainer to a store, as `step-500`, with its epoch, learning rate and metrics.

    With `by="epoch"`, names look like `epoch-2`; use it if the training saves once per epoch.

    Metrics come from the evaluation at the same step, before or after the save (`eval_accuracy` as `accuracy`), and
    from the training loss logged there (`train_loss`). The main process hashes the files, at about one second per GB.
    Errors of the store are logged as warnings and never stop the training.

    >>> callback = LarkStoreCallback("lark.store", prefix="medical-")  # doctest: +SKIP
    >>> trainer = Trainer(model, args, callbacks=[callback], ...)  # doctest: +SKIP

    Parameters
    ----------
    store
        The store, a folder or `postgresql://…` (default: `LARK_STORE` or `./lark.store`). It must exist before the
        training starts.
    prefix
        Prefix of the checkpoints' names, to distinguish this training run from others.
    model
        The model's name in the store (default: the model type of its config).
    by
        Name checkpoints by `step` or `epoch`.

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
                f"`{prefix}` can't start a checkpoint name: lower-case letters, digits, `.`, `_` and `-` only, "
                "a letter or digit first, at most 85",
                "for example `medical-`",
            ) from error
        self._prefix, self._model, self._by = prefix, model, by
        self._store = store
        if os.environ.get("RANK", "0") == "0":  # other processes never use the store
            with Store.open(store) as opened:
                self._store = store if opened.place.startswith("postgresql:") else opened.path.absolute()
        self._learning_rate: Any = None
        self._added: dict[int, str] = {}
        self._best: int | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Reset the state; warn if checkpoints will be deleted before they can be ingested."""
        del control, kwargs
        self._learning_rate, self._best = None, None
        self._added.clear()
        if args.save_total_limit and state.is_world_process_zero:
            _LOG.warning(
                "lark-store: with `save_total_limit=%s` Trainer deletes older checkpoints; "
                "they stay in the store but can't be ingested later",
                args.save_total_limit,
            )

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Record the learning rate of this step before the scheduler changes it."""
        del args, state, control
        groups = getattr(kwargs.get("optimizer"), "param_groups", None)
        self._learning_rate = groups[0].get("lr") if groups else None

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the saved checkpoint."""
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
            metrics = metrics_of(logged)
            if step in self._added:  # saved again: epoch and learning rate are recorded
                self._write(name, folder, metrics=metrics)
            else:
                rate = self._rate(state)
                self._write(name, folder, metrics=metrics, epoch=state.epoch, step=step, learning_rate=rate)
                self._added[step] = name

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Set the metrics of a checkpoint saved before its evaluation."""
        del control
        step = state.global_step if self._best is None else self._best
        if state.is_world_process_zero and step in self._added:
            with self._guarded(self._added[step]):
                self._write(self._added[step], _folder(args, step), metrics=metrics_of(kwargs.get("metrics") or {}))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Record the best checkpoint, whose weights the model has from now on."""
        del control, kwargs
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._best = state.best_global_step

    def _name(self, state: TrainerState) -> str:
        number = state.global_step if self._by == "step" else f"{round(state.epoch or 0, 2):g}"
        return f"{self._prefix}{self._by}-{number}"

    def _write(self, name: str, folder: Path, **facts: Any) -> None:
        with Store.open(self._store) as store:
            store.checkpoint_add(name, folder, model=self._model, **facts)

    def _rate(self, state: TrainerState) -> float | None:
        """Return the learning rate of the last step, or else the newest logged one."""
        if self._learning_rate is not None:
            return float(self._learning_rate)
        return next((e["learning_rate"] for e in reversed(state.log_history) if "learning_rate" in e), None)

    @contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        """Log any error as a warning, so that the store never stops the training."""
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
