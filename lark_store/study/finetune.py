"""Fine-tuning by transformers' Trainer on the sketched loss: a checkpoint per epoch, added to the store.

A checkpoint in the store is complete: it is added after all its files are written. Any other checkpoint folder is
incomplete: it is removed, and its epoch is trained again from the previous checkpoint, with the same result.
"""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from lark_store.callback import LarkStoreCallback
from lark_store.core.device import pick_device
from lark_store.errors import CheckpointError, InputError
from lark_store.gradients.paths.hooks import recompute_activations
from lark_store.modeling.checkpoints import first_line
from lark_store.modeling.loading import context_length, load_model, load_tokenizer, quiet
from lark_store.modeling.losses import Batch, sample_losses
from lark_store.modeling.tokens import Tokens
from lark_store.results import Progress
from lark_store.store import Store
from lark_store.study.render import renderer_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch
    from transformers import TrainerControl, TrainerState

    from lark_store.modeling.sample import Sample
    from lark_store.results import OnProgress
    from lark_store.study.recipe import Recipe

_RESUME_FILES = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt")


def finetune(store: Store, recipe: Recipe, base: Path, samples: Sequence[Sample], on_progress: OnProgress) -> None:
    """Train the epochs without a checkpoint in the store.

    Raises
    ------
    InputError
        A sample can't be rendered, or transformers refuses an option.
    CheckpointError
        A checkpoint was not written.
    """
    folder = recipe.root / "checkpoints"
    finished = _complete_checkpoints(store, folder)
    if len(finished) == recipe.epochs:
        _remove_resume_files(finished.values())
        return
    _train(recipe, base, samples, on_progress, finished)
    _remove_resume_files(_complete_checkpoints(store, folder).values())


def _train(
    recipe: Recipe, base: Path, samples: Sequence[Sample], on_progress: OnProgress, finished: dict[str, Path]
) -> None:
    device = pick_device(recipe.device)
    model = load_model(base, device, recipe.finetune.precision)
    if recipe.finetune.gradient_checkpointing:
        recompute_activations(model)
    tokenizer = load_tokenizer(base)
    renderer = renderer_of(recipe, recipe.tuning.variant, tokenizer, context_length(model))
    rendered = [renderer.attempt(sample) for sample in samples]
    bad = [(sample, tokens) for sample, tokens in zip(samples, rendered, strict=True) if not isinstance(tokens, Tokens)]
    if bad:
        fact = f"{len(bad)} samples of `{recipe.tuning.name}` can't be trained on; `{bad[0][0].sample_id}`: {bad[0][1]}"
        raise InputError(fact, "remove them from the file, or raise the variant's `max_length`")
    trainer = _StudyTrainer(
        rates=recipe.finetune.learning_rates,
        model=model,
        args=_arguments(recipe, device),
        train_dataset=rendered,
        data_collator=_collate,
        processing_class=tokenizer,
        callbacks=[
            LarkStoreCallback(recipe.store, model=recipe.model_name, by="epoch"),
            _Housekeeping(recipe.store),
            _ProgressReporter(on_progress),
        ],
    )
    trainer.remove_callback(PrinterCallback)
    with quiet():
        trainer.train(resume_from_checkpoint=_start(finished))


def _start(finished: dict[str, Path]) -> str | None:
    """Return the last checkpoint, to resume from."""
    if not finished:
        return None
    last = list(finished.values())[-1]
    if not (last / "optimizer.pt").is_file():
        raise CheckpointError(
            f"training can't resume from `{last}`: its optimizer state is gone",
            "remove the study's folder, then run the study again",
        )
    return str(last)


def _complete_checkpoints(store: Store, folder: Path) -> dict[str, Path]:
    """Return the folders of the epochs in the store, in order; remove other checkpoints.

    Updates the store's paths if the study was moved.
    """
    stored = dict(store.sql("select name, path from checkpoints where name like 'epoch-%' order by step").iter_rows())
    folders = {name: folder / path.rsplit("/", 1)[-1] for name, path in stored.items()}
    for name, path in folders.items():
        if path.is_dir() and str(path.resolve()) != stored[name]:
            store.checkpoint_add(name, path)
    for path in folder.glob("checkpoint-*"):
        if path not in folders.values():
            shutil.rmtree(path)
    return folders


