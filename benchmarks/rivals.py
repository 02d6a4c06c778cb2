"""Baselines for per-sample gradients and their projections, timed on the same samples as lark-store.

- `plain_floor`: batched forward and backward only, the reference for all methods
- `rapidin`: one sample at a time, the full gradient in one vector, stored signs and permutation
- `trak`: one sample at a time, then `BasicProjector` of the package traker on a part of the gradient
- `bergson`: the package bergson, in its own environment, through bergson_build.py

README.md explains the installation, the methods and the limits of comparison. The model's parameters must have no
hooks: close a `HookPath` first.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lark_store.modeling.tokens import Tokens

IGNORED = -100
TRAK_BLOCK = 100  # matrix columns per block, the default of BasicProjector


@dataclass(frozen=True)
class Timed:
    """The seconds of a method by part, one figure per sample or batch.

    `samples` is the total number of samples, `n_parameters` the length of the gradient, `coordinates` the number of
    projected coordinates, `cpu_seconds` the CPU time of all parts, and `vectors` the projections (K,) float32 on the
    CPU, one per sample, if any.
    """

    way: str
    samples: int
    parts: dict[str, list[float]]
    cpu_seconds: float
    n_parameters: int
    coordinates: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    vectors: list[torch.Tensor] = field(default_factory=list)

    @property
    def per_sample(self) -> dict[str, float]:
        """Measured seconds per sample of each part."""
        return {part: sum(seconds) / self.samples for part, seconds in self.parts.items()}

    @property
    def per_coordinate(self) -> float:
        """Seconds to project one coordinate of one sample's gradient; 0 without a separate projection."""
        return self.per_sample["projection"] / self.coordinates if self.coordinates else 0.0

    @property
    def whole(self) -> float:
        """Seconds per sample for the full gradient; a partial projection is scaled up to its length."""
        rest = sum(seconds for part, seconds in self.per_sample.items() if part != "projection")
        return rest + self.per_coordinate * self.n_parameters


