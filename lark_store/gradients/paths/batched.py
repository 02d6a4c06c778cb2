"""Per-sample sketches of a batch in one backward pass, layer by layer.

A layer's weight gradient for sample b depends only on the layer's input x_b and output gradient δ_b (for a linear
layer, δ_bᵀ x_b). So parameters need no gradients: hooks tap the graph at each layer's output.

Shape letters: B samples, T tokens, K bins.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from lark_store.errors import CheckpointError
from lark_store.gradients.paths.hooks import (
    FAULTS,
    HookPath,
    Sketch,
    check_tokens,
    failure,
    finish,
    is_device_lost,
    is_out_of_memory,
)
from lark_store.gradients.paths.layers import rule_for
from lark_store.gradients.paths.masked import MaskedHookPath
from lark_store.gradients.paths.taps import UnknownLayerError
from lark_store.modeling.auto_models import text_config
from lark_store.modeling.encoded import UnusableSampleError
from lark_store.modeling.losses import Batch, sample_losses
from lark_store.modeling.tokens import Tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lark_store.gradients.paths.hooks import NamedParameters, SketchPath
    from lark_store.gradients.paths.taps import Add, Names, Rule
    from lark_store.gradients.sketch.accumulate import GradientSketcher

# Minimum cosine between sketches of the batched path and the hooks: half precision, float32.
_MIN_COSINE = (0.999, 0.9999)


class BatchPath:
    """Sketches several samples in one backward pass; `masked`: only at content positions.

    Masking and correction apply to a layer's input and output gradient, before they are multiplied.

    Raises
    ------
    UnknownLayerError
        No rule supports the layer of a parameter, or the correction needs whole gradients.
    """

    def __init__(
        self,
        model: Any,
        parameters: NamedParameters,
        sketcher: GradientSketcher,
        *,
        pad_left: bool = False,
        masked: bool = False,
    ) -> None:
        if sketcher.corrector.whole_only:
            raise UnknownLayerError(sketcher.corrector.whole_only)
        self.model, self.sketcher, self.pad_left, self.masked = model, sketcher, pad_left, masked
        self.largest: int | None = None  # set when memory runs out
        self.seen: set[str] = set()  # parameters with a gradient so far
        self.trusted = False  # True once compared with the hooks: an unknown shape then only fails its sample
        self._batch: Batch | None = None
        self._out = sketcher.new()
        self.anchor = torch.zeros((), device=sketcher.device, requires_grad=True)
        layers, unused = sketched_layers(model, parameters)
        model.requires_grad_(False)
        self._attached: list[Callable[[], None]] = [
            layer.register_forward_pre_hook(self._refuse(reason)).remove for layer, reason in unused
        ]
        try:
            for name, (layer, rule, names) in layers.items():
                self._attached.append(rule(layer, _LayerPort(self, name, names)))
        except UnknownLayerError:
            self.close()
            raise

    def close(self) -> None:
        """Release the layers."""
        for remove in self._attached:
            remove()

    def is_active(self) -> bool:
        """Tell whether gradients of a batch are being taken."""
        return self._batch is not None and torch.is_grad_enabled()

    def _refuse(self, reason: str) -> Callable[..., None]:
        """Return a hook for a layer without a rule, which text must not reach."""

        def on_forward(*_: Any) -> None:
            if self.is_active():
                raise UnknownLayerError(reason)

        return on_forward

    def add(self, names: Names, add: Add) -> None:
        """Add a layer's gradients to the batch's sketches."""
        self.seen.update(names.values())
        with torch.no_grad():
            add(names, self.sketcher, self._out)

    def split(self, name: str, values: torch.Tensor) -> list[torch.Tensor]:
        """Split a layer's values into the batch's samples."""
        assert self._batch is not None
        return self._cut(name, values, self._batch)

    def _cut(self, name: str, values: torch.Tensor, batch: Batch) -> list[torch.Tensor]:
        """Split a layer's input or output gradient into samples; with `masked`, keep content positions only."""
        positions, parts = _per_sample(name, values, batch)
        if not self.masked:
            return parts
        if positions is None:
            raise UnknownLayerError(f"layer `{name}` has unknown token positions, so its template can't be masked")
        rows = batch.content_targets if positions == "targets" else batch.content
        return [part[indices] for part, indices in zip(parts, rows, strict=True)]

    def sketch(self, samples: Sequence[Tokens]) -> list[Sketch | UnusableSampleError]:
        """Return a sketch or an error per sample; a failed batch is retried in halves."""
        results: dict[int, Sketch | UnusableSampleError] = {}
        for i, tokens in enumerate(samples):
            try:
                check_tokens(self.model, tokens)
            except UnusableSampleError as error:
                results[i] = error
        usable = [i for i in range(len(samples)) if i not in results]
        if usable:
            results |= zip(usable, self._halving([samples[i] for i in usable]), strict=True)
        return [results[i] for i in range(len(samples))]

    def _halving(self, samples: Sequence[Tokens]) -> list[Sketch | UnusableSampleError]:
        batch = Batch(samples, self.sketcher.device, self.pad_left)
        try:
            return self._backward(batch)
        except (*FAULTS, UnknownLayerError) as error:
            if is_device_lost(error) or (isinstance(error, UnknownLayerError) and not self.trusted):
                raise
            reason, out_of_memory = failure(samples[0], error), is_out_of_memory(error)
        finally:
            self._batch = None
        if out_of_memory:
            self.largest = batch.width * len(samples) // 2
            if self.sketcher.device.type == "cuda":
                torch.cuda.empty_cache()
        if len(samples) == 1:
            return [reason]
        half = len(samples) // 2
        return self._halving(samples[:half]) + self._halving(samples[half:])

    def _backward(self, batch: Batch) -> list[Sketch | UnusableSampleError]:
        self._out = self.sketcher.new(len(batch.samples))
        self._batch = batch
        losses_B = sample_losses(self.model, batch)
        losses_B.sum().backward()  # type: ignore[no-untyped-call]
        sketches_BK = self.sketcher.finish(self._out)
        return [finish(raw, loss) for raw, loss in zip(sketches_BK, losses_B.tolist(), strict=True)]


