"""Several samples in one backward: each layer's part of every sample's gradient is sketched as soon as it is known.

A layer's weight gradient for sample b is a function of the layer's input x_b and output gradient δ_b alone (for a
linear layer δ_bᵀ x_b), so no parameter needs a gradient of its own: the graph is tapped at each layer's output.

Shape letters: B samples, T tokens, K bins.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lark_store.errors import CheckpointError
from lark_store.ingest.gradients import (
    FAULTS,
    HookPath,
    Sketch,
    check_tokens,
    failure,
    finish,
    is_device_lost,
    is_out_of_memory,
)
from lark_store.ingest.layers import Capture, rule_for
from lark_store.ingest.losses import Batch, sample_losses
from lark_store.ingest.masked import MaskedHookPath
from lark_store.ingest.variants import Tokens, UnusableSampleError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lark_store.ingest.gradients import Chosen, SketchPath
    from lark_store.ingest.layers import Rule
    from lark_store.ingest.oporp import GradientSketcher

    Taker = Callable[[torch.Tensor, torch.Tensor], None]

# Cosine of the batched sketch and the hooks' below which the batched path is not trusted: half precision, float32.
_SAME = (0.999, 0.9999)


class UnknownLayerError(Exception):
    """The batched path can't do this model; the message says why."""


class Tap(torch.autograd.Function):
    """Passes a layer's output on and, on the way back, hands its gradient and the layer's input to a taker."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, x: torch.Tensor, _anchor: torch.Tensor, take: Taker) -> torch.Tensor:
        """Return y; the anchor, which needs a gradient, makes sure that there will be a way back."""
        ctx.save_for_backward(x)
        ctx.take = take
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, delta: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        """Hand x and y's gradient over."""
        ctx.take(ctx.saved_tensors[0], delta)
        return (delta if ctx.needs_input_grad[0] else None), None, None, None


