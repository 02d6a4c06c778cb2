"""The sketch error of figures over queries: against other seeds of the sketcher, and in `metrics`."""

from __future__ import annotations

import random

import numpy as np
import polars as pl
import pytest
import torch
import transformers as hf
from helpers.checkpoints import WORDS, save_checkpoint
from helpers.texts import qa_rows, text_rows

from lark_store.gradients.sketch.accumulate import GradientSketcher
from lark_store.gradients.sketch.oporp import Oporp
from lark_store.gradients.sketch.placement import place
from lark_store.stats import metrics, sketch_error

K, SEEDS = 1024, 24
STAGES = {"answers": "finetune", "twins": "pretrain", "songs": "pretrain", "words": "finetune"}


def texts(n: int) -> dict[str, list[str]]:
    """Queries and sources: two in the queries' form, plain texts that are much alike, words at random."""
    rng = random.Random(0)  # noqa: S311
    words = WORDS.split()

    def asked(start, step=1):
        rows = qa_rows(step * n, start)[::step]
        return [f"{row['context']} {row['question']}\n{row['answer']}" for row in rows]

    return {
        "test": asked(100),
        "answers": asked(0, 2),
        "twins": asked(1, 2),
        "songs": [str(row["text"]) for row in text_rows(n)],
        "words": [" ".join(rng.choices(words, k=12)) for _ in range(n)],
    }


def gradients_of(folder, texts_by_source):
    """Whole gradients: of each source a tensor (N, …) for each parameter."""
    model, tokenizer = hf.AutoModelForCausalLM.from_pretrained(folder).eval(), hf.AutoTokenizer.from_pretrained(folder)
    names = dict(model.named_parameters())

    def gradient(text):
        ids = torch.tensor([tokenizer(text)["input_ids"][:200]])
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return {name: p.grad.flatten().clone() for name, p in names.items()}

    rows = {source: [gradient(text) for text in texts] for source, texts in texts_by_source.items()}
    stacked = {
        source: {name: torch.stack([g[name] for g in texts]) for name in names} for source, texts in rows.items()
    }
    return stacked, [(name, tuple(p.shape)) for name, p in names.items()]


def sketched(stacked, shapes, k, seed):
    """Sketches of each source, (N, K), by a map of the seed."""
    results = {}
    for source, gradients in stacked.items():
        sketcher = GradientSketcher(Oporp(k, seed), place(shapes, k), torch.device("cpu"))
        out = sketcher.new(len(next(iter(gradients.values()))))
        for name, gradient in gradients.items():
            sketcher.add(name, gradient, out)
        results[source] = sketcher.finish(out).double()
    return results


def phi_of(vectors, k):
    """Φ of each source and query as `metrics` takes it, with its noise."""
    unit = {source: torch.nn.functional.normalize(rows, dim=1) for source, rows in vectors.items()}
    frames = []
    for source, stage in STAGES.items():
        phi = (unit["test"] @ unit[source].T).max(dim=1).values.numpy()
        frames.append(
            pl.DataFrame(
                {
                    "query_id": [f"q{i}" for i in range(len(phi))],
                    "phi": phi,
                    "noise": sketch_error.noise_of(phi, np.ones(len(phi)), k),
                }
            ).with_columns(
                checkpoint=pl.lit("base"),
                queries=pl.lit("test"),
                source=pl.lit(source),
                stage=pl.lit(stage),
                variant=pl.lit("raw"),
            )
        )
    return pl.concat(frames)


def test_sketch_error_matches_the_spread_over_seeds(tmp_path):
    n = 12
    stacked, shapes = gradients_of(save_checkpoint(tmp_path / "model"), texts(n))
    figures = pl.concat([metrics.all_metrics(phi_of(sketched(stacked, shapes, K, seed), K)) for seed in range(SEEDS)])
    over = figures.group_by("metric", "source", "against_source", maintain_order=True).agg(
        moved=pl.col("value").std(), error=pl.col("sketch_error").mean(), value=pl.col("value").mean()
    )
    values = {tuple(row[:3]): row[3:] for row in over.iter_rows()}
    means = [("mean_max_influence", source, None) for source in STAGES]
    gaps = [key for key in values if key[0] == "difference"]
    assert len(gaps) == 6
    for key in means:
        moved, error, _ = values[key]
        assert 0.35 * error < moved < 1.25 * error, key  # of 24 seeds a standard deviation is known to 15%
        assert moved > 1.4 * error / np.sqrt(n), key  # the error if queries were independent
    for key in [*gaps, ("ft_wins", "words", "songs"), ("pt_dominance", "words", "songs")]:
        moved, error, _ = values[key]
        assert 0.15 * error < moved < 1.25 * error, key  # two sources in one form err alike
    assert values["ft_wins", "answers", "songs"][:2] == pytest.approx((0, 0), abs=1e-6)
    moved, error, _ = values["ft_pt_ratio", "answers", "twins"]
    assert 0.15 * error < moved < 1.25 * error


