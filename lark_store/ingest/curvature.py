"""The model's curvature: gradients multiplied by a power of (G + λ)⁻¹, G the Gauss–Newton matrix of the loss.

Influence functions ask how a query's loss changes when a sample is left out of training: g_qᵀ (G + λ)⁻¹ g_z. A layer's
weight gradient is a sum over positions of output gradients and inputs, Σ_t δ_t x_tᵀ, and K-FAC (Martens & Grosse 2015,
arXiv:1503.05671) takes the two for independent:

    G ≈ A ⊗ S        A = E_t[x xᵀ], a mean over positions        S = E_z[Σ_t δ δᵀ], a mean over samples

EK-FAC (George et al. 2018, arXiv:1806.03884) keeps the eigenvectors Q_A and Q_S and measures what G has along them,

    Λ = E_z[(Q_Sᵀ (Σ_t δ_t x_tᵀ) Q_A)²]

The loss is what each sample's gradient is of: the mean over its targets. Its Gauss–Newton matrix is the Fisher matrix
of labels that the model draws itself, and 1/N² of N independent labels add up to 1/N of it; so δ is the gradient of
Σ_n ℓ_n / √N. G is the mean over samples.

**Damping** is one λ for all layers that are sketched: `damping` times the mean of G's diagonal over all of them. So a
huge one makes a multiple of the plain gradient. EK-FAC adds it to Λ. K-FAC shares it out (factored Tikhonov damping),

    (A + π √λ I) ⊗ (S + √λ / π I)        π² = mean eigenvalue of A / mean eigenvalue of S

**The power** p is of the inverse. With 1/2 on both sides the dot product of two sketches is g_qᵀ (G + λ)⁻¹ g_z. With 1
each gradient gets its own whole inverse, for samples and queries at different checkpoints, each with its own G:
g_qᵀ (G_q + λ_q)⁻¹ (G_z + λ_z)⁻¹ g_z, the influence over two stages of training. All are in the parameters' own
coordinates, so that what two checkpoints made can be multiplied.

Where heads are merged into one projection, S (of queries, keys and values) or A (of the attention's output) has a block
for each head alone. Weights of linear layers are corrected; biases, norms, embeddings and the output head are left out.

Shape letters: L and R rows and columns of a weight, J blocks of a side, T positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lark_store.errors import InputError
from lark_store.ingest.corrections import (
    CURVATURES,
    DEFAULT_DAMPING,
    EKFAC,
    POWERS,
    Corrector,
    Moments,
    corrector_of,
)
from lark_store.ingest.gradients import choose_parameters

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lark_store.ingest.gradients import Chosen
    from lark_store.ingest.oporp import Placement

DEFAULT_POWER = 0.5
# Projections by the names that transformers gives them, within a module whose class is an attention's: those that make
# each head's queries, keys and values, and those that take what the heads made. In each, heads follow one another.
_INTO_HEADS = {"q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn", "Wqkv"}
_FROM_HEADS = {"o_proj", "out_proj", "c_proj", "dense"}


# --- which layers --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Linear:
    """A linear layer whose weight, (L, R), is corrected: its `inputs` are the weight's rows or columns.

    `blocks` has how many blocks, all of one size, each side's second moments are cut into.
    """

    name: str
    layer: Any
    inputs: str
    blocks: dict[str, int]


def linears_of(model: Any) -> list[Linear]:
    """Return the linear layers of a model's blocks: all but the output head and what is tied to an embedding."""
    names = {id(p): name for name, p in model.named_parameters()}
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    found = []
    for path, layer in model.named_modules():
        of_conv1d = type(layer).forward is Conv1D.forward
        if not (of_conv1d or type(layer).forward is nn.Linear.forward):
            continue
        if layer is model.get_output_embeddings() or id(layer.weight) in embedded:
            continue
        inputs, outputs = ("rows", "columns") if of_conv1d else ("columns", "rows")
        n_in, n_out = _heads(model, path, layer.weight.shape, inputs)
        found.append(Linear(names[id(layer.weight)], layer, inputs, {inputs: n_in, outputs: n_out}))
    return found


def fitted_linears(model: Any) -> list[Linear]:
    """Return the linear layers that factors are fitted for: of a model with adapters, the adapters' own.

    Raises
    ------
    InputError
        There is none.
    """
    names = {name for name, _ in linear_weights(model, choose_parameters(model, None, None))}
    return [linear for linear in linears_of(model) if linear.name in names]