class Stopwatch:
    """Runs work on a device and records wall seconds by part and total CPU seconds."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.parts: dict[str, list[float]] = {}
        self.cpu_seconds = 0.0

    def run(self, part: str, work: Callable[..., Any], *arguments: Any) -> Any:
        """Do the work, wait for the device, and return the result."""
        self._wait()
        start, cpu = time.perf_counter(), time.process_time()
        result = work(*arguments)
        self._wait()
        self.parts.setdefault(part, []).append(time.perf_counter() - start)
        self.cpu_seconds += time.process_time() - cpu
        return result

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def pack(samples: Sequence[Tokens], n_tokens: int) -> list[list[Tokens]]:
    """Sort samples by length and cut them into batches of at most `n_tokens`, padding included, as bergson does."""
    batches: list[list[Tokens]] = []
    for tokens in sorted(samples, key=lambda s: len(s.input_ids), reverse=True):
        longest = len(batches[-1][0].input_ids) if batches else 0
        if batches and longest * (len(batches[-1]) + 1) <= n_tokens:
            batches[-1].append(tokens)
        else:
            batches.append([tokens])
    return batches


def plain_floor(model: Any, batches: Sequence[Sequence[Tokens]]) -> Timed:
    """Time forward and backward of right-padded batches, with unused gradients of all parameters.

    The first batch runs once as a warm-up.
    """
    device = _device(model)
    watch = Stopwatch(device)
    with _gradients_of_all(model):
        backward(model, batches[0])
        for batch in batches:
            watch.run("backward", backward, model, batch)
    sizes = [len(batch) for batch in batches]
    settings = {"batch_sizes": sizes} | _machine(device)
    return Timed("plain", sum(sizes), watch.parts, watch.cpu_seconds, _count(model), settings=settings)


def rapidin(model: Any, samples: Sequence[Tokens], k: int = 65_536, seed: int = 0) -> Timed:
    """Time OPORP with a stored permutation, one sample at a time, on the full gradient.

    Building the table and a warm-up on the first sample are not timed.
    """
    device = _device(model)
    d = _count(model)
    table = StoredOporp(d, k, seed, device)
    flat = torch.empty(d, device=device)

    def one(watch: Stopwatch, tokens: Tokens) -> torch.Tensor:
        watch.run("backward", backward, model, [tokens])
        watch.run("flatten", flatten, model, flat)
        vector: torch.Tensor = watch.run("projection", table.project, flat)
        return vector.cpu()

    watch = Stopwatch(device)
    with _gradients_of_all(model):
        one(Stopwatch(device), samples[0])
        vectors = [one(watch, tokens) for tokens in samples]
    settings = {"k": k, "seed": seed, "table_bytes": table.n_bytes} | _machine(device)
    return Timed("rapidin", len(samples), watch.parts, watch.cpu_seconds, d, d, settings, vectors)


def trak(
    model: Any,
    samples: Sequence[Tokens],
    *,
    proj_dim: int = 2048,
    coordinates: int = 100_000,
    batch_size: int = 1,
    seed: int = 0,
) -> Timed:
    """Time TRAK's BasicProjector on the first `coordinates` of each gradient; its matrix takes 400 bytes for each.

    It redraws the matrix for every batch, so a batch's samples share part of the cost. As in TRAKer, the entries are
    normal on the CPU and signs on a GPU. The first sample runs once as a warm-up.
    """
    from trak.projectors import BasicProjector

    device = _device(model)
    d = _count(model)
    n = min(coordinates, d)
    kind = "normal" if device.type == "cpu" else "rademacher"
    projector = BasicProjector(n, proj_dim, seed, kind, device, block_size=TRAK_BLOCK)
    rows = torch.zeros(batch_size, n, device=device)
    flat = torch.empty(d, device=device)
    watch = Stopwatch(device)
    vectors: list[torch.Tensor] = []
    with _gradients_of_all(model):
        backward(model, [samples[0]])
        projector.project(flatten(model, flat)[None, :n], model_id=0)
        for start in range(0, len(samples), batch_size):
            batch = samples[start : start + batch_size]
            for row, tokens in enumerate(batch):
                watch.run("backward", backward, model, [tokens])
                watch.run("flatten", flatten, model, flat)
                rows[row] = flat[:n]
            vectors += list(watch.run("projection", projector.project, rows[: len(batch)], 0).cpu())
    settings: dict[str, Any] = {"proj_dim": proj_dim, "proj_type": kind, "batch_size": batch_size, "seed": seed}
    settings["whole_matrix_block_bytes"] = d * projector.block_size * 4
    settings |= _machine(device)
    return Timed("trak", len(samples), watch.parts, watch.cpu_seconds, d, n, settings, vectors)


def bergson(
    python: Path, model_folder: Path, samples: Sequence[Tokens], *, projection_dim: int = 16, n_tokens: int = 2048
) -> Timed:
    """Time bergson's gradient building on the same tokens, in the environment of the interpreter `python`.

    Loads the saved model there in float32, on a GPU if available. `n_tokens`, the size of a padded batch, must not
    exceed the model's context length.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = write_samples(samples, Path(folder) / "samples.jsonl")
        script = Path(__file__).with_name("bergson_build.py")
        options = [f"--projection-dim={projection_dim}", f"--token-batch-size={n_tokens}"]
        command = [str(python), str(script), str(model_folder), str(path), *options]
        ran = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603 - our own script
    figures = json.loads(ran.stdout)
    parts = {"build": [figures["seconds"]]}
    return Timed(
        "bergson", figures["samples"], parts, figures["cpu_seconds"], figures["n_parameters"], settings=figures
    )


