"""Scores by kronfluence's EK-FAC: writes a matrix (queries × samples) for each damping, as one array.

Runs in kronfluence's environment (see README.md) and imports nothing from lark-store:

    python benchmarks/kronfluence_scores.py MODEL_FOLDER ROWS.json OUT.npy --damping 1e-6 1e-4

ROWS.json has `queries` and `samples`, each a list of {"input_ids": […], "is_target": […]}. The loss is the mean over a
text's n targets. Factors are fitted on the samples with labels drawn from the model, on the gradient of Σ ℓ / √n, whose
mean square is the Gauss–Newton matrix of the mean loss. All linear layers except the output head are tracked.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no downloads

import numpy as np
import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from torch.nn import functional
from transformers import AutoModelForCausalLM

BATCH_1 = {"per_device_query_batch_size": 1, "per_device_train_batch_size": 1}  # no padding


class Causal(Task):
    """A causal language model's loss on each text's targets."""

    def __init__(self, tracked: list[str]) -> None:
        super().__init__()
        self.tracked = tracked

    def compute_train_loss(self, batch: Any, model: torch.nn.Module, sample: bool = False) -> torch.Tensor:
        """Return the mean loss over targets; for labels drawn from the model, Σ ℓ / √n."""
        ids_T, is_target_T = batch["input_ids"][0], batch["is_target"][0]
        logits_NV = model(input_ids=ids_T[None, :-1]).logits[0][is_target_T[1:]]  # the last token predicts nothing
        if not sample:
            return functional.cross_entropy(logits_NV, ids_T[1:][is_target_T[1:]])
        drawn_N = torch.multinomial(logits_NV.detach().softmax(dim=-1), 1)[:, 0]
        return functional.cross_entropy(logits_NV, drawn_N, reduction="sum") / len(drawn_N) ** 0.5

    def compute_measurement(self, batch: Any, model: torch.nn.Module) -> torch.Tensor:
        """Return a query's mean loss."""
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self) -> list[str]:
        """Return the linear layers."""
        return self.tracked


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Texts as tensors."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = [{name: torch.tensor(values) for name, values in row.items()} for row in rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return self.rows[i]


def prepared(folder: Path) -> tuple[Any, Causal]:
    """Load the model and wrap its linear layers except the head; hooks hide the biases from kronfluence."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    head = model.get_output_embeddings()
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}
    for layer in linears.values():
        if layer.bias is not None:
            bias = layer.bias.detach()
            layer.register_forward_hook(lambda _, __, made, bias=bias: made + bias)
            layer.bias = None
    task = Causal(list(linears))
    return prepare_model(model, task), task


def main() -> None:
    """Fit, score, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--damping", type=float, nargs="+", required=True, help="λ itself")
    parser.add_argument("--seed", type=int, default=0, help="of the drawn labels")
    parser.add_argument("--strategy", default="ekfac", help="`identity` gives the dot products of plain gradients")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    rows = json.loads(options.rows.read_text(encoding="utf-8"))
    queries, samples = Rows(rows["queries"]), Rows(rows["samples"])
    model, task = prepared(options.model)
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer("check", model, task, cpu=True, disable_tqdm=True, output_dir=folder)
        label, factors = {"factors_name": "factors"}, FactorArguments(strategy=options.strategy)
        analyzer.fit_all_factors(**label, dataset=samples, per_device_batch_size=1, factor_args=factors)
        data = {"query_dataset": queries, "train_dataset": samples}
        matrices = []
        for damping in options.damping:
            score = ScoreArguments(damping_factor=damping, query_gradient_accumulation_steps=len(queries))
            analyzer.compute_pairwise_scores(
                "scores", **label, **data, **BATCH_1, score_args=score, overwrite_output_dir=True
            )
            matrices.append(analyzer.load_pairwise_scores("scores")["all_modules"].float().numpy())
        np.save(options.out, np.stack(matrices))


if __name__ == "__main__":
    main()