def test_bootstrap_over_queries_misses_a_common_shift():
    """Every query's Φ errs by the same: the interval is as narrow as ever, the column says it."""
    rng = np.random.default_rng(0)
    phi = pl.DataFrame({"query_id": [f"q{i}" for i in range(400)], "phi": rng.normal(0.1, 0.01, 400)}).with_columns(
        noise=pl.lit(0.03), checkpoint=pl.lit("base"), queries=pl.lit("test"), source=pl.lit("a"), variant=pl.lit("raw")
    )
    (row,) = metrics.mean_max_influence(phi).rows(named=True)
    assert row["high"] - row["low"] < 0.003
    assert row["sketch_error"] == pytest.approx(0.03)


@pytest.mark.parametrize("seed", range(3))
def test_errors_account_for_correlated_queries(seed):
    """Sides that err by z times each query's noise: simulated, against the closed forms."""
    rng = np.random.default_rng(seed)
    n, draws = 30, 20_000
    left, right = rng.uniform(0.3, 0.6, n), rng.uniform(0.3, 0.6, n)
    noises = rng.uniform(0.001, 0.004, (2, n))
    z = rng.normal(size=(2, draws, 1))
    a, b = left + z[0] * noises[0], right + z[1] * noises[1]
    shared = z[0] * np.hypot(*noises)  # the difference's own error

    def near(values):
        return pytest.approx(values.std(), rel=0.04)

    assert sketch_error.of_mean(noises[0]) == near(a.mean(axis=1))
    assert sketch_error.of_difference(*noises) == near(shared.mean(axis=1))
    assert sketch_error.of_ratio_of_means(left, right, *noises) == near(a.mean(axis=1) / b.mean(axis=1))
    assert sketch_error.of_share(left - right, *(30 * noises)) == near((left - right + 30 * shared > 0).mean(axis=1))


def test_noise_of_a_weighted_sum_of_cosines():
    phi, weights = np.array([0.6, -0.5, 0.0, 2.5, 0.1, 0.1]), np.array([2.0, 1.0, 3.0, 2.0, 0.0, -1.0])
    noise = sketch_error.noise_of(phi, weights, 100)
    assert noise[:4].tolist() == pytest.approx([2 * (1 - 0.09) / 10, (1 - 0.25) / 10, 0.3, 0.0])
    assert np.isnan(noise[4:]).all()
    assert sketch_error.noise_of(phi[:1], weights[:1], np.array([25.0])).tolist() == pytest.approx([2 * 0.91 / 5])


def test_error_of_a_share_is_that_of_queries_moving_together():
    """Two queries that win with 5/6 and 1/2: z = 0.9674 and 0; the pairs' minima are 5/6, 1/2, 1/2, 1/2."""
    z = 0.967421566101701  # the normal distribution's quantile of 5/6
    error = sketch_error.of_share(np.array([0.5 * z, 0.0]), np.array([0.3, 0.2]), np.array([0.4, 0.0]))
    assert error == pytest.approx(np.sqrt((5 / 6 + 3 * 0.5) / 4 - (2 / 3) ** 2))


def test_ratio_of_a_mean_not_above_0_has_no_error():
    noise, up = np.full(2, 0.01), np.array([0.2, 0.4])
    assert sketch_error.of_ratio_of_means(up, up, noise, noise) > 0
    for other in (-up, np.array([-0.2, 0.2]), up[:0]):
        assert np.isnan(sketch_error.of_ratio_of_means(up, other, noise, noise))
        assert np.isnan(sketch_error.of_ratio_of_means(other, up, noise, noise))


def test_shares_robust_to_noise_have_no_error():
    zero = np.zeros(3)
    assert sketch_error.of_share(np.array([0.5, 0.0, -0.5]), zero, zero) == 0
    assert np.isnan(sketch_error.of_share(np.array([0.5, 0.1]), np.array([0.1, np.nan]), np.zeros(2)))
    assert np.isnan(sketch_error.of_share(zero[:0], zero[:0], zero[:0]))