def _remove_resume_files(folders: Any) -> None:
    """Remove the files for resuming: they are larger than the model."""
    for folder in folders:
        for name in _RESUME_FILES:
            (folder / name).unlink(missing_ok=True)


def check_options(recipe: Recipe) -> None:
    """Check that transformers accepts the training options and the optimizer's dependencies are installed.

    Raises
    ------
    InputError
    """
    arguments = _arguments(recipe, pick_device(recipe.device))
    with _refusal():
        Trainer.get_optimizer_cls_and_kwargs(arguments)


@contextmanager
def _refusal() -> Iterator[None]:
    try:
        yield
    except (ValueError, ImportError) as error:
        reason = shorten(first_line(error), 200, placeholder=" …")
        hint = "choose another `optimizer`; `adamw_torch`, `adafactor` and `sgd` need no further package"
        raise InputError(f"transformers refuses the recipe's `finetune`: {reason}", hint) from error


def _arguments(recipe: Recipe, device: torch.device) -> TrainingArguments:
    options = recipe.finetune
    micro = options.micro_batch_size or options.batch_size
    with _refusal():
        arguments = TrainingArguments(
            output_dir=str(recipe.root / "checkpoints"),
            num_train_epochs=recipe.epochs,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=options.batch_size // micro,
            learning_rate=options.learning_rates[0],
            optim=options.optimizer,
            weight_decay=options.weight_decay,
            max_grad_norm=options.max_grad_norm,
            save_strategy="epoch",
            logging_strategy="epoch",
            remove_unused_columns=False,
            dataloader_pin_memory=device.type == "cuda",
            disable_tqdm=True,
            report_to="none",
            seed=recipe.seed,
            use_cpu=device.type == "cpu",
        )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # noqa: SLF001 (disables DataParallel)
    return arguments


def _collate(samples: list[Tokens]) -> dict[str, Any]:
    return {"samples": samples}


class _StudyTrainer(Trainer):  # type: ignore[misc]
    """Trains on the samples' mean sketched loss, with a learning rate per epoch."""

    def __init__(self, rates: Sequence[float], **options: Any) -> None:
        super().__init__(**options)
        self._rates = rates
        self.model_accepts_loss_kwargs = False  # so that the mean loss is divided by the accumulation steps

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Set the learning rate by epoch."""
        from torch.optim.lr_scheduler import LambdaLR

        rates, steps = self._rates, num_training_steps // len(self._rates)
        self.lr_scheduler = LambdaLR(
            optimizer or self.optimizer, lambda step: rates[min(step // steps, len(rates) - 1)] / rates[0]
        )
        return self.lr_scheduler

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> Any:
        """Return the batch's mean loss."""
        loss = sample_losses(model, Batch(inputs["samples"], model.device)).mean()
        return (loss, {}) if return_outputs else loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return 0: the inputs are not tensors."""
        del inputs
        return 0


class _Housekeeping(TrainerCallback):  # type: ignore[misc]
    """Keeps the optimizer state of the last checkpoint only; stops the training if a checkpoint was not added."""

    def __init__(self, store: Path) -> None:
        self._store = store

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check that the checkpoint was added, then remove the state of older ones."""
        del args, control, kwargs
        with Store.open(self._store) as store:
            rows = store.sql("select path, step from checkpoints where name like 'epoch-%' order by step")
        if state.global_step not in rows["step"]:
            raise CheckpointError(
                f"the checkpoint of step {state.global_step} was not added to the store; see the log",
                "run the study again: it resumes from the previous checkpoint",
            )
        _remove_resume_files(map(Path, rows["path"][:-1]))


class _ProgressReporter(TrainerCallback):  # type: ignore[misc]
    """Reports the training's progress."""

    def __init__(self, on_progress: OnProgress) -> None:
        self._on_progress = on_progress

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Report the step."""
        del args, control, kwargs
        self._on_progress(Progress("fine-tuning", state.global_step, state.max_steps))
