"""Fine-tuning by transformers' Trainer on the loss that is sketched: a checkpoint per epoch, added to the store.

A checkpoint that is in the store is whole, since it is added when all its files are written. What else lies in the
folder was cut off; it goes, and its epoch is trained again from the checkpoint before it, with the same result.
"""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from lark_store.callback import LarkStoreCallback
from lark_store.errors import CheckpointError, InputError
from lark_store.ingest.checkpoints import first_line
from lark_store.ingest.gradients import pick_device, recompute_activations
from lark_store.ingest.losses import Batch, sample_losses
from lark_store.ingest.models import context_length, load_model, load_tokenizer, quiet
from lark_store.ingest.variants import Tokens
from lark_store.schema.records import Progress
from lark_store.store import Store
from lark_store.study.render import renderer_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch
    from transformers import TrainerControl, TrainerState

    from lark_store.ingest.sources import Sample
    from lark_store.schema.records import OnProgress
    from lark_store.study.recipe import Recipe

_TO_GO_ON = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt")


def finetune(store: Store, recipe: Recipe, base: Path, samples: Sequence[Sample], on_progress: OnProgress) -> None:
    """Train the epochs whose checkpoints are not in the store.

    Raises
    ------
    InputError
        A sample can't be rendered; transformers refuses an option.
    CheckpointError
        A checkpoint was not written.
    """
    folder = recipe.root / "checkpoints"
    done = _whole(store, folder)
    if len(done) == recipe.epochs:
        _forget(done.values())
        return
    _train(recipe, base, samples, on_progress, done)
    _forget(_whole(store, folder).values())


def _train(
    recipe: Recipe, base: Path, samples: Sequence[Sample], on_progress: OnProgress, done: dict[str, Path]
) -> None:
    device = pick_device(recipe.device)
    model = load_model(base, device, recipe.finetune.precision)
    if recipe.finetune.gradient_checkpointing:
        recompute_activations(model)
    tokenizer = load_tokenizer(base)
    renderer = renderer_of(recipe, recipe.tuning.variant, tokenizer, context_length(model))
    rendered = [renderer.attempt(sample) for sample in samples]
    bad = [(sample, found) for sample, found in zip(samples, rendered, strict=True) if not isinstance(found, Tokens)]
    if bad:
        fact = f"{len(bad)} samples of `{recipe.tuning.name}` can't be trained on; `{bad[0][0].sample_id}`: {bad[0][1]}"
        raise InputError(fact, "take them out of the file, or raise the variant's `max_length`")
    trainer = _StudyTrainer(
        rates=recipe.finetune.learning_rates,
        model=model,
        args=_arguments(recipe, device),
        train_dataset=rendered,
        data_collator=_together,
        processing_class=tokenizer,
        callbacks=[
            LarkStoreCallback(recipe.store, model=recipe.model_name, by="epoch"),
            _Housekeeping(recipe.store),
            _Told(on_progress),
        ],
    )
    trainer.remove_callback(PrinterCallback)
    with quiet():
        trainer.train(resume_from_checkpoint=_start(done))


def _start(done: dict[str, Path]) -> str | None:
    """Return the checkpoint to go on from: the last one."""
    if not done:
        return None
    last = list(done.values())[-1]
    if not (last / "optimizer.pt").is_file():
        raise CheckpointError(
            f"the training can't go on from `{last}`: its optimizer's state is gone",
            "begin again: remove the study's folder",
        )
    return str(last)


def _whole(store: Store, folder: Path) -> dict[str, Path]:
    """Return the folders of the epochs that are in the store, in order; remove what else lies there.

    Where the study was moved, the store is told.
    """
    known = dict(store.sql("select name, path from checkpoints where name like 'epoch-%' order by step").iter_rows())
    found = {name: folder / path.rsplit("/", 1)[-1] for name, path in known.items()}
    for name, path in found.items():
        if path.is_dir() and str(path.resolve()) != known[name]:
            store.checkpoint_add(name, path)
    for path in folder.glob("checkpoint-*"):
        if path not in found.values():
            shutil.rmtree(path)
    return found


def _forget(folders: Any) -> None:
    """Remove what only a training that goes on needs: it is larger than the model."""
    for folder in folders:
        for name in _TO_GO_ON:
            (folder / name).unlink(missing_ok=True)


def check_options(recipe: Recipe) -> None:
    """Make sure that transformers takes the training's options, and has what the optimizer needs.

    Raises
    ------
    InputError
    """
    arguments = _arguments(recipe, pick_device(recipe.device))
    with _refused():
        Trainer.get_optimizer_cls_and_kwargs(arguments)


@contextmanager
def _refused() -> Iterator[None]:
    try:
        yield
    except (ValueError, ImportError) as error:
        what = shorten(first_line(error), 200, placeholder=" …")
        hint = "see `optim` of its TrainingArguments; `adamw_torch`, `adafactor` and `sgd` need nothing more"
        raise InputError(f"transformers refuses the recipe's `finetune`: {what}", hint) from error


def _arguments(recipe: Recipe, device: torch.device) -> TrainingArguments:
    how = recipe.finetune
    micro = how.micro_batch_size or how.batch_size
    with _refused():
        made = TrainingArguments(
            output_dir=str(recipe.root / "checkpoints"),
            num_train_epochs=recipe.epochs,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=how.batch_size // micro,
            learning_rate=how.learning_rates[0],
            optim=how.optimizer,
            weight_decay=how.weight_decay,
            max_grad_norm=how.max_grad_norm,
            save_strategy="epoch",
            logging_strategy="epoch",
            remove_unused_columns=False,
            dataloader_pin_memory=device.type == "cuda",
            disable_tqdm=True,
            report_to="none",
            seed=recipe.seed,
            use_cpu=device.type == "cpu",
        )
    made._n_gpu = min(made.n_gpu, 1)  # noqa: SLF001 (transformers' own way to say: no DataParallel)
    return made


def _together(samples: list[Tokens]) -> dict[str, Any]:
    return {"samples": samples}


class _StudyTrainer(Trainer):  # type: ignore[misc]
    """Trains on the mean over samples of the loss that is sketched, with a learning rate for each epoch."""

    def __init__(self, rates: Sequence[float], **options: Any) -> None:
        super().__init__(**options)
        self._rates = rates
        self.model_accepts_loss_kwargs = False  # `compute_loss` returns a mean: it is divided by the accumulation

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Set the learning rate by the epoch that a step belongs to."""
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
        """Count nothing: the inputs are no tensors."""
        del inputs
        return 0


class _Housekeeping(TrainerCallback):  # type: ignore[misc]
    """Keeps the optimizer's state of the last checkpoint alone; a checkpoint that was not added ends the training."""

    def __init__(self, store: Path) -> None:
        self._store = store

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Look whether it was added, then remove the older ones' state."""
        del args, control, kwargs
        with Store.open(self._store) as store:
            found = store.sql("select path, step from checkpoints where name like 'epoch-%' order by step")
        if state.global_step not in found["step"]:
            raise CheckpointError(
                f"the checkpoint of step {state.global_step} was not added to the store; the log says why",
                "run the study again: it goes on from the checkpoint before it",
            )
        _forget(map(Path, found["path"][:-1]))


class _Told(TrainerCallback):  # type: ignore[misc]
    """Says how far the training is."""

    def __init__(self, on_progress: OnProgress) -> None:
        self._on_progress = on_progress

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Report the step."""
        del args, control, kwargs
        self._on_progress(Progress("fine-tuning", state.global_step, state.max_steps))
