"""Divide the dot product of two samples' gradients among the tokens of each.

With a direction G held for each parameter, such as the other sample's gradient, a sample's product ⟨G, ∇L⟩ is divided
in two ways:

- by position: Σ over layers of δ_tᵀ D_t, where δ_t is the gradient of the layer's output at position t and D_t the
  output's derivative along G, G x_t for a linear layer. Hooks take both in one forward and backward pass.
- by target: the derivative along G of each predicted token's loss, of all of them at once in forward mode: each layer
  adds D to its output's tangent.

Both sum to the product. A layer's positions are those of its input: an embedding's token, an output head's predictor.
With a masked template, D is zero at the template's positions, as in the sketch.

Shape letters: T tokens, N targets, P coordinates of a parameter.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree

from lark_store.gradients.corrections.base import Corrector
from lark_store.gradients.paths.batched import sketched_layers
from lark_store.gradients.paths.hooks import FAULTS, HookPath, Sketch, failure, is_device_lost
from lark_store.gradients.paths.masked import MaskedHookPath
from lark_store.gradients.paths.taps import UnknownLayerError, tap
from lark_store.modeling.losses import Batch, target_losses

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from lark_store.gradients.paths.hooks import NamedParameters
    from lark_store.gradients.paths.taps import Names
    from lark_store.modeling.tokens import Tokens

    Gradient = dict[str, torch.Tensor]  # by parameter

_TOLERANCE = 1e-4  # of the product of the two norms; float32 stays below 1e-6
_STRETCH = 1 << 22  # coordinates widened at once
_NO_FORWARD_MODE = ("forward mode AD", "forward AD")
_PROBES = (5, 7)  # lengths of texts that show which dimension of an output holds the tokens


@dataclass(frozen=True)
class WholeGradient:
    """A sample's gradient: `plain`, and `corrected` as it is sketched, with its `norm`; the `loss` in nats."""

    plain: Gradient
    corrected: Gradient
    norm: float
    loss: float


@dataclass(frozen=True)
class Division:
    """A product's parts: `by_position` (T,) and `by_target` (T,), zero where no loss is, in dot units.

    `labels` (T,) are the targets' tokens: the model's most likely ones under the rule `predicted`. None elsewhere.
    """

    by_position: torch.Tensor
    by_target: torch.Tensor
    labels: list[int | None]