def _heads(model: Any, path: str, shape: torch.Size, inputs: str) -> tuple[int, int]:
    """Return the blocks of a layer's inputs and outputs: one a head where it is an attention's projection."""
    above, _, own = path.rpartition(".")
    around = model.get_submodule(above)
    if "attention" not in type(around).__name__.lower():
        return 1, 1
    n_in, n_out = (shape[0], shape[1]) if inputs == "rows" else (shape[1], shape[0])
    size = _head_size(around, model.config)
    if own in _INTO_HEADS and n_out % size == 0:
        return 1, n_out // size
    if own in _FROM_HEADS and n_in % size == 0:
        return n_in // size, 1
    return 1, 1


def _head_size(attention: nn.Module, config: Any) -> int:
    for holder in (attention, config):
        for name in ("head_dim", "head_size"):
            size = getattr(holder, name, None)
            if isinstance(size, int) and size > 0:
                return size
    return int(config.hidden_size // config.num_attention_heads)


def linear_weights(model: Any, chosen: Chosen) -> Chosen:
    """Return those of the chosen parameters that a curvature can correct.

    Raises
    ------
    InputError
        There is none.
    """
    names = {linear.name for linear in linears_of(model)}
    found = [(name, p) for name, p in chosen if name in names]
    if not found:
        raise InputError(
            f"none of the {len(chosen)} parameters chosen is the weight of a linear layer in the model's blocks",
            "`kfac` and `ekfac` correct those alone; `adam` corrects any parameter",
        )
    return found


# --- the factors ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kronecker:
    """A layer's curvature: `rows` (J, L/J, L/J) and `columns` (J, R/J, R/J) by the sides of its weight, in blocks.

    They are second moments (K-FAC), or with `values` Λ (L, R) their eigenvectors, one a column (EK-FAC).
    """

    rows: torch.Tensor
    columns: torch.Tensor
    values: torch.Tensor | None = None

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Tell whether they are those of a weight of this shape."""
        sides = (self.rows, self.columns)
        square = all(side.dim() == 3 and side.shape[1] == side.shape[2] for side in sides)
        whole = square and tuple(side.shape[0] * side.shape[1] for side in sides) == shape
        return whole and (self.values is None or tuple(self.values.shape) == shape)

    def diagonal(self) -> float:
        """Return the sum of G's diagonal."""
        if self.values is not None:
            return float(self.values.sum(dtype=torch.float64))
        return _trace(self.rows) * _trace(self.columns)

    @property
    def numel(self) -> int:
        """L·R."""
        return int(self.rows.shape[0] * self.rows.shape[1] * self.columns.shape[0] * self.columns.shape[1])


def _trace(blocks: torch.Tensor) -> float:
    return float(blocks.diagonal(dim1=1, dim2=2).sum(dtype=torch.float64))


def damping_of(factors: Mapping[str, Kronecker], damping: float) -> float:
    """Return λ: `damping` times the mean of G's diagonal over all layers; times 1 where that is 0."""
    n = sum(each.numel for each in factors.values())
    return damping * (sum(each.diagonal() for each in factors.values()) / max(1, n) or 1.0)


def eigen(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the eigenvalues (J, N), not below 0, and eigenvectors (J, N, N) of symmetric blocks, in float64.

    On the CPU, unless they are on CUDA.
    """
    wide = (blocks if blocks.is_cuda else blocks.cpu()).double()
    values, vectors = torch.linalg.eigh(wide)
    return values.clamp(min=0), vectors


def inverse_power(blocks: torch.Tensor, ridge: float, power: float) -> torch.Tensor:
    """Return (blocks + ridge)^(−power), symmetric, in the blocks' own type."""
    values, vectors = eigen(blocks)
    return ((vectors * (values + ridge).pow(-power)[:, None]) @ vectors.mT).to(blocks.dtype)


def by_blocks(values_TX: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """Return values (T, X) times a block-diagonal matrix of blocks (J, X/J, X/J), at least in float32."""
    wide = values_TX if values_TX.dtype in (torch.float32, torch.float64) else values_TX.float()
    blocks = blocks.to(wide.dtype)
    if len(blocks) == 1:
        return wide @ blocks[0]
    parts = torch.unflatten(wide, 1, (len(blocks), -1)).transpose(0, 1)
    return torch.bmm(parts, blocks).transpose(0, 1).flatten(1)


# --- correctors ----------------------------------------------------------------------------------------------------


class KfacCorrector(Corrector):
    """Multiplies a weight's gradient from both sides: its factors, before they are multiplied, or the whole of it."""

    def __init__(self, roots: Mapping[str, Kronecker]) -> None:
        super().__init__()
        self.roots = roots

    def whole(self, name: str, gradient: torch.Tensor) -> torch.Tensor:
        """Return a weight's whole gradient, of one sample."""
        right = by_blocks(gradient, self.roots[name].columns)
        return by_blocks(right.T, self.roots[name].rows).T.contiguous()

    def left(self, name: str, left_TL: torch.Tensor) -> torch.Tensor:
        """Return what takes the place of the left factor."""
        return _narrowed(by_blocks(left_TL, self.roots[name].rows), left_TL)

    def right(self, name: str, right_TR: torch.Tensor) -> torch.Tensor:
        """Return what takes the place of the right factor."""
        return _narrowed(by_blocks(right_TR, self.roots[name].columns), right_TR)


class EkfacCorrector(Corrector):
    """Rotates a weight's gradient into the eigenvectors, scales it there whole, and rotates it back.

    Going there, the factors of the gradient can be rotated before they are multiplied. Coming back costs L·R·(L + R)
    multiplications for each sample and weight, with heads of size l L·R·(l + R): more than the gradient itself.
    """

    by_product = True

    def __init__(self, bases: Mapping[str, Kronecker]) -> None:
        """Take eigenvectors, and as `values` what to multiply by along them."""
        super().__init__()
        self.bases = bases

    def whole(self, name: str, gradient: torch.Tensor) -> torch.Tensor:
        """Return a weight's whole gradient, of one sample."""
        base = self.bases[name]
        return _scaled_along(by_blocks(by_blocks(gradient, base.columns).T, base.rows).T, base)

    def product(self, name: str, left_TL: torch.Tensor, right_TR: torch.Tensor) -> torch.Tensor:
        """Return a weight's whole gradient leftᵀ · right, (L, R), corrected."""
        base = self.bases[name]
        return _scaled_along(by_blocks(left_TL, base.rows).T @ by_blocks(right_TR, base.columns), base)


def _scaled_along(along_LR: torch.Tensor, base: Kronecker) -> torch.Tensor:
    """Return Q_L (s ⊙ along) Q_Rᵀ."""
    assert base.values is not None
    right = by_blocks(along_LR * base.values.to(along_LR.dtype), base.columns.mT)
    return by_blocks(right.T, base.rows.mT).T.contiguous()


def _narrowed(wide: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return values in bfloat16 where they came so; float16 might not hold them."""
    return wide.to(torch.bfloat16) if like.dtype == torch.bfloat16 else wide


def curvature_corrector(
    factors: Mapping[str, Kronecker], damping: float, power: float, device: torch.device
) -> Corrector:
    """Return the corrector (G + λ)^(−power) of K-FAC's or EK-FAC's factors of all that is sketched."""
    total, made = damping_of(factors, damping), {}
    exact = True
    for name, each in factors.items():
        if each.values is not None:
            scale = (each.values + total).pow(-power)
            made[name] = Kronecker(each.rows.to(device), each.columns.to(device), scale.to(device))
            continue
        exact = False
        row_ridge, column_ridge = _shared_out(each, total)
        rows = inverse_power(each.rows.to(device), row_ridge, power)
        columns = inverse_power(each.columns.to(device), column_ridge, power)
        made[name] = Kronecker(rows.to(device), columns.to(device))
    return EkfacCorrector(made) if exact else KfacCorrector(made)


def _shared_out(factors: Kronecker, total: float) -> tuple[float, float]:
    """Return what rows and columns are damped by: λ as a product, in the ratio of their mean eigenvalues."""
    means = [_trace(side) / (side.shape[0] * side.shape[1]) for side in (factors.rows, factors.columns)]
    ratio = (means[0] / means[1]) ** 0.5 if min(means) > 0 else 1.0
    return total**0.5 * ratio, total**0.5 / ratio


def stand_in(kind: str, placements: list[Placement], device: torch.device, model: Any) -> Corrector:
    """Return a corrector that costs what one of this kind does, to measure time and memory before there are factors."""
    if kind in POWERS:
        moments = {p.name: Moments.of(torch.ones(p.shape)) for p in placements}
        return corrector_of(moments, kind, DEFAULT_DAMPING, device)
    if kind not in CURVATURES:
        return Corrector(norm_1=kind == "tensor")
    blocks = {linear.name: linear.blocks for linear in linears_of(model)}
    made = {}
    for p in placements:
        rows, columns = (
            torch.eye(size // blocks[p.name][side], device=device).repeat(blocks[p.name][side], 1, 1)
            for side, size in zip(("rows", "columns"), p.shape, strict=True)
        )
        made[p.name] = Kronecker(rows, columns, torch.ones(p.shape, device=device) if kind == EKFAC else None)
    return EkfacCorrector(made) if kind == EKFAC else KfacCorrector(made)