def write_samples(samples: Sequence[Tokens], path: Path) -> Path:
    """Write tokens and labels in bergson's format, one JSON object per line.

    Raises
    ------
    ValueError
        A sample's labels are the model's own predictions.
    """
    lines = []
    for tokens in samples:
        if tokens.rule == "predicted":
            raise ValueError("bergson can't use the rule `predicted`: it takes labels from the data")
        labels = [i if t else IGNORED for i, t in zip(tokens.input_ids, tokens.is_target, strict=True)]
        lines.append(json.dumps({"input_ids": tokens.input_ids, "labels": labels}) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    return path


class StoredOporp:
    """OPORP with stored signs and permutation of all d coordinates: 8 bytes each, and 4 for the permuted vector.

    Permutes the signed vector, pads it with zeros to k bins of equal length, and sums each bin.
    """

    def __init__(self, d: int, k: int, seed: int, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(seed)
        index = torch.int32 if d < 1 << 31 else torch.int64
        self.order = torch.randperm(d, generator=generator, dtype=index, device=device)
        self.signs = torch.randint(0, 2, (d,), generator=generator, dtype=torch.float32, device=device).mul_(2).sub_(1)
        self._padded = torch.zeros(k, -(-d // k), device=device)

    @property
    def n_bytes(self) -> int:
        """The table's size in bytes."""
        return self.order.nbytes + self.signs.nbytes

    def project(self, flat: torch.Tensor) -> torch.Tensor:
        """Return the bins (k,) of a gradient (d,), which is modified in place."""
        torch.index_select(flat.mul_(self.signs), 0, self.order, out=self._padded.view(-1)[: flat.numel()])
        return self._padded.sum(dim=1)


def backward(model: Any, batch: Sequence[Tokens]) -> None:
    """Set the parameters' gradients to those of a batch's loss."""
    model.zero_grad(set_to_none=True)
    batch_loss(model, batch, _device(model)).backward()  # type: ignore[no-untyped-call]


def flatten(model: Any, out: torch.Tensor) -> torch.Tensor:
    """Concatenate all gradients into `out` (d,); a missing gradient counts as zeros."""
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat([grad.reshape(-1) for grad in grads], out=out)


def batch_loss(model: Any, batch: Sequence[Tokens], device: torch.device) -> torch.Tensor:
    """Return the sum over a right-padded batch of each sample's mean cross-entropy over its targets, a scalar.

    No attention mask is needed: in a causal model, no token attends to later padding. The output layer, if the model
    exposes one, gets only positions predicting a target, as in lark-store.
    """
    longest = max(len(tokens.input_ids) for tokens in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.int64)
    is_target = torch.zeros(len(batch), longest, dtype=torch.bool)
    for row, tokens in enumerate(batch):
        ids[row, : len(tokens.input_ids)] = torch.tensor(tokens.input_ids)
        is_target[row, : len(tokens.input_ids)] = torch.tensor(tokens.is_target)
    rows, places = is_target.nonzero(as_tuple=True)
    target_ids = ids[rows, places].to(device)
    use_predicted = torch.tensor([tokens.rule == "predicted" for tokens in batch])[rows].to(device)
    weights = (1.0 / is_target.sum(dim=1))[rows].to(device)
    logits = _logits_at(model, ids.to(device), rows.to(device), places.to(device) - 1)
    labels = torch.where(use_predicted, logits.detach().argmax(dim=-1), target_ids)
    return (functional.cross_entropy(logits, labels, reduction="none") * weights).sum()


def _logits_at(model: Any, ids: torch.Tensor, rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return the logits at N positions of a batch, (N, vocabulary) float32."""
    head = model.get_output_embeddings()
    if head is None:
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
        return logits[rows, places].float()
    hook = head.register_forward_pre_hook(lambda _, given: (given[0][rows, places][None], *given[1:]))
    try:
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        hook.remove()
    return logits[0].float()


@contextmanager
def _gradients_of_all(model: Any) -> Iterator[None]:
    before = [(p, p.requires_grad) for p in model.parameters()]
    model.requires_grad_(True)
    try:
        yield
    finally:
        model.zero_grad(set_to_none=True)
        for parameter, needed in before:
            parameter.requires_grad_(needed)


def _device(model: Any) -> torch.device:
    return torch.device(next(model.parameters()).device)


def _count(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


def _machine(device: torch.device) -> dict[str, Any]:
    return {"device": device.type, "threads": torch.get_num_threads(), "torch": torch.__version__}
