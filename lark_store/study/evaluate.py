"""Accuracy and macro-F1 of a checkpoint: of the labels given, the one that the model finds most likely is its answer.

A label's likelihood is that of its tokens as the response in the queries' own format, all of them together. Shape
letters: B texts of a batch, T tokens, V tokens of the vocabulary, N samples, L labels, R resamples.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import torch

from lark_store.ingest.batches import batches, budget
from lark_store.ingest.gradients import pick_device
from lark_store.ingest.models import context_length, load_model, load_tokenizer
from lark_store.ingest.variants import Tokens
from lark_store.query.compare import exact
from lark_store.schema.records import Progress
from lark_store.study.render import renderer_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from lark_store.ingest.sources import Sample
    from lark_store.schema.records import OnProgress
    from lark_store.study.recipe import Recipe

PREDICTIONS = {"checkpoint": pl.String, "query_id": pl.String, "label": pl.String, "prediction": pl.String}
RESAMPLES = 9_999


def predict(
    recipe: Recipe, checkpoint: str, folder: Path, samples: Sequence[Sample], on_progress: OnProgress
) -> pl.DataFrame:
    """Return what a checkpoint answers: checkpoint, query_id, label (the true one), prediction, and ln p of each label.

    A sample is left out if it can't be rendered with every label, or its response is none of the labels.
    """
    assert recipe.evaluate is not None
    labels = recipe.evaluate.labels
    device = pick_device(recipe.device)
    model = load_model(folder, device, recipe.sketch.precision)
    renderer = renderer_of(recipe, recipe.queries.variant, load_tokenizer(folder), context_length(model))
    asked: dict[str, tuple[str, list[Tokens]]] = {}
    for sample in samples:
        forms = [renderer.attempt(replace(sample, response=label)) for label in labels]
        right = [form for form in forms if isinstance(form, Tokens)]
        if sample.response in labels and len(right) == len(labels):
            asked[sample.sample_id] = (sample.response, right)
    rendered = [form for _, forms in asked.values() for form in forms]
    size = budget(recipe.sketch.batch_tokens, device.type, None)
    found_NL = log_likelihoods(model, rendered, size, checkpoint, on_progress).reshape(-1, len(labels))
    rows = [
        (checkpoint, name, truth, labels[int(scores.argmax())], *map(float, scores))
        for (name, (truth, _)), scores in zip(asked.items(), found_NL, strict=True)
    ]
    schema = PREDICTIONS | {f"ln p({label})": pl.Float64 for label in labels}
    return pl.DataFrame(rows, schema, orient="row")


@torch.no_grad()
def log_likelihoods(
    model: Any, rendered: Sequence[Tokens], size: int, name: str, on_progress: OnProgress
) -> NDArray[np.float64]:
    """Return ln p of the targets of each rendered text, in nats, (N × L,); what texts share up to them is read once."""
    needs: dict[tuple[int, ...], list[int]] = {}
    for i, tokens in enumerate(rendered):
        last = max(t for t, is_target in enumerate(tokens.is_target) if is_target)
        needs.setdefault(tuple(tokens.input_ids[:last]), []).append(i)
    found = np.zeros(len(rendered))
    done = 0
    for texts in batches(needs, len, lambda: size):
        ids_BT = torch.zeros(len(texts), len(texts[0]), dtype=torch.long)
        for row, text in zip(ids_BT, texts, strict=True):
            row[: len(text)] = torch.tensor(text)
        logits_BTV = model(input_ids=ids_BT.to(model.device), use_cache=False).logits
        for logits_TV, text in zip(logits_BTV, texts, strict=True):
            for i in needs[text]:
                found[i] = _of_targets(logits_TV, rendered[i])
        done += len(texts)
        on_progress(Progress(f"evaluating {name}", done, len(needs)))
    return found


def _of_targets(logits_TV: torch.Tensor, tokens: Tokens) -> float:
    targets = [t for t, is_target in enumerate(tokens.is_target) if is_target]
    ln_p = logits_TV[[t - 1 for t in targets]].float().log_softmax(dim=-1)
    own = torch.tensor([tokens.input_ids[t] for t in targets], device=ln_p.device)
    return float(ln_p.gather(1, own[:, None]).sum())


def figures(predictions: pl.DataFrame, labels: Sequence[str], seed: int) -> dict[str, float]:
    """Return accuracy and macro-F1 with 95% percentile bootstrap intervals over samples, and how many were asked.

    An accuracy of 0 or 1 has Clopper and Pearson's interval. Macro-F1 is the mean over the labels that occur, as truth
    or as answer, of 2·TP / (2·TP + FP + FN).
    """
    number = {label: i for i, label in enumerate(labels)}
    truth_N = predictions["label"].replace_strict(number, return_dtype=pl.Int64).to_numpy()
    answer_N = predictions["prediction"].replace_strict(number, return_dtype=pl.Int64).to_numpy()
    n = len(truth_N)
    rng = np.random.default_rng(seed)
    chosen_RN = np.concatenate([np.arange(n)[None], rng.integers(n, size=(RESAMPLES, n))]) if n else None
    found: dict[str, float] = {"n_evaluated": float(n)}
    if chosen_RN is None:
        return found
    cells_RN = (truth_N * len(labels) + answer_N)[chosen_RN]
    width = len(labels) ** 2
    flat = (cells_RN + width * np.arange(len(cells_RN))[:, None]).ravel()
    confusion = np.bincount(flat, minlength=width * len(cells_RN)).reshape(-1, len(labels), len(labels))
    for name, values in (("accuracy", _accuracy(confusion)), ("macro_f1", _macro_f1(confusion))):
        low, high = np.quantile(values[1:], [0.025, 0.975])
        if name == "accuracy" and values[0] in {0, 1}:  # every resample is the same
            low, high = exact(float(values[0]), n)
        found |= {name: float(values[0]), f"{name}_low": float(low), f"{name}_high": float(high)}
    return found


def _accuracy(confusion_RLL: NDArray[np.int64]) -> NDArray[np.float64]:
    right: NDArray[np.float64] = np.trace(confusion_RLL, axis1=1, axis2=2) / confusion_RLL.sum(axis=(1, 2))
    return right


def _macro_f1(confusion_RLL: NDArray[np.int64]) -> NDArray[np.float64]:
    true_RL = np.diagonal(confusion_RLL, axis1=1, axis2=2)
    occurs_RL = confusion_RLL.sum(axis=1) + confusion_RLL.sum(axis=2)  # 2·TP + FP + FN
    f1_RL = np.divide(2.0 * true_RL, occurs_RL, out=np.full(true_RL.shape, np.nan), where=occurs_RL > 0)
    mean: NDArray[np.float64] = np.nanmean(f1_RL, axis=1)
    return mean
