"""Per-sample gradients, sketched parameter by parameter as backward makes them: no whole gradient is ever held.

The paths to a sketch share one interface, `SketchPath`: tokens in, sketches out. `HookPath` works for any causal
model, one sample at a time. A correction that scales a layer's input and output gradient before they are multiplied,
and a path that does several samples in one backward, are further `SketchPath`s.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.nn import functional

from lark_store.errors import InputError
from lark_store.ingest.variants import UnusableSampleError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lark_store.ingest.oporp import GradientSketcher
    from lark_store.ingest.variants import Tokens


@dataclass(frozen=True)
class Sketch:
    """A sample's sketch `vector` (K,) float32 on the CPU with norm √K; `grad_norm`, the norm it had; `loss` in nats."""

    vector: torch.Tensor
    grad_norm: float
    loss: float


class SketchPath(Protocol):
    """A way from rendered samples to sketches."""

    def sketch(self, samples: Sequence[Tokens]) -> list[Sketch | UnusableSampleError]:
        """Return one sketch per sample, or the reason why there is none."""
        ...

    def close(self) -> None:
        """Let go of the model."""
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
    model: torch.nn.Module, include: str | None, exclude: str | None
) -> list[tuple[str, torch.nn.Parameter]]:
    """Return the parameters to sketch, each once (tied weights count once), in the model's order.

    Raises
    ------
    InputError
        An expression is invalid, or matches no parameter.
    """
    wanted, unwanted = compile_pattern(include), compile_pattern(exclude)
    everything = list(model.named_parameters())
    chosen = [
        (name, p)
        for name, p in everything
        if (wanted is None or wanted.search(name)) and not (unwanted and unwanted.search(name))
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


def token_loss(model: Any, tokens: Tokens, device: torch.device) -> torch.Tensor:
    """Return the mean cross-entropy over a sample's targets, a scalar in nats.

    The label of target t is token t itself or, under the rule `predicted`, the model's most likely token there; the
    logits that predict it stand at t − 1. Logits are made only where they are needed, if the model can do that.
    """
    ids = torch.tensor([tokens.input_ids], device=device)
    targets = torch.tensor(tokens.is_target, device=device).nonzero().flatten()
    before = targets - 1
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=before).logits[0]
    else:
        logits = model(input_ids=ids, use_cache=False).logits[0, before]
    logits = logits.float()
    labels = logits.detach().argmax(dim=-1) if tokens.rule == "predicted" else ids[0, targets]
    return functional.cross_entropy(logits, labels)


class HookPath:
    """Sketches one sample at a time through a hook on each parameter: right for any model."""

    def __init__(self, model: Any, chosen: list[tuple[str, torch.nn.Parameter]], sketcher: GradientSketcher) -> None:
        self.model = model
        self.sketcher = sketcher
        self._out = sketcher.new()
        self.vocabulary = int(model.get_input_embeddings().num_embeddings)
        model.requires_grad_(False)
        self._hooks = []
        for name, parameter in chosen:
            parameter.requires_grad_(True)
            hook = parameter.register_post_accumulate_grad_hook(self._sink(name))  # type: ignore[no-untyped-call]
            self._hooks.append(hook)

    def _sink(self, name: str) -> Callable[[torch.Tensor], None]:
        def take(parameter: torch.Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None  # let go of first: nothing adds up if the next line fails
            assert gradient is not None
            self.sketcher.add(name, gradient, self._out)

        return take

    def close(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()

    def sketch(self, samples: Sequence[Tokens]) -> list[Sketch | UnusableSampleError]:
        """Return one sketch per sample, or the reason why there is none."""
        return [self._one(tokens) for tokens in samples]

    def _one(self, tokens: Tokens) -> Sketch | UnusableSampleError:
        self._out.zero_()
        if max(tokens.input_ids) >= self.vocabulary:  # on a GPU this would break every later sample too
            return UnusableSampleError(f"the model has {self.vocabulary} tokens, not token {max(tokens.input_ids)}")
        try:
            loss = token_loss(self.model, tokens, self.sketcher.device)
            loss.backward()  # type: ignore[no-untyped-call]
        except (RuntimeError, IndexError, ValueError) as error:  # out of memory, a shape the model does not take, …
            self.model.zero_grad(set_to_none=True)
            fact = next(iter(str(error).splitlines()), type(error).__name__)
            return UnusableSampleError(f"the model fails on its {len(tokens.input_ids)} tokens: {fact}")
        return finish(self._out, float(loss.detach()))


def finish(raw: torch.Tensor, loss: float) -> Sketch | UnusableSampleError:
    """Scale a raw sketch to norm √K; a loss or gradient that is not finite, or is zero, has no direction."""
    vector = raw.detach().to("cpu", torch.float32, copy=True)
    norm = float(torch.linalg.vector_norm(vector, dtype=torch.float64))
    if not (norm < float("inf") and loss < float("inf")):
        return UnusableSampleError(f"the gradient is not finite (loss {loss:g}, norm {norm:g})")
    if norm == 0:
        return UnusableSampleError(f"the gradient is zero (loss {loss:g})")
    return Sketch(vector.mul_(vector.numel() ** 0.5 / norm), norm, loss)