class _LayerPort:
    """A `Port` of a batched path."""

    def __init__(self, path: BatchPath, name: str, names: Names) -> None:
        self.path, self.name, self.names = path, name, names
        self.by_product = path.sketcher.corrector.by_product
        self.anchor = path.anchor

    def is_active(self) -> bool:
        return self.path.is_active()

    def split(self, values: torch.Tensor) -> list[torch.Tensor]:
        return self.path.split(self.name, values)

    def take(self, add: Add) -> None:
        self.path.add(self.names, add)


def sketched_layers(
    model: torch.nn.Module, parameters: NamedParameters
) -> tuple[dict[str, tuple[torch.nn.Module, Rule, Names]], list[tuple[torch.nn.Module, str]]]:
    """Map the layers with parameters to sketch to their rules; a tied weight has several layers.

    Also return the layers without a rule that are outside the text model, such as in a vision tower, and the reason
    not to batch if they are used: text has no gradient there.
    """
    sketched = {id(parameter): name for name, parameter in parameters}
    layers, unused = {}, []
    text = _text_layers(model)
    for path, layer in model.named_modules():
        own_parameters = layer.named_parameters(recurse=False, remove_duplicate=False)
        names = {local: sketched[id(parameter)] for local, parameter in own_parameters if id(parameter) in sketched}
        if not names:
            continue
        rule = rule_for(layer)
        if rule is not None:
            layers[path] = (layer, rule, names)
            continue
        reason = f"`{next(iter(names.values()))}` is in a layer of kind {type(layer).__name__}"
        if text is None or layer in text:
            raise UnknownLayerError(reason)
        unused.append((layer, reason))
    return layers, unused


def _text_layers(model: Any) -> set[torch.nn.Module] | None:
    """Return the layers of a multimodal model's text model; None for a model of text alone."""
    if text_config(model) is model.config:
        return None
    parts = [model.get_decoder(), model.get_output_embeddings()]
    return {layer for part in parts if part is not None for layer in part.modules()}


