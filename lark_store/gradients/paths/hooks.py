"""Per-sample gradients, sketched during backward; the whole gradient never exists in memory.

All paths implement `SketchPath`: tokens in, sketches out. `HookPath` supports any causal model, one sample at a time;
`lark_store.gradients.paths.batched` runs several samples in one backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from lark_store.errors import InputError
from lark_store.gradients.sketch.sketcher_checks import compile_pattern
from lark_store.modeling.encoded import UnusableSampleError
from lark_store.modeling.loading import trained_parameters
from lark_store.modeling.losses import Batch, sample_losses

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lark_store.gradients.corrections import Corrector
    from lark_store.modeling.tokens import Tokens

NamedParameters = list[tuple[str, torch.nn.Parameter]]


@dataclass(frozen=True)
class Sketch:
    """A sample's sketch: `vector` (K,) float32 on the CPU with norm √K, its norm `grad_norm` before, `loss` in nats."""

    vector: torch.Tensor
    grad_norm: float
    loss: float


class SketchPath(Protocol):
    """Turns rendered samples into sketches.

    `largest` is the maximum number of tokens in a batch, with padding; None if unknown.
    """

    largest: int | None

    def sketch(self, samples: Sequence[Tokens]) -> list[Sketch | UnusableSampleError]:
        """Return a sketch or an error per sample."""
        ...

    def close(self) -> None:
        """Release the model."""
        ...


class GradientSink(Protocol):
    """Consumes gradients parameter by parameter, after `corrector`, for example to sketch them."""

    device: torch.device
    corrector: Corrector

    def new(self) -> torch.Tensor:
        """Return an accumulator for one sample's gradient."""
        ...

    def add(self, name: str, gradient_SN: torch.Tensor, out: torch.Tensor) -> None:
        """Add a parameter's whole gradient, (1, P)."""
        ...

    def finish(self, out: torch.Tensor) -> torch.Tensor:
        """Return the result, (1, K), with the gradient's norm."""
        ...


def choose_parameters(
    model: torch.nn.Module, include: str | None, exclude: str | None, min_ndim: int | None = None
) -> NamedParameters:
    """Return the parameters to sketch, in the model's order; tied weights count once.

    With adapters and no `include`, only the adapters' parameters. `min_ndim` skips parameters of fewer dimensions:
    with 2, norms and biases.

    Raises
    ------
    InputError
        An expression is invalid, or matches no parameter.
    """
    included, excluded = compile_pattern(include), compile_pattern(exclude)
    everything, trained = list(model.named_parameters()), trained_parameters(model)
    parameters = [
        (name, p)
        for name, p in everything
        if (included.search(name) if included else trained is None or name in trained)
        and not (excluded and excluded.search(name))
        and p.dim() >= (min_ndim or 0)
    ]
    if not parameters:
        sample = ", ".join(f"`{name}`" for name, _ in everything[:: max(1, len(everything) // 4)])
        raise InputError(
            f"the sketcher matches none of the model's {len(everything)} parameters", f"its parameters include {sample}"
        )
    return parameters


class HookPath:
    """Sketches one sample at a time through a hook on each parameter; supports any model."""

    def __init__(self, model: Any, parameters: NamedParameters, sketcher: GradientSink) -> None:
        self.model = model
        self.sketcher = sketcher
        self.largest: int | None = 1
        self.seen: set[str] = set()  # parameters with a gradient so far
        self._out = sketcher.new()
        self._hooks: list[Any] = []
        model.requires_grad_(False)
        self._watch(parameters)

    def _watch(self, parameters: NamedParameters) -> None:
        for name, parameter in parameters:
            parameter.requires_grad_(True)
            hook = parameter.register_post_accumulate_grad_hook(self._sink(name))  # type: ignore[no-untyped-call]
            self._hooks.append(hook)

    def _sink(self, name: str) -> Callable[[torch.Tensor], None]:
        def take(parameter: torch.Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None  # cleared first, so a failure leaves no gradient behind
            assert gradient is not None
            self.seen.add(name)
            self.sketcher.add(name, self.sketcher.corrector.whole(name, gradient).view(1, -1), self._out)

        return take

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()
        self.model.requires_grad_(False)

    def sketch(self, samples: Sequence[Tokens]) -> list[Sketch | UnusableSampleError]:
        """Return a sketch or an error per sample."""
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
        """Run forward and backward; return the sample's loss."""
        (loss,) = sample_losses(self.model, batch)
        loss.backward()
        return float(loss.detach())


def recompute_activations(model: Any) -> None:
    """Enable gradient checkpointing for a model in evaluation mode: less memory, a second forward pass.

    transformers requires layers in training mode, so their dropout is set to 0.

    Raises
    ------
    InputError
        The model does not support it.
    """
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise InputError(
            f"the model does not support gradient checkpointing: {error}", "run without gradient checkpointing"
        ) from error
    layers = [layer for layer in model.modules() if getattr(layer, "gradient_checkpointing", False)]
    for holder in (model.config, *layers):
        for name, value in list(vars(holder).items()):
            if "drop" in name and isinstance(value, float):
                setattr(holder, name, 0.0)
    for layer in layers:
        layer.training = True


def check_tokens(model: Any, tokens: Tokens) -> None:
    """Raise UnusableSampleError for an unknown token, which would break a GPU for all later samples."""
    vocabulary, largest = len(model.get_input_embeddings().weight), max(tokens.input_ids)
    if largest >= vocabulary:
        raise UnusableSampleError(f"token {largest} is outside the model's vocabulary of {vocabulary}")


# Raised by models on a sample: out of memory, unsupported shapes, …
FAULTS = (RuntimeError, IndexError, ValueError, TypeError, KeyError, MemoryError)
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")


def is_device_lost(error: Exception) -> bool:
    """Tell whether a device is permanently broken, so that all later work fails."""
    return isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error)


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether a device or the machine ran out of memory."""
    has_type = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return has_type or any(text in str(error) for text in _OUT_OF_MEMORY)


def failure(tokens: Tokens, error: Exception) -> UnusableSampleError:
    """Build the recorded error of a model that fails on a sample."""
    fact = next(iter(str(error).splitlines()), type(error).__name__)
    return UnusableSampleError(f"the model fails on its {len(tokens.input_ids)} tokens: {fact}")


def finish(raw: torch.Tensor, loss: float) -> Sketch | UnusableSampleError:
    """Scale a raw sketch to norm √K, or return an error for a non-finite loss or gradient or a zero gradient."""
    vector = raw.detach().to("cpu", torch.float32, copy=True)
    norm = float(torch.linalg.vector_norm(vector, dtype=torch.float64))
    if not (norm < float("inf") and loss < float("inf")):
        return UnusableSampleError(f"the gradient is not finite (loss {loss:g}, norm {norm:g})")
    if norm == 0:
        return UnusableSampleError(f"the gradient is zero (loss {loss:g})")
    return Sketch(vector.mul_(vector.numel() ** 0.5 / norm), norm, loss)
