"""Exact gradients, and sketchers which keep them."""

from __future__ import annotations

import copy

import torch
import transformers as hf

from lark_store.gradients.paths.batched import BatchPath
from lark_store.gradients.paths.hooks import HookPath, Sketch, choose_parameters
from lark_store.gradients.sketch.accumulate import GradientSketcher
from lark_store.gradients.sketch.oporp import Oporp
from lark_store.gradients.sketch.placement import place
from lark_store.modeling.tokens import Tokens

CPU = torch.device("cpu")


def random_tokens(seed: int, n: int = 24, rule: str = "text", vocab: int = 300) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab, (n,), generator=generator).tolist()
    targets = [rule != "response" and i > 0 for i in range(n)]
    if rule == "response":
        targets[-2:] = [True, True]
    return Tokens(ids, targets, rule)


def exact_gradient(model: torch.nn.Module, tokens: Tokens) -> dict[str, torch.Tensor]:
    """Plain autograd of the loss as it is defined, with nothing of the code under test."""
    model.requires_grad_(True)
    model.zero_grad()
    ids = torch.tensor([tokens.input_ids])
    logits = model(input_ids=ids).logits[0]
    losses = []
    for t, is_target in enumerate(tokens.is_target):
        if is_target:
            label = logits[t - 1].argmax() if tokens.rule == "predicted" else ids[0, t]
            losses.append(-logits[t - 1].log_softmax(dim=-1)[label])
    torch.stack(losses).mean().backward()
    gradient = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return gradient


def hook_path(model: torch.nn.Module, k: int, seed: int = 0, include: str | None = None) -> HookPath:
    chosen = choose_parameters(model, include, None)
    placements = place([(name, tuple(p.shape)) for name, p in chosen], k)
    return HookPath(model, chosen, GradientSketcher(Oporp(k, seed), placements, CPU))


def sketch_exact(gradient: dict[str, torch.Tensor], k: int, seed: int = 0) -> torch.Tensor:
    placements = place([(n, tuple(g.shape)) for n, g in gradient.items()], k)
    return sketch_gradient(GradientSketcher(Oporp(k, seed), placements, CPU), gradient)


def sketch_gradient(sketcher: GradientSketcher, gradient: dict[str, torch.Tensor]) -> torch.Tensor:
    out = sketcher.new()
    for name, g in gradient.items():
        sketcher.add(name, g.reshape(1, -1), out)
    return sketcher.finish(out)[0]


def ragged_batch(rule: str) -> list[Tokens]:
    return [random_tokens(i, n=n, rule=rule) for i, n in enumerate((9, 24, 3, 17))]


class WholeGradients(GradientSketcher):
    """Keeps the full gradients of a path, unsketched."""

    def new(self, n=1):
        self.gradients = [
            {name: torch.zeros(p.numel, dtype=torch.float64) for name, p in self.placements.items()} for _ in range(n)
        ]
        return super().new(n)

    def add(self, name, gradient_SN, out, chunk=0):
        start, first = chunk * self.oporp.k, out.storage_offset() // self.oporp.k  # `out` may be of some samples only
        for mine, gradient in zip(self.gradients[first : first + out.shape[-2]], gradient_SN, strict=True):
            mine[name][start : start + len(gradient)] += gradient.double()
        super().add(name, gradient_SN, out, chunk)

    def add_rows(self, name, index_T, values_TH, out, s):
        self.gradients[s][name].view(-1, values_TH.shape[1]).index_add_(0, index_T, values_TH.double())
        super().add_rows(name, index_T, values_TH, out, s)


def sketch_cosines(ours: list[Sketch], theirs: list[Sketch]) -> list[float]:
    assert all(isinstance(sketch, Sketch) for sketch in [*ours, *theirs])
    pairs = zip(ours, theirs, strict=True)
    return [float(torch.nn.functional.cosine_similarity(a.vector, b.vector, dim=0)) for a, b in pairs]


def exact_gradient64(model, tokens):
    """Return the gradient in float64; experts are multiplied in float32 alone."""
    wide = isinstance(model, hf.MixtralForCausalLM)
    return exact_gradient(copy.deepcopy(model) if wide else copy.deepcopy(model).double(), tokens)


def mean_squared_gradient(model, samples):
    """Return V: the mean of the squared gradient, whole and in float64."""
    squares = [{name: g.double() ** 2 for name, g in exact_gradient64(model, tokens).items()} for tokens in samples]
    return {name: sum(square[name] for square in squares) / len(samples) for name in squares[0]}


def whole_gradients(path, keeper, samples):
    """Sketch samples, and return their whole corrected gradients."""
    if isinstance(path, BatchPath):
        assert all(isinstance(sketch, Sketch) for sketch in path.sketch(samples))
        return keeper.gradients
    results = []
    for tokens in samples:
        keeper.gradients = [{name: torch.zeros(p.numel, dtype=torch.float64) for name, p in keeper.placements.items()}]
        assert isinstance(path.sketch([tokens])[0], Sketch)
        results += keeper.gradients
    return results


def assert_gradients_close(actual, expected):
    """Compare gradients, each parameter to its own scale."""
    for gradients, exact in zip(actual, expected, strict=True):
        assert gradients.keys() == exact.keys()
        for name, gradient in exact.items():
            scale = float(gradient.abs().max())
            torch.testing.assert_close(
                gradients[name].view_as(gradient), gradient.double(), rtol=1e-4, atol=2e-5 * scale, msg=name
            )


def masked_gradient_by_hand(model, tokens):
    """Zero the output gradient of each layer at the masked positions, and form the weights' gradients from it."""
    model = copy.deepcopy(model).double()
    model.requires_grad_(True)
    seen = []
    keep = torch.tensor(tokens.is_content)

    def remember(layer, given, out):
        out.retain_grad()
        seen.append((layer, given[0].detach(), out))

    layers = [m for m in model.modules() if list(m.parameters(recurse=False))]
    hooks = [layer.register_forward_hook(remember) for layer in layers]
    logits = model(input_ids=torch.tensor([tokens.input_ids])).logits[0]
    losses = [
        -logits[t - 1].log_softmax(dim=-1)[tokens.input_ids[t]]
        for t, is_target in enumerate(tokens.is_target)
        if is_target
    ]
    torch.stack(losses).mean().backward()
    for hook in hooks:
        hook.remove()
    names = {id(p): name for name, p in model.named_parameters()}
    results = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for layer, x, out in seen:
        delta = out.grad[0] * keep[:, None]
        if isinstance(layer, torch.nn.Linear):
            results[names[id(layer.weight)]] += delta.T @ x[0]
            if layer.bias is not None:
                results[names[id(layer.bias)]] += delta.sum(dim=0)
        elif isinstance(layer, torch.nn.Embedding):
            results[names[id(layer.weight)]].index_add_(0, x[0], delta)
        else:
            normed = x[0] * (x[0].square().mean(dim=-1, keepdim=True) + layer.variance_epsilon).rsqrt()
            results[names[id(layer.weight)]] += (delta * normed).sum(dim=0)
    return {name: item.detach() for name, item in results.items()}