# --- the output of `metrics` ---------------------------------------------------------------------------------------


def influence(store, **asked):
    """The table's rows by source."""
    figures = store.metrics(view="influence", sketcher="small", **asked)
    return {row["source"]: row for row in figures.iter_rows(named=True) if row["variant"] == "chatml"}


def hits_of(store, checkpoint, method="cosine"):
    """The best sample of each query and source by `top`: (query, source) to its row."""
    ids = store.sql("select sample_id from samples where source = 'test'")["sample_id"]
    results = {}
    for query in ids:
        for source in ("finetune", "medical", "songs"):
            options = {"checkpoint": checkpoint, "sketcher": "small", "sources": [source], "variants": ["chatml"]}
            results[query, source] = store.top(query, k=1, method=method, **options).frame.row(0, named=True)
    return results


@pytest.mark.parametrize("method", ["cosine", "dot"])
def test_sketch_error_is_the_mean_noise_of_the_best_samples(scored_copy, method):
    if method != "cosine":
        scored_copy.attribute(["base"], queries="test", sketcher="small", method=method)
    output, hits = influence(scored_copy, checkpoint="base", method=method), hits_of(scored_copy, "base", method)
    for source in ("finetune", "medical", "songs"):
        noise = [hit["noise"] for (_, name), hit in hits.items() if name == source]
        assert len(noise) == 4
        assert output[source]["sketch_error"] == pytest.approx(np.mean(noise), rel=1e-4)


def test_sum_adds_its_checkpoints_errors(scored_copy):
    names = ["base", "epoch-1"]
    for method in ("cosine-sum", "tracin"):
        scored_copy.attribute(names, queries="test", sketcher="small", method=method)
    for row in influence(scored_copy, method="cosine-sum").values():
        least = 2 * (1 - (row["high"] / 2) ** 2) / np.sqrt(K)
        assert least - 1e-4 < row["sketch_error"] <= 2 / np.sqrt(K)
    norms = dict(
        scored_copy.sql(
            "select source, avg(2e-4 * grad_norm * grad_norm) from sketches "
            "where sketcher = 'small' and source != 'test' group by all"
        ).iter_rows()
    )
    for source, row in influence(scored_copy, method="tracin").items():
        assert 0.01 / np.sqrt(K) * norms[source] < row["sketch_error"] < 10 * 2 / np.sqrt(K) * norms[source]


def test_similar_checkpoints_have_similar_errors(scored_copy, checkpoints):
    """The sum over a checkpoint and its copy is twice the score, and so is its noise."""
    scored_copy.checkpoint_add("twin", checkpoints["base"], learning_rate=2e-4)
    scored_copy.ingest(["twin"], ["finetune", "medical", "songs", "test"], ["chatml"], sketcher="small")
    options = {"sketcher": "small", "variants": ["chatml"], "k": 20}
    one = scored_copy.top("q101", checkpoint="base", **options).frame
    both = scored_copy.top("q101", checkpoint=["base", "twin"], over_checkpoints="sum", **options).frame
    assert both["sample_id"].to_list() == one["sample_id"].to_list()
    for name in ("score", "noise"):
        np.testing.assert_allclose(both[name], 2 * one[name], rtol=1e-4)
    pair = ["base", "twin"]
    scored_copy.attribute(pair, queries="test", sketcher="small", over_checkpoints="sum")
    summed, alone = (
        influence(scored_copy, checkpoint=pair, over_checkpoints="sum"),
        influence(scored_copy, checkpoint="base"),
    )
    for source, row in summed.items():
        assert row["sketch_error"] == pytest.approx(2 * alone[source]["sketch_error"], rel=1e-4)


@pytest.mark.parametrize("method", ["whitened", "bm25", "hybrid"])
def test_unknown_error_is_not_shown(scored_copy, method):
    scored_copy.attribute(["base"], queries="test", sketcher="small", method=method)
    for view in ("all", "influence", "dominance", "comparisons"):
        assert scored_copy.metrics(view=view, sketcher="small", method=method)["sketch_error"].null_count() > 0
        known = scored_copy.metrics(view=view, sketcher="small", checkpoint="base")
        value = {"influence": "mean_max_influence", "dominance": "ratio"}.get(view, "value")
        assert known["sketch_error"].is_null().equals(known[value].is_null())  # a ratio may be undefined
