"""Accuracy and macro-F1 of a checkpoint, by its most likely label or by generation.

A label's likelihood is the joint likelihood of its tokens as the response in the queries' format. By generation, the
model answers greedily, and its answer counts as the label that it begins with. Shape letters: B texts of a batch, T
tokens, V tokens of the vocabulary, N samples, L labels, R resamples.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import torch

from lark_store.core.device import pick_device
from lark_store.modeling.batching import batches, budget
from lark_store.modeling.encoded import UnusableSampleError
from lark_store.modeling.loading import context_length, load_model, load_tokenizer
from lark_store.modeling.predicted_answers import AnswerPredictor, AnswerSettings
from lark_store.modeling.tokens import Tokens
from lark_store.results import Progress
from lark_store.stats.bootstrap import exact
from lark_store.study.render import renderer_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from lark_store.modeling.rendering import Renderer
    from lark_store.modeling.sample import Sample
    from lark_store.results import OnProgress
    from lark_store.study.recipe import Evaluate, Recipe

NO_LABEL = "(no label)"  # the prediction where a generated answer begins with no label
PREDICTIONS = {"checkpoint": pl.String, "query_id": pl.String, "label": pl.String, "prediction": pl.String}
RESAMPLES = 9_999


def predict(
    recipe: Recipe, checkpoint: str, folder: Path, samples: Sequence[Sample], on_progress: OnProgress
) -> pl.DataFrame:
    """Return a checkpoint's predictions: checkpoint, query_id, label (true), prediction, and ln p of each label.

    By generation there is the `answer` in place of likelihoods, and the prediction may be `NO_LABEL`. Skips samples
    whose answer is not a label, or which can't be rendered with every label.
    """
    assert recipe.evaluate is not None
    part, device = recipe.evaluate, pick_device(recipe.device)
    model = load_model(folder, device, recipe.sketch.precision)
    renderer = renderer_of(recipe, recipe.queries.variant, load_tokenizer(folder), context_length(model))
    evaluated = _Evaluated(checkpoint, model, renderer, part, on_progress)
    known = [(sample, truth) for sample in samples if (truth := sample.answer.strip()) in part.labels]
    if part.by == "generation":
        return evaluated.by_generation(known)
    return evaluated.by_likelihood(known, budget(recipe.sketch.batch_tokens, device.type, None))


@dataclass(frozen=True)
class _Evaluated:
    """A checkpoint under evaluation, on samples with their true labels."""

    checkpoint: str
    model: Any
    renderer: Renderer
    part: Evaluate
    on_progress: OnProgress

    def by_generation(self, known: list[tuple[Sample, str]]) -> pl.DataFrame:
        """Return predictions by greedy decoding."""
        settings, tokenizer = AnswerSettings.greedy(self.part.max_answer), self.renderer.tokenizer
        answer, rows = AnswerPredictor(self.model, tokenizer), []
        for n, (sample, truth) in enumerate(known, start=1):
            try:
                tokens = answer(self.renderer.prompt(sample, settings))
            except UnusableSampleError:
                continue
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            rows.append((self.checkpoint, sample.sample_id, truth, label_of(text, self.part.labels), text))
            self.on_progress(Progress(f"evaluating {self.checkpoint}", n, len(known)))
        return pl.DataFrame(rows, PREDICTIONS | {"answer": pl.String}, orient="row")

    def by_likelihood(self, known: list[tuple[Sample, str]], size: int) -> pl.DataFrame:
        """Return predictions by the labels' likelihoods, in batches of `size` tokens."""
        labels, names, rendered = self.part.labels, [], []
        for sample, truth in known:  # each label keeps the white space around the answer
            answers = [sample.answer.replace(truth, label) for label in labels]
            forms = [self.renderer.attempt(sample.with_answer(answer)) for answer in answers]
            right = [form for form in forms if isinstance(form, Tokens)]
            if len(right) == len(labels):
                names.append((self.checkpoint, sample.sample_id, truth))
                rendered += right
        ln_p = log_likelihoods(self.model, rendered, size, self.checkpoint, self.on_progress)
        rows = [
            (*name, labels[int(scores.argmax())], *map(float, scores))
            for name, scores in zip(names, ln_p.reshape(-1, len(labels)), strict=True)
        ]
        schema = PREDICTIONS | {f"ln p({label})": pl.Float64 for label in labels}
        return pl.DataFrame(rows, schema, orient="row")


def label_of(answer: str, labels: Sequence[str]) -> str:
    """Return the label that an answer begins with, whatever its case, or `NO_LABEL`.

    >>> label_of(" Yes, it is.", ["yes", "no"]), label_of("Not at all", ["yes", "no"])
    ('yes', '(no label)')
    """
    text = answer.strip().casefold()
    begun = [label for label in labels if re.match(rf"{re.escape(label.casefold())}(?!\w)", text)]
    return max(begun, key=len, default=NO_LABEL)


