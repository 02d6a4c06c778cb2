"""A study's results from seeded random numbers, in the shape of a real one: base and 5 epochs, 3 sources."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl

from lark_store.study.recipe import Recipe
from lark_store.study.results import Results

RATES = [2e-4, 2e-4, 2e-4, 2e-5, 2e-5]
GROUPS = [("finetune", "chatml"), ("medical", "raw"), ("medical", "chatml"), ("songs", "raw"), ("songs", "chatml")]
STAGES = {"finetune": "finetune", "medical": "pretrain", "songs": "pretrain"}
LABELS = ("yes", "no", "maybe")


def example_recipe(folder: Path, epochs: int = 5) -> Recipe:
    source = {"uri": "rows.jsonl", "licence": "MIT"}
    return Recipe.model_validate(
        {
            "title": "A tiny model, fine-tuned on questions",
            "folder": folder,
            "model": {"path": "models/tiny-llama"},
            "finetune": {"learning_rates": RATES[:epochs]},
            "evaluate": {"labels": list(LABELS)},
            "truth": {"column": "fact"},
            "source": [
                {"name": "finetune", "stage": "finetune", **source},
                {"name": "test", "stage": "query", **source},
                {"name": "medical", "stage": "pretrain", "variants": ["raw", "chatml"], **source},
                {"name": "songs", "stage": "pretrain", "variants": ["raw", "chatml"], **source},
            ],
        }
    )


def per_query(ratio: float, n: int) -> dict[str, float]:
    """The spread of the ratios of n queries, two of which have none."""
    return {"r_median": 1.1 * ratio, "r_q1": 0.9 * ratio, "r_q3": 1.6 * ratio, "n_ratio": n - 2}


def example_results(  # noqa: C901 - one row of each table after the other
    folder: Path, ids: list[str], epochs: int = 5, seed: int = 0
) -> Results:
    rng = np.random.default_rng(seed)
    recipe = example_recipe(folder, epochs)
    moments = list(enumerate(recipe.checkpoints))
    n = len(ids)

    def spread(value: float, width: float) -> tuple[float, float, float]:
        return value, value - width * rng.uniform(0.7, 1), value + width * rng.uniform(0.7, 1)

    def shares(value: float) -> tuple[float, float, float]:
        value = min(max(round(value * n) / n, 0.0), 1.0)
        half = 2 * math.sqrt((value + 0.1) * (1.1 - value) / n) / 2
        return value, max(0.0, value - half), min(1.0, value + half)

    checkpoints, influence, relevance, dominance, effect, methods, queries, truth, gaps = ([] for _ in range(9))
    base = {"finetune": 0.35, "medical": 0.28, "songs": 0.16}
    for epoch, name in moments:
        key = {"checkpoint": name, "epoch": float(epoch)}
        rate = RATES[epoch - 1] if epoch else None
        accuracy, f1 = shares(0.4 + 0.08 * epoch), spread(0.35 + 0.07 * epoch, 0.1)
        checkpoints.append(
            key
            | {"step": 15 * epoch, "learning_rate": rate, "train_loss": None if not epoch else 2.1 / epoch}
            | {"query_loss": 2.5 / (1 + 0.4 * epoch)}
            | dict(zip(("accuracy", "accuracy_low", "accuracy_high"), accuracy, strict=True))
            | dict(zip(("macro_f1", "macro_f1_low", "macro_f1_high"), f1, strict=True))
            | {"n_evaluated": n}
        )
        mean = {}
        for source, variant in GROUPS:
            value = (
                base[source] * (1 + (0.25 if source == "finetune" else 0.1) * epoch) * (0.7 if variant == "raw" else 1)
            )
            mean[source, variant], low, high = spread(value + rng.normal(0, 0.01), 0.05)
            wins = shares(0.75 - 0.06 * epoch) if source != "finetune" else (None, None, None)
            influence.append(
                key
                | {"source": source, "stage": STAGES[source], "variant": variant}
                | {"mean_max_influence": mean[source, variant], "low": low, "high": high, "sketch_error": 0.0038}
                | dict(zip(("ft_wins", "ft_wins_low", "ft_wins_high"), wins, strict=True))
                | {"n_queries": n}
            )
        for variant in ("raw", "chatml"):
            value, low, high = spread(mean["medical", variant] / mean["songs", variant] - 1, 0.2)
            names = {"variant": variant, "source": "medical", "against_source": "songs"}
            interval = {"value": value, "low": low, "high": high}
            gap = {name.replace("value", "difference"): 0.1 * x for name, x in interval.items()}
            gap = {name if name == "difference" else f"difference_{name}": x for name, x in gap.items()}
            relevance.append(key | names | interval | gap | {"sketch_error": 0.0052, "p_value": 0.0004, "n_queries": n})
        for source, variant in GROUPS[1:]:
            pt, low, high = shares(0.25 + 0.06 * epoch + (0.1 if source == "medical" else 0))
            ratio, less, more = spread(mean["finetune", "chatml"] / mean[source, variant], 0.2)
            dominance.append(
                key
                | {"learning_rate": rate, "source": source, "variant": variant, "ft": mean["finetune", "chatml"]}
                | {
                    "pt": mean[source, variant],
                    "ratio": ratio,
                    "low": less,
                    "high": more,
                    "sketch_error": 0.02,
                    **per_query(ratio, n),
                    "ft_wins": 1 - pt,
                }
                | {"pt_wins": pt, "pt_wins_low": low, "pt_wins_high": high, "p_value": 0.021, "accuracy": accuracy[0]}
                | {"n_queries": n}
            )
            for rival in ("bm25", "hybrid"):
                ft, theirs = 1 - pt, shares(0.4 + rng.uniform(-0.2, 0.2))[0]
                difference, low, high = spread(ft - theirs, 0.25)
                methods.append(
                    key
                    | {"source": source, "variant": variant, "method": rival, "ft_wins": ft, "rival_ft_wins": theirs}
                    | {"difference": difference, "low": low, "high": high, "p_value": 0.3, "n_queries": n}
                )
        for source in ("medical", "songs"):
            value, low, high = spread(1.5 - 0.05 * epoch, 0.1)
            effect.append(
                key
                | {"source": source, "variant": "chatml", "value": value, "low": low, "high": high}
                | {"sketch_error": 0.02}
                | per_query(value, n)
                | {"p_value": 0.001, "n_queries": n}
            )
        for i, query_id in enumerate(ids):
            ft, pt = rng.normal(0.35 + 0.05 * epoch, 0.1), rng.normal(0.3 + 0.06 * epoch, 0.12)
            prediction = LABELS[int(rng.integers(3))] if rng.random() > 0.1 * epoch else LABELS[i % 3]
            queries.append(
                key
                | {
                    "query_id": query_id,
                    "label": LABELS[i % 3],
                    "prediction": prediction,
                    "correct": prediction == LABELS[i % 3],
                }
                | {"loss": float(rng.uniform(0.3, 2.5) / (1 + 0.3 * epoch)), "ft": ft, "pt": pt}
                | {"ratio": ft / pt if pt > 0 else None, "winner": "finetune" if ft > pt else "pretrain"}
            )
        for method in ("cosine", "dot", "bm25", "hybrid"):
            grow = {"cosine": 0.09, "dot": 0.05, "bm25": 0, "hybrid": 0.1}[method] * epoch
            mrr, recall = spread(0.3 + grow, 0.08), spread(0.4 + grow, 0.1)
            truth.append(
                key
                | {"method": method}
                | dict(zip(("mrr", "mrr_low", "mrr_high"), mrr, strict=True))
                | dict(zip(("recall_at_10", "recall_low", "recall_high"), recall, strict=True))
                | {"n_queries": n, "n_samples": 60}
            )
            if method != "cosine":
                difference, low, high = spread(grow - 0.1, 0.1)
                gap = {"method": method, "metric": "mrr", "difference": difference, "low": low, "high": high}
                gaps.append(key | gap | {"p_value": 0.04, "n_queries": n})
    storage = [
        {"model": model, "parameters": p, "what": kind, "measured": kind == "sketches" and model != "7B model"}
        | {"bytes_per_sample": size, "n_samples": 2000, "bytes": int(size * 2000), "times_smaller": size / 132_400}
        for model, p in (("tiny-llama", 134_515_008), ("7B model", 7_000_000_000))
        for kind, size in (
            ("sketches", 132_400.0), ("gradients in fp16", 2.0 * p), ("gradients in fp32", 4.0 * p)
        )
    ]  # fmt: skip
    frames = (checkpoints, influence, relevance, dominance, effect, storage, methods, queries, truth, gaps)
    return Results(
        recipe,
        *(pl.DataFrame(rows, infer_schema_length=None) for rows in frames),
        notes=["2 samples of `songs` failed at `epoch-3`: the loss is not finite"],
        environment={"python": "3.11.9", "torch": "2.8.0", "machine": "x86_64, 2 cores"},
        hashes={"recipe": "ab" * 32, "checkpoint epoch-5": "cd" * 32},
    )


def stripped(results: Results, *names: str) -> Results:
    """The results with some tables empty."""
    return replace(results, **{name: getattr(results, name).clear() for name in names})