def _per_sample(name: str, values: torch.Tensor, batch: Batch) -> tuple[str | None, list[torch.Tensor]]:
    """Split a layer's values into samples: from (1, N, …), (B, T, …), (B, 1, T, …), (B·T, …) or (B, …, T, …).

    Return the meaning of a part's first dimension (`targets`, `tokens` or None if unknown) and the parts. Padding,
    with zero gradient, is removed where its positions are known.
    """
    n = len(batch.samples)
    if values.dim() == 4 and values.shape[:3] == (n, 1, batch.width):  # one head, as DeepSeek's compressed keys
        values = values[:, 0]
    if values.shape[:2] == (1, sum(batch.n_targets)):
        return "targets", list(torch.split(values[0], batch.n_targets))
    if values.shape[0] == n * batch.width:
        values = torch.unflatten(values, 0, (n, batch.width))
    if values.dim() <= 3 and values.shape[:2] == (n, batch.width):  # with 4 dimensions, the second may be heads
        return "tokens", [values[b, batch.span(b)] for b in range(n)]
    if values.shape[0] != n:
        raise UnknownLayerError(f"layer `{name}` mixes samples: its tensors have shape {tuple(values.shape)}")
    return None, list(values)


def hook_path(model: Any, parameters: NamedParameters, sketcher: GradientSketcher, *, masked: bool) -> HookPath:
    """Return the path for one sample at a time; `masked`: only at content positions."""
    return (MaskedHookPath if masked else HookPath)(model, parameters, sketcher)


def make_path(
    model: Any, parameters: NamedParameters, sketcher: GradientSketcher, *, masked: bool = False
) -> tuple[SketchPath, str | None]:
    """Return the batched path if it supports all layers and agrees with autograd, else the hooks and the reason.

    The check sketches two short synthetic samples of different lengths both ways. It detects parameters used outside
    their layers and models that mix the samples of a batch.

    Raises
    ------
    CheckpointError
        Masking fails: a layer's token positions are unknown, or hooks miss part of a gradient.
    """
    try:
        path = BatchPath(model, parameters, sketcher, masked=masked)
    except UnknownLayerError as error:
        reason: str | None = str(error)
    else:
        reason = _disagreement(path, model, parameters, sketcher)
        if reason is None:
            return path, None
        path.close()
    hooks = hook_path(model, parameters, sketcher, masked=masked)
    reference = partial(HookPath, model, parameters, sketcher)
    difference = _difference(hooks, reference, _synthetic(model)) if masked else None
    if difference:
        hooks.close()
        raise CheckpointError(
            f"the template can't be masked in this model: {difference}", "use a sketcher without `--mask-template`"
        )
    return hooks, reason


def _synthetic(model: Any, *, masked: bool = False) -> list[Tokens]:
    vocabulary = len(model.get_input_embeddings().weight)
    return [
        Tokens(
            [(i * 7919 + n) % vocabulary for i in range(n)],
            [i > n // 3 for i in range(n)],
            "text",
            is_content=[i % 3 > 0 for i in range(n)] if masked else (),
        )
        for n in (5, 9)
    ]


def _disagreement(path: BatchPath, model: Any, parameters: NamedParameters, sketcher: GradientSketcher) -> str | None:
    """Describe how the batched path differs from autograd's parameter gradients; None if it agrees.

    A masked path is compared without masking first, then with the masking hooks.
    """
    reason = _difference(path, lambda: HookPath(model, parameters, sketcher), _synthetic(model))
    if reason is None and path.masked:
        samples = _synthetic(model, masked=True)
        reason = _difference(path, lambda: MaskedHookPath(model, parameters, sketcher), samples)
    return reason


def _difference(path: BatchPath | HookPath, reference: Callable[[], HookPath], samples: list[Tokens]) -> str | None:
    """Describe how a path differs from the hooks that `reference` builds; None if it agrees."""
    try:
        sketches = path.sketch(samples)
    except UnknownLayerError as error:
        return str(error)
    if isinstance(path, BatchPath):
        path.largest, path.trusted = None, True
    hooks = reference()
    expected = hooks.sketch(samples)
    hooks.close()
    min_cosine = _MIN_COSINE[next(hooks.model.parameters()).dtype == torch.float32]
    for sketch, reference_sketch in zip(sketches, expected, strict=True):
        if isinstance(reference_sketch, Sketch):
            if not isinstance(sketch, Sketch):
                return f"{sketch}" if isinstance(path, HookPath) else f"it fails in a batch but not alone: {sketch}"
            cosine = float(torch.nn.functional.cosine_similarity(sketch.vector, reference_sketch.vector, dim=0))
            if cosine < min_cosine or abs(sketch.grad_norm / reference_sketch.grad_norm - 1) > 50 * (1 - min_cosine):
                return f"the layers' gradients do not add up to the model's (cosine {cosine:.4f})"
    unseen = sorted(hooks.seen - path.seen)
    return f"`{unseen[0]}` is used outside its layer" if unseen else None
