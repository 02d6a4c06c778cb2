"""Per-sample gradients, sketched as backward makes them: no whole gradient is ever held.

The paths to a sketch share one interface, `SketchPath`: tokens in, sketches out. `HookPath` works for any causal
model, one sample at a time; `lark_store.ingest.batched` has the one for several samples in one backward.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from lark_store.errors import InputError
from lark_store.ingest.losses import Batch, sample_losses
from lark_store.ingest.models import trained_parameters
from lark_store.ingest.variants import UnusableSampleError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lark_store.ingest.corrections import Corrector
    from lark_store.ingest.variants import Tokens

Chosen = list[tuple[str, torch.nn.Parameter]]  # the parameters to sketch, by name


@dataclass(frozen=True)
class Sketch:
    """A sample's sketch `vector` (K,) float32 on the CPU with norm √K; `grad_norm`, the norm it had; `loss` in nats."""

    vector: torch.Tensor
    grad_norm: float
    loss: float


class SketchPath(Protocol):
    """A way from rendered samples to sketches.

    `largest` is the most tokens that a batch may have with its padding, None if that is not known.
    """

    largest: int | None

    def sketch(self, samples: Sequence[Tokens]) -> list[Sketch | UnusableSampleError]:
        """Return one sketch per sample, or the reason why there is none."""
        ...

    def close(self) -> None:
        """Let go of the model."""
        ...


class Taker(Protocol):
    """What takes gradients, parameter by parameter: `lark_store.ingest.oporp.GradientSketcher` makes sketches of them.

    `corrector` changes them before.
    """

    device: torch.device
    corrector: Corrector

    def new(self) -> torch.Tensor:
        """Return what one sample's gradient is summed in."""
        ...

    def add(self, name: str, gradient_SN: torch.Tensor, out: torch.Tensor) -> None:
        """Take a parameter's whole gradient, (1, P)."""
        ...

    def finish(self, out: torch.Tensor) -> torch.Tensor:
        """Return what was made, (1, K); its norm is that of the gradient."""
        ...


def pick_device(name: str) -> torch.device:
    """Return the device of this name; `auto` takes CUDA, then MPS, then the CPU.

    Raises
    ------
    InputError
        There is no such device here.
    """
    if name == "auto":
        found = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(found)
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"there is no device `{name}` here", "use `--device auto`, `cpu`, `cuda` or `mps`") from error
    return device