class GradientDivider:
    """Takes whole gradients of samples with one model, and divides their products among tokens.

    Holds several gradients in memory, each as large as the sketched parameters in float32.

    Raises
    ------
    UnknownLayerError
        A parameter is in a layer whose gradient is no sum over positions.
    """

    def __init__(self, model: Any, parameters: NamedParameters, corrector: Corrector, *, masked: bool) -> None:
        self.model, self.parameters, self.corrector, self.masked = model, parameters, corrector, masked
        self.device = parameters[0][1].device
        layers, _ = sketched_layers(model, parameters)  # others are of no use to text, or the sum shows it
        self.layers = {path: (layer, names) for path, (layer, _, names) in layers.items()}
        head = model.get_output_embeddings()
        self.head = set() if head is None else set(head.modules())
        model.requires_grad_(False)
        self.dims = self._find_positions()

    # --- whole gradients -------------------------------------------------------------------------------------------

    def gradient(self, tokens: Tokens) -> WholeGradient:
        """Return a sample's gradient.

        Raises
        ------
        UnusableSampleError
            The model fails on it, or its gradient is zero or not finite.
        """
        sink = _KeptGradient(self.device, {name: p.shape for name, p in self.parameters})
        path = (MaskedHookPath if self.masked else HookPath)(self.model, self.parameters, sink)
        try:
            (sketch,) = path.sketch([tokens])
        finally:
            path.close()
        if not isinstance(sketch, Sketch):
            raise sketch
        corrected = {name: self.corrector.whole(name, value) for name, value in sink.kept.items()}
        return WholeGradient(sink.kept, corrected, dot(corrected, corrected) ** 0.5, sketch.loss)

    def direction(self, of: WholeGradient, other: WholeGradient) -> Gradient:
        """Return G with ⟨G, plain gradient of `of`⟩ = ⟨corrected of `of`, corrected of `other`⟩."""
        return {
            name: self.corrector.whole_like(name, value, of.plain[name]).float()
            for name, value in other.corrected.items()
            if name in of.plain
        }

    # --- their division --------------------------------------------------------------------------------------------

    def divide(self, tokens: Tokens, direction: Gradient) -> Division:
        """Divide the product of a direction and a sample's gradient among its tokens.

        Raises
        ------
        UnusableSampleError
            The model fails on it.
        """
        batch = Batch([tokens], self.device)
        taken = _Taken(self, batch, direction)
        try:
            with _differentiable_experts(self.model):
                by_position = taken.by_position()
                by_target, labels = taken.by_target()
        except FAULTS as error:
            if is_device_lost(error):
                raise
            raise failure(tokens, error) from error
        return Division(by_position, by_target, labels)

    def _find_positions(self) -> dict[str, list[int]]:
        """Return which dimension of each layer's outputs holds the tokens: that which grows with the text.

        Raises
        ------
        UnknownLayerError
            None does, or several.
        """
        shapes: list[dict[str, list[torch.Size]]] = []
        for n in _PROBES:
            seen: dict[str, list[torch.Size]] = {}

            def note(path: str, _: Any, y: Any, seen: dict[str, list[torch.Size]] = seen) -> Any:
                seen[path] = [part.shape for part in _floats(y)]

            ids = torch.arange(n, device=self.device)[None] % len(self.model.get_input_embeddings().weight)
            with torch.no_grad(), self.hooked(note):
                self.model(input_ids=ids, use_cache=False)
            shapes.append(seen)
        short, long = shapes
        dims = {}
        for path, parts in short.items():
            pairs = [list(zip(a, b, strict=True)) for a, b in zip(parts, long.get(path, []), strict=True)]
            growing = [[d for d, sizes in enumerate(sizes_of) if sizes == _PROBES] for sizes_of in pairs]
            if not all(len(found) == 1 for found in growing):
                raise UnknownLayerError(f"layer `{path}` gives {tuple(parts[0])}, with unknown token positions")
            dims[path] = [found[0] for found in growing]
        return dims

    @contextmanager
    def hooked(self, on_output: Callable[[str, Any, Any], Any]) -> Iterator[None]:
        """Pass each layer's path, inputs and output to a function, whose value, if any, replaces the output."""

        def hook_of(path: str) -> Callable[..., Any]:
            return lambda _, args, kwargs, y: on_output(path, (args, kwargs), y)

        hooks = [
            layer.register_forward_hook(hook_of(path), with_kwargs=True) for path, (layer, _) in self.layers.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


class _Taken:
    """One sample's layers: their outputs' derivatives D along a direction."""

    def __init__(self, owner: GradientDivider, batch: Batch, direction: Gradient) -> None:
        self.owner, self.batch, self.direction = owner, batch, direction
        self.derivatives: dict[str, list[list[torch.Tensor]]] = {}  # of each call of a layer, of each of its outputs
        self._sums_T = torch.zeros(batch.width, dtype=torch.float64)  # on the CPU: some devices lack float64
        (sample,) = batch.samples
        self._weight = 1.0 if sample.is_summed else 1 / sample.n_targets

    def by_position(self) -> torch.Tensor:
        """Run forward and backward; return each position's part, (T,) float64."""
        with self._tapping():
            losses_N, _ = target_losses(self.owner.model, self.batch)
            (losses_N.sum() * self._weight).backward()  # type: ignore[no-untyped-call]
        return self._sums_T.clone()

    def by_target(self) -> tuple[torch.Tensor, list[int | None]]:
        """Return each target's part, (T,) float64, and its label; without forward mode, one backward pass each."""
        try:
            values_N, labels = self._forward_mode()
        except RuntimeError as error:
            if not any(text in str(error) for text in _NO_FORWARD_MODE):
                raise
            values_N, labels = self._backward_each()
        (sample,) = self.batch.samples
        positions = [t for t, is_target in enumerate(sample.is_target) if is_target]
        parts_T = torch.zeros_like(self._sums_T)
        parts_T[positions] = values_N * self._weight
        label_of = dict(zip(positions, labels, strict=True))
        return parts_T, [label_of.get(t) for t in range(self.batch.width)]

    def _forward_mode(self) -> tuple[torch.Tensor, list[int]]:
        """Return the derivative of each target's loss, (N,) float64, from one pass with tangents; and the labels."""
        with torch.no_grad(), forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH), self.owner.hooked(self._moved):
            losses_N, labels_N = target_losses(self.owner.model, self.batch)
            tangent_N = forward_ad.unpack_dual(losses_N).tangent  # type: ignore[no-untyped-call]
            labels = labels_N.tolist()
        return (torch.zeros_like(losses_N) if tangent_N is None else tangent_N).cpu().double(), labels

    def _backward_each(self) -> tuple[torch.Tensor, list[int]]:
        """Return the same from one backward pass per target."""
        with self._tapping():
            losses_N, labels_N = target_losses(self.owner.model, self.batch)
            values = []
            for loss in losses_N:
                self._sums_T.zero_()
                loss.backward(retain_graph=True)
                values.append(self._sums_T.sum())
        return torch.stack(values), labels_N.tolist()

    def _tapping(self) -> AbstractContextManager[None]:
        anchor = torch.zeros((), device=self.batch.device, requires_grad=True)
        return self.owner.hooked(lambda path, inputs, y: self._tapped(path, inputs, y, anchor))

    def _tapped(self, path: str, inputs: Any, y: Any, anchor: torch.Tensor) -> Any:
        """Take a layer's derivative, and its output gradient during backward."""
        parts = self._derivative(path, inputs)
        self.derivatives.setdefault(path, []).append(parts)
        if path not in self.owner.dims:
            raise UnknownLayerError(f"layer `{path}` is used for some texts only, with unknown token positions")
        flat, spec = _pytree.tree_flatten(y)
        places = [i for i, part in enumerate(flat) if _is_float(part)]
        for i, derivative, dim in zip(places, parts, self.owner.dims[path], strict=True):
            flat[i] = tap(flat[i], derivative, anchor, partial(self._add, path, dim))
        return _pytree.tree_unflatten(flat, spec)

    def _add(self, path: str, dim: int, derivative: torch.Tensor, delta: torch.Tensor) -> None:
        parts = (derivative * delta).movedim(dim, 0).flatten(1).sum(dim=1)
        self._sums_T.index_add_(0, self._rows(path).cpu(), parts.cpu().double())

    def _rows(self, path: str) -> torch.Tensor:
        """Return the positions in a layer's output."""
        if self.owner.layers[path][0] in self.owner.head:
            return self.batch.predictors[1]
        return torch.arange(self.batch.width, device=self.batch.device)

    @torch.no_grad()
    def _derivative(self, path: str, inputs: Any) -> list[torch.Tensor]:
        """Return the derivative of each of a layer's outputs along the direction, zero at masked positions."""
        layer, names = self.owner.layers[path]
        args, kwargs = _pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, inputs)
        parts = _derivative(layer, names, self.direction, args, kwargs)
        if isinstance(layer, torch.nn.Embedding) and layer.padding_idx is not None:
            ids = next(iter((*args, *kwargs.values())))
            parts = [part.masked_fill((ids == layer.padding_idx)[..., None], 0) for part in parts]  # like torch
        if not self.owner.masked:
            return parts
        is_content = torch.zeros(self.batch.width, dtype=torch.bool, device=self.batch.device)
        is_content[self.batch.content[0]] = True
        kept = is_content[self._rows(path)]
        dims = self.owner.dims[path]
        return [
            part * kept.view([-1 if d == dim else 1 for d in range(part.dim())])
            for part, dim in zip(parts, dims, strict=True)
        ]

    def _moved(self, path: str, _: Any, y: Any) -> Any:
        """Add a layer's derivative to its output's tangent."""
        parts = iter(self.derivatives[path].pop(0))
        return _pytree.tree_map(lambda part: _moved_along(part, next(parts)) if _is_float(part) else part, y)