class BatchPath:
    """Sketches several samples in one backward; `masked`: at the positions of their content.

    What is masked is left out of a layer's input and output gradient before they are multiplied, and what corrects the
    gradient is applied to them.

    Raises
    ------
    UnknownLayerError
        A parameter to sketch belongs to a layer that no rule knows, or the correction takes its gradient whole.
    """

    def __init__(
        self,
        model: Any,
        chosen: Chosen,
        sketcher: GradientSketcher,
        *,
        pad_left: bool = False,
        masked: bool = False,
    ) -> None:
        if sketcher.corrector.whole_only:
            raise UnknownLayerError(sketcher.corrector.whole_only)
        self.model, self.sketcher, self.pad_left, self.masked = model, sketcher, pad_left, masked
        self.largest: int | None = None  # until memory runs out
        self.met: set[str] = set()  # the parameters that had a gradient so far
        self.trusted = False  # once compared with the hooks: a layer met in another shape then fails its sample alone
        self._batch: Batch | None = None
        self._out = sketcher.new()
        self._anchor = torch.zeros((), device=sketcher.device, requires_grad=True)
        layers = _layers(model, chosen)
        model.requires_grad_(False)
        self._hooks = [
            layer.register_forward_hook(self._tap(name, rule, names), with_kwargs=True)
            for name, (layer, rule, names) in layers.items()
        ]

    def close(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()

    def _tap(self, name: str, rule: Rule, names: dict[str, str]) -> Callable[..., Any]:
        def on_forward(layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> Any:
            batch = self._batch
            if batch is None or not torch.is_grad_enabled():
                return None
            given = [*args, *kwargs.values()]
            if len(given) != 1 or not isinstance(y, torch.Tensor):
                raise UnknownLayerError(f"layer `{name}` takes {len(given)} inputs")

            def take(x: torch.Tensor, delta: torch.Tensor) -> None:
                self.met.update(names.values())
                capture = Capture(layer, self._cut(name, x, batch), self._cut(name, delta, batch))
                with torch.no_grad():
                    rule(capture, names, self.sketcher, self._out)

            start = y.detach() if y.is_leaf else y  # where the graph starts, transformers may have asked for gradients
            return Tap.apply(start, given[0].detach(), self._anchor, take)  # type: ignore[no-untyped-call]

        return on_forward

    def _cut(self, name: str, values: torch.Tensor, batch: Batch) -> list[torch.Tensor]:
        """Cut a layer's input or output gradient into samples, of each its content alone where that is asked for."""
        of, parts = _per_sample(name, values, batch)
        if not self.masked:
            return parts
        if of is None:
            raise UnknownLayerError(f"the positions of layer `{name}` can't be told, to mask the template")
        rows = batch.content_targets if of == "targets" else batch.content
        return [part[kept] for part, kept in zip(parts, rows, strict=True)]

    def sketch(self, samples: Sequence[Tokens]) -> list[Sketch | UnusableSampleError]:
        """Return one sketch per sample, or the reason why there is none; a batch that fails is tried in halves."""
        made: dict[int, Sketch | UnusableSampleError] = {}
        for i, tokens in enumerate(samples):
            try:
                check_tokens(self.model, tokens)
            except UnusableSampleError as error:
                made[i] = error
        usable = [i for i in range(len(samples)) if i not in made]
        if usable:
            made |= zip(usable, self._halving([samples[i] for i in usable]), strict=True)
        return [made[i] for i in range(len(samples))]

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


def _layers(model: torch.nn.Module, chosen: Chosen) -> dict[str, tuple[torch.nn.Module, Rule, dict[str, str]]]:
    """Return the layers that hold the chosen parameters, each with its rule; a tied weight is held by several."""
    wanted = {id(parameter): name for name, parameter in chosen}
    found = {}
    for path, layer in model.named_modules():
        mine = layer.named_parameters(recurse=False, remove_duplicate=False)
        names = {own: wanted[id(parameter)] for own, parameter in mine if id(parameter) in wanted}
        if not names:
            continue
        rule = rule_for(layer)
        if rule is None:
            raise UnknownLayerError(f"`{next(iter(names.values()))}` is in a layer of kind {type(layer).__name__}")
        found[path] = (layer, rule, names)
    return found


def _per_sample(name: str, values: torch.Tensor, batch: Batch) -> tuple[str | None, list[torch.Tensor]]:
    """Cut a layer's input or output gradient into samples: from (1, N, …), (B, T, …), (B·T, …) or (B, …, T, …).

    Padding is cut off where it is at hand, to save work: the gradient there is zero. Also returns what a part's first
    dimension is: `targets`, `tokens` or not known.
    """
    n = len(batch.samples)
    if values.shape[:2] == (1, sum(batch.n_targets)):
        return "targets", list(torch.split(values[0], batch.n_targets))
    if values.shape[0] == n * batch.width:
        values = torch.unflatten(values, 0, (n, batch.width))
    if values.dim() <= 3 and values.shape[:2] == (n, batch.width):  # of 4 dimensions the second may be heads
        return "tokens", [values[b, batch.span(b)] for b in range(n)]
    if values.shape[0] != n:
        raise UnknownLayerError(f"layer `{name}` mixes samples: it is given {tuple(values.shape)}")
    return None, list(values)


def hook_path(model: Any, chosen: Chosen, sketcher: GradientSketcher, *, masked: bool) -> HookPath:
    """Return the path that takes one sample at a time; `masked`: at the positions of its content."""
    return (MaskedHookPath if masked else HookPath)(model, chosen, sketcher)


def make_path(
    model: Any, chosen: Chosen, sketcher: GradientSketcher, *, masked: bool = False
) -> tuple[SketchPath, str | None]:
    """Return the batched path if it knows every layer and agrees with autograd, else the hooks and the reason why.

    Two short made-up samples of different lengths are sketched in one batch and by the hooks; a parameter that is used
    outside its layer, or a model that mixes the samples of a batch, shows there.

    Raises
    ------
    CheckpointError
        Masked, and the hooks can't tell the positions of a layer, or do not see all of a parameter's gradient.
    """
    try:
        path = BatchPath(model, chosen, sketcher, masked=masked)
    except UnknownLayerError as error:
        reason: str | None = str(error)
    else:
        reason = _disagreement(path, model, chosen, sketcher)
        if reason is None:
            return path, None
        path.close()
    hooks = hook_path(model, chosen, sketcher, masked=masked)
    wrong = _compared(hooks, lambda: HookPath(model, chosen, sketcher), _made_up(model)) if masked else None
    if wrong:
        hooks.close()
        raise CheckpointError(
            f"the template can't be masked in this model: {wrong}", "use a sketcher without `--mask-template`"
        )
    return hooks, reason


def _made_up(model: Any, *, masked: bool = False) -> list[Tokens]:
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


def _disagreement(path: BatchPath, model: Any, chosen: Chosen, sketcher: GradientSketcher) -> str | None:
    """Say what parts the batched path from autograd's own parameter gradients, None if nothing does.

    A masked one is compared where nothing is masked, then with the hooks that mask.
    """
    reason = _compared(path, lambda: HookPath(model, chosen, sketcher), _made_up(model))
    if reason is None and path.masked:
        made_up = _made_up(model, masked=True)
        reason = _compared(path, lambda: MaskedHookPath(model, chosen, sketcher), made_up)
    return reason


def _compared(path: BatchPath | HookPath, reference: Callable[[], HookPath], samples: list[Tokens]) -> str | None:
    """Say what parts a path from the hooks that `reference` makes, None if nothing does."""
    try:
        made = path.sketch(samples)
    except UnknownLayerError as error:
        return str(error)
    if isinstance(path, BatchPath):
        path.largest, path.trusted = None, True
    hooks = reference()
    expected = hooks.sketch(samples)
    hooks.close()
    least = _SAME[next(hooks.model.parameters()).dtype == torch.float32]
    for ours, theirs in zip(made, expected, strict=True):
        if isinstance(theirs, Sketch):
            if not isinstance(ours, Sketch):
                return f"{ours}" if isinstance(path, HookPath) else f"it fails in a batch and not alone: {ours}"
            cosine = float(torch.nn.functional.cosine_similarity(ours.vector, theirs.vector, dim=0))
            if cosine < least or abs(ours.grad_norm / theirs.grad_norm - 1) > 50 * (1 - least):
                return f"its layers' gradients do not make up the model's (cosine {cosine:.4f})"
    unseen = sorted(hooks.met - path.met)
    return f"`{unseen[0]}` is used outside its layer" if unseen else None