@torch.no_grad()
def log_likelihoods(
    model: Any, rendered: Sequence[Tokens], size: int, name: str, on_progress: OnProgress
) -> NDArray[np.float64]:
    """Return ln p of each rendered text's targets, in nats, (N × L,); shared prefixes are evaluated once."""
    needs: dict[tuple[int, ...], list[int]] = {}
    for i, tokens in enumerate(rendered):
        last = max(t for t, is_target in enumerate(tokens.is_target) if is_target)
        needs.setdefault(tuple(tokens.input_ids[:last]), []).append(i)
    ln_p = np.zeros(len(rendered))
    n_done = 0
    for texts in batches(needs, len, lambda: size):
        ids_BT = torch.zeros(len(texts), len(texts[0]), dtype=torch.long)
        for row, text in zip(ids_BT, texts, strict=True):
            row[: len(text)] = torch.tensor(text)
        logits_BTV = model(input_ids=ids_BT.to(model.device), use_cache=False).logits
        for logits_TV, text in zip(logits_BTV, texts, strict=True):
            for i in needs[text]:
                ln_p[i] = _target_log_likelihood(logits_TV, rendered[i])
        n_done += len(texts)
        on_progress(Progress(f"evaluating {name}", n_done, len(needs)))
    return ln_p


def _target_log_likelihood(logits_TV: torch.Tensor, tokens: Tokens) -> float:
    targets = [t for t, is_target in enumerate(tokens.is_target) if is_target]
    ln_p = logits_TV[[t - 1 for t in targets]].float().log_softmax(dim=-1)
    target_ids = torch.tensor([tokens.input_ids[t] for t in targets], device=ln_p.device)
    return float(ln_p.gather(1, target_ids[:, None]).sum())


def figures(predictions: pl.DataFrame, labels: Sequence[str], seed: int) -> dict[str, float]:
    """Return accuracy and macro-F1 with 95% percentile bootstrap intervals over samples, and the number of samples.

    An accuracy of 0 or 1 gets the Clopper–Pearson interval. Macro-F1 is the mean of 2·TP / (2·TP + FP + FN) over the
    labels occurring as truth or answer. An answer without a label is wrong.
    """
    number = {label: i for i, label in enumerate([*labels, NO_LABEL])}
    truth_N = predictions["label"].replace_strict(number, return_dtype=pl.Int64).to_numpy()
    answer_N = predictions["prediction"].replace_strict(number, return_dtype=pl.Int64).to_numpy()
    n = len(truth_N)
    rng = np.random.default_rng(seed)
    chosen_RN = np.concatenate([np.arange(n)[None], rng.integers(n, size=(RESAMPLES, n))]) if n else None
    measured: dict[str, float] = {"n_evaluated": float(n)}
    if chosen_RN is None:
        return measured
    cells_RN = (truth_N * len(number) + answer_N)[chosen_RN]
    width = len(number) ** 2
    flat = (cells_RN + width * np.arange(len(cells_RN))[:, None]).ravel()
    confusion = np.bincount(flat, minlength=width * len(cells_RN)).reshape(-1, len(number), len(number))
    for name, values in (("accuracy", _accuracy(confusion)), ("macro_f1", _macro_f1(confusion))):
        low, high = np.quantile(values[1:], [0.025, 0.975])
        if name == "accuracy" and values[0] in {0, 1}:  # all resamples agree
            low, high = exact(float(values[0]), n)
        measured |= {name: float(values[0]), f"{name}_low": float(low), f"{name}_high": float(high)}
    return measured


def _accuracy(confusion_RLL: NDArray[np.int64]) -> NDArray[np.float64]:
    accuracy_R: NDArray[np.float64] = np.trace(confusion_RLL, axis1=1, axis2=2) / confusion_RLL.sum(axis=(1, 2))
    return accuracy_R


def _macro_f1(confusion_RLL: NDArray[np.int64]) -> NDArray[np.float64]:
    true_RL = np.diagonal(confusion_RLL, axis1=1, axis2=2)[:, :-1]  # without answers that have no label
    occurs_RL = (confusion_RLL.sum(axis=1) + confusion_RLL.sum(axis=2))[:, :-1]  # 2·TP + FP + FN
    f1_RL = np.divide(2.0 * true_RL, occurs_RL, out=np.full(true_RL.shape, np.nan), where=occurs_RL > 0)
    mean: NDArray[np.float64] = np.nanmean(f1_RL, axis=1)
    return mean