def _moved_along(values: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """Add a direction to the tangent of values."""
    moved: torch.Tensor = forward_ad.make_dual(torch.zeros_like(direction), direction)  # type: ignore[no-untyped-call]
    return values + moved


def _derivative(
    layer: torch.nn.Module, names: Names, direction: Gradient, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[torch.Tensor]:
    own = dict(layer.named_parameters(recurse=False, remove_duplicate=False))
    moved = {local: name for local, name in names.items() if name in direction}
    if not moved:
        return [torch.zeros_like(part) for part in _floats(layer.forward(*args, **kwargs))]
    unhooked = _Unhooked(layer)

    def run(parameters: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return tuple(_floats(torch.func.functional_call(unhooked, parameters, args, kwargs)))

    primals = {f"layer.{local}": own[local].detach() for local in moved}
    along = {f"layer.{local}": direction[name] for local, name in moved.items()}
    tangents = torch.func.jvp(run, (primals,), (along,))[1]
    return list(tangents)


class _Unhooked(torch.nn.Module):
    """A layer without its hooks."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer's forward."""
        return self.layer.forward(*args, **kwargs)


@contextmanager
def _differentiable_experts(model: Any) -> Iterator[None]:
    """Run a mixture's experts one by one: fused implementations have no forward mode."""
    before = getattr(model.config, "_experts_implementation", None)
    if before is None:
        yield
        return
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(before)


def _is_float(part: Any) -> bool:
    return isinstance(part, torch.Tensor) and part.is_floating_point()


def _floats(y: Any) -> list[torch.Tensor]:
    return [part for part in _pytree.tree_leaves(y) if _is_float(part)]


class _KeptGradient:
    """A sink that keeps a sample's whole plain gradient."""

    def __init__(self, device: torch.device, shapes: dict[str, torch.Size]) -> None:
        self.device, self.corrector, self._shapes = device, Corrector(), shapes
        self.kept: Gradient = {}

    def new(self) -> torch.Tensor:
        """Return an accumulator without use."""
        return torch.zeros(1, device=self.device)

    def add(self, name: str, gradient_SN: torch.Tensor, out: torch.Tensor) -> None:  # noqa: ARG002
        """Keep a parameter's gradient, (1, P)."""
        self.kept[name] = gradient_SN.view(self._shapes[name]).float()

    def finish(self, out: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Return the norm, (1, 1)."""
        return torch.tensor([[dot(self.kept, self.kept) ** 0.5]])


def dot(left: Gradient, right: Gradient) -> float:
    """Return the dot product of two gradients, summed in float64."""
    total = 0.0
    wide = torch.float32 if any(value.device.type == "mps" for value in left.values()) else torch.float64
    for name in left.keys() & right:
        stretches = zip(*(torch.split(side[name].flatten(), _STRETCH) for side in (left, right)), strict=True)
        total += sum(float(torch.dot(a.to(wide), b.to(wide))) for a, b in stretches)
    return total


def check_sum(division: Division, product: float, scale: float) -> None:
    """Check that a division sums to a product; `scale` is the product of the two norms.

    Raises
    ------
    UnknownLayerError
        A parameter is used outside its layer.
    """
    for parts in (division.by_position, division.by_target):
        total = float(parts.sum())
        if not abs(total - product) <= _TOLERANCE * scale:
            raise UnknownLayerError(
                f"the tokens' parts sum to {total / scale:.4f} instead of {product / scale:.4f}: "
                "a parameter is used outside its layer"
            )