def choose_parameters(
    model: torch.nn.Module, include: str | None, exclude: str | None, min_ndim: int | None = None
) -> Chosen:
    """Return the parameters to sketch, each once (tied weights count once), in the model's order.

    Of a model with adapters these are the adapters' own, unless an expression asks for others. `min_ndim` leaves out
    those of fewer dimensions: with 2, norms and biases.

    Raises
    ------
    InputError
        An expression is invalid, or matches no parameter.
    """
    wanted, unwanted = compile_pattern(include), compile_pattern(exclude)
    everything, trained = list(model.named_parameters()), trained_parameters(model)
    chosen = [
        (name, p)
        for name, p in everything
        if (wanted.search(name) if wanted else trained is None or name in trained)
        and not (unwanted and unwanted.search(name))
        and p.dim() >= (min_ndim or 0)
    ]
    if not chosen:
        sample = ", ".join(f"`{name}`" for name, _ in everything[:: max(1, len(everything) // 4)])
        raise InputError(
            f"the sketcher takes none of the model's {len(everything)} parameters", f"they are named {sample}"
        )
    return chosen


def compile_pattern(pattern: str | None) -> re.Pattern[str] | None:
    """Compile a parameter expression, searched for anywhere in the parameter's name."""
    try:
        return None if pattern is None else re.compile(pattern)
    except re.error as error:
        raise InputError(
            f"`{pattern}` is no regular expression: {error}", r"for example 'model\.layers\.2[4-9]\.'"
        ) from error


class HookPath:
    """Sketches one sample at a time through a hook on each parameter: right for any model."""

    def __init__(self, model: Any, chosen: Chosen, sketcher: Taker) -> None:
        self.model = model
        self.sketcher = sketcher
        self.largest: int | None = 1
        self.met: set[str] = set()  # the parameters that had a gradient so far
        self._out = sketcher.new()
        self._hooks: list[Any] = []
        model.requires_grad_(False)
        self._watch(chosen)

    def _watch(self, chosen: Chosen) -> None:
        for name, parameter in chosen:
            parameter.requires_grad_(True)
            hook = parameter.register_post_accumulate_grad_hook(self._sink(name))  # type: ignore[no-untyped-call]
            self._hooks.append(hook)

    def _sink(self, name: str) -> Callable[[torch.Tensor], None]:
        def take(parameter: torch.Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None  # let go of first: nothing adds up if the next line fails
            assert gradient is not None
            self.met.add(name)
            self.sketcher.add(name, self.sketcher.corrector.whole(name, gradient).view(1, -1), self._out)

        return take

    def close(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()
        self.model.requires_grad_(False)

    def sketch(self, samples: Sequence[Tokens]) -> list[Sketch | UnusableSampleError]:
        """Return one sketch per sample, or the reason why there is none."""
        return [self._one(tokens) for tokens in samples]

    def _one(self, tokens: Tokens) -> Sketch | UnusableSampleError:
        self._out.zero_()
        try:
            check_tokens(self.model, tokens)
            loss = self._backward(Batch([tokens], self.sketcher.device))
        except UnusableSampleError as error:
            return error
        except FAULTS as error:
            if is_device_lost(error):
                raise
            self.model.zero_grad(set_to_none=True)
            return failure(tokens, error)
        return finish(self.sketcher.finish(self._out)[0], loss)

    def _backward(self, batch: Batch) -> float:
        """Go forward and back; returns the loss of the one sample."""
        (loss,) = sample_losses(self.model, batch)
        loss.backward()
        return float(loss.detach())


def recompute_activations(model: Any) -> None:
    """Turn gradient checkpointing on for a model in evaluation mode: less memory, a second forward.

    transformers asks for layers in training; what they would drop out themselves is set to nothing.

    Raises
    ------
    InputError
        The model can't do it.
    """
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise InputError(f"the model can't do gradient checkpointing: {error}", "leave it out") from error
    layers = [layer for layer in model.modules() if getattr(layer, "gradient_checkpointing", False)]
    for holder in (model.config, *layers):
        for name, value in list(vars(holder).items()):
            if "drop" in name and isinstance(value, float):
                setattr(holder, name, 0.0)
    for layer in layers:
        layer.training = True


def check_tokens(model: Any, tokens: Tokens) -> None:
    """Raise UnusableSampleError for a token that the model lacks: on a GPU it would break every later sample too."""
    vocabulary, largest = len(model.get_input_embeddings().weight), max(tokens.input_ids)
    if largest >= vocabulary:
        raise UnusableSampleError(f"the model has {vocabulary} tokens, not token {largest}")


# What a model may raise on a sample: out of memory, a shape it does not take, …
FAULTS = (RuntimeError, IndexError, ValueError, TypeError, KeyError, MemoryError)
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")


def is_device_lost(error: Exception) -> bool:
    """Tell whether a device is broken for good: everything after would fail too."""
    return isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error)


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether a device's or the machine's memory ran out."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or any(text in str(error) for text in _OUT_OF_MEMORY)


def failure(tokens: Tokens, error: Exception) -> UnusableSampleError:
    """Return the reason that is recorded when a model fails on a sample."""
    fact = next(iter(str(error).splitlines()), type(error).__name__)
    return UnusableSampleError(f"the model fails on its {len(tokens.input_ids)} tokens: {fact}")


def finish(raw: torch.Tensor, loss: float) -> Sketch | UnusableSampleError:
    """Scale a raw sketch to norm √K; a loss or gradient that is not finite, or is zero, has no direction."""
    vector = raw.detach().to("cpu", torch.float32, copy=True)
    norm = float(torch.linalg.vector_norm(vector, dtype=torch.float64))
    if not (norm < float("inf") and loss < float("inf")):
        return UnusableSampleError(f"the gradient is not finite (loss {loss:g}, norm {norm:g})")
    if norm == 0:
        return UnusableSampleError(f"the gradient is zero (loss {loss:g})")
    return Sketch(vector.mul_(vector.numel() ** 0.5 / norm), norm, loss)
