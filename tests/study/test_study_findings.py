"""The study's findings: the words follow the numbers, and all tests are counted."""

from __future__ import annotations

from dataclasses import replace

import polars as pl
import pytest

from lark_store.study.conclusions import findings
from lark_store.study.recipe import Recipe
from lark_store.study.results import Results
from lark_store.study.wording import NO_DIFFERENCE

PER_QUERY = {"r_median": 1.5, "r_q1": 0.75, "r_q3": 2.25, "n_ratio": 38}
CHECKPOINTS = ["base", "epoch-1", "epoch-2"]


def recipe() -> Recipe:
    stages = {"finetune": "finetune", "test": "query", "medical": "pretrain", "songs": "pretrain"}
    return Recipe.model_validate(
        {
            "title": "made",
            "folder": "made",
            "model": {"path": "a/tiny"},
            "finetune": {"learning_rates": [2e-4, 2e-5]},
            "source": [{"name": name, "stage": stage, "uri": name} for name, stage in stages.items()],
        }
    )


def storage_row(name: str, size: float) -> dict[str, object]:
    """A row of the storage table, of 100 samples."""
    row = {"model": "tiny", "parameters": 50_000_000, "what": name, "measured": name == "sketches"}
    return row | {"bytes_per_sample": size, "n_samples": 100, "bytes": int(100 * size), "times_smaller": size / 1e5}


def figure(sign: int, value: float = 0.2) -> dict[str, object]:
    """A difference that is clear (sign 1 or -1) or none (0)."""
    low, high = sorted((sign * value / 2, sign * value * 1.5)) if sign else (-value, value)
    return {"low": low, "high": high, "p_value": 0.0002 if sign else 0.7}


def shifted(sign: int, value: float = 0.2) -> dict[str, object]:
    row = figure(sign, value)
    return row | {"low": 1 + row["low"], "high": 1 + row["high"]}


def results_with(sign: int) -> Results:
    """Results of 40 queries whose every difference has one sign."""
    key = {"checkpoint": "epoch-2", "epoch": 2}
    group = key | {"variant": "chatml", "source": "medical", "n_queries": 40, "sketch_error": 0.004}
    means = {"finetune": 0.5 + sign * 0.1, "medical": 0.5, "songs": 0.5 - sign * 0.1}
    influence = [group | {"source": name, "mean_max_influence": x} for name, x in means.items()]
    gap = {f"difference_{end}": 0.5 * figure(sign)[end] for end in ("low", "high")} | {"difference": sign * 0.1}
    relevance = [group | {"against_source": "songs", "value": sign * 0.2} | figure(sign) | gap]
    wins = {"ft_wins": 0.5, "pt_wins": 0.5, "pt_wins_low": 0.4, "pt_wins_high": 0.6} | PER_QUERY
    dominance = [group | wins | {"ft": 0.5 + sign * 0.1, "pt": 0.5, "ratio": 1 + sign * 0.2} | shifted(sign)]
    effects = [
        group
        | PER_QUERY
        | {"checkpoint": f"epoch-{epoch}", "epoch": epoch, "value": 1 + direction * 0.2}
        | shifted(direction)
        for epoch, direction in ((1, -sign), (2, sign))
    ]
    shares = {"method": "bm25", "ft_wins": 0.6, "rival_ft_wins": 0.4, "difference": sign * 0.2}
    truth_rows = [
        key
        | {
            "method": method,
            "mrr": mrr,
            "mrr_low": 0.1,
            "mrr_high": 0.9,
            "recall_at_10": 0.5,
            "recall_low": 0.4,
            "recall_high": 0.6,
            "n_queries": 40,
            "n_samples": 99,
        }
        for method, mrr in (("cosine", 0.5 + sign * 0.1), ("bm25", 0.5))
    ]
    gap = key | {"method": "bm25", "metric": "mrr", "difference": sign * 0.1, "n_queries": 40} | figure(sign, 0.1)
    accuracies = [(0.5, 0.45, 0.55), (0.6, 0.4, 0.7), (0.5 + sign * 0.2, 0.45 + sign * 0.2, 0.55 + sign * 0.2)]
    measured = [
        {"checkpoint": name, "epoch": i, "accuracy": a, "accuracy_low": b, "accuracy_high": c, "n_evaluated": 40}
        for i, (name, (a, b, c)) in enumerate(zip(CHECKPOINTS, accuracies, strict=True))
    ]
    return Results(
        recipe=recipe(),
        checkpoints=pl.DataFrame(measured),
        influence=pl.DataFrame(influence),
        relevance=pl.DataFrame(relevance),
        dominance=pl.DataFrame(dominance),
        format_effect=pl.DataFrame(effects),
        methods=pl.DataFrame([group | shares | figure(sign)]),
        queries=pl.DataFrame([query_row(name, i, sign) for name in CHECKPOINTS for i in range(40)]),
        truth=pl.DataFrame(truth_rows),
        truth_gaps=pl.DataFrame([gap]),
        storage=pl.DataFrame([storage_row("sketches", 1e5), storage_row("gradients in fp16", 1e8)]),
        notes=[],
        environment={},
        hashes={},
    )


def query_row(checkpoint: str, i: int, sign: int) -> dict[str, object]:
    """Pretraining wins at the epoch that `sign` names, on most queries; the loss rises with `sign` at every step."""
    epoch = CHECKPOINTS.index(checkpoint)
    ahead = epoch == {1: 2, -1: 1, 0: i % 2 + 1}[sign] and i < 30
    loss = (
        2 + 0.1 * sign * epoch + 0.01 * (i % 7)
        if sign
        else 2 + 0.01 * (-1) ** (i // 4 + epoch) * (1 + i % 4) + (epoch > 1) * 1e-4
    )
    return {
        "checkpoint": checkpoint,
        "epoch": epoch,
        "query_id": f"q{i}",
        "winner": "pretrain" if ahead else "finetune",
        "loss": loss,
    }


FORMAT_QUESTION = "Does the format alone bring `medical` as `chatml` closer?"
SAID = {
    "Domain relevance: `medical` over `songs` as `chatml`": (
        "`medical` is closer",
        "`songs` is closer",
        "+20.0% [+10.0%, +30.0%]",
    ),
    "Is fine-tuning closer than `medical` as `chatml`?": (
        "fine-tuning is closer",
        "pretraining is closer",
        "1.200 [1.100, 1.300]",
    ),
    "Does the dominance of `medical` as `chatml` rise with training?": (
        "it rises",
        "it falls",
        "+75.0 percentage points",
    ),
    "Is the dominance of `medical` as `chatml` higher at low learning rates?": (
        "it rises",
        "it falls",
        "+75.0 percentage points",
    ),
    FORMAT_QUESTION: (
        "brings it closer",
        "takes it further away",
        "+20.0% [+10.0%, +30.0%]",
    ),
    "Does the format effect of `medical` as `chatml` fall with training?": (
        "it rises",
        "it falls",
        "0.800 [0.700, 0.900]",
    ),
    "LARK against `bm25`: FT wins over `medical` as `chatml`": (
        "ahead more often",
        "ahead less often",
        "+20.0 percentage points [+10.0, +30.0]",
    ),
    "Does fine-tuning raise accuracy?": ("it rose", "it fell", "70.0% [65.0%, 75.0%]"),
    "Does the model overfit?": ("overfits there", "no sign of overfitting", "+0.100 nats"),
    "Does `cosine` find the samples stating the answer best?": (
        "`cosine` is better",
        "`bm25` is better",
        "+0.100 [+0.050, +0.150]",
    ),
}


def test_wording_follows_the_sign():
    texts = {sign: {f.question: f for f in findings(results_with(sign))} for sign in (1, -1, 0)}
    others = {"Are sketches smaller than gradients?", "How many tests were made"}
    assert set(texts[1]) == set(texts[-1]) == set(texts[0]) == set(SAID) | others
    for question, (above, below, figures) in SAID.items():
        up, down, none = (texts[sign][question] for sign in (1, -1, 0))
        assert above in up.text, up
        assert below not in up.text
        assert figures in up.text
        assert below in down.text, down
        assert above not in down.text
        assert NO_DIFFERENCE in none.text, none
        assert above not in none.text
        assert below not in none.text
        falls = "fall with" in question
        assert (up.holds, down.holds, none.holds) == (not falls, falls, None)
        assert all(NO_DIFFERENCE not in finding.text for finding in (up, down))
    assert "−20.0% [−30.0%, −10.0%]" in texts[-1]["Domain relevance: `medical` over `songs` as `chatml`"].text


def test_all_tests_are_counted():
    """p = 0.04 is enough alone, and not among tests that show nothing."""
    almost = {"difference": 0.1, "difference_low": 0.01, "difference_high": 0.2, "p_value": 0.04}
    base = results_with(0)
    one = replace(base, relevance=base.relevance.with_columns(**{k: pl.lit(v) for k, v in almost.items()}))
    domain, *_, counted = findings(one)
    assert "p = 0.04, q = 0.36" in domain.text
    assert NO_DIFFERENCE in domain.text
    assert domain.holds is None
    assert counted.text.startswith("9 differences were tested")
    assert "these 40" in counted.text
    others = ("dominance", "format_effect", "methods", "queries", "truth", "truth_gaps")
    empty = {name: getattr(base, name).clear() for name in others}
    alone = findings(replace(one, **empty))[0]
    assert "p = 0.04, q = 0.04" in alone.text
    assert alone.holds is True


def test_gap_within_the_sketch_error_is_noted():
    texts = {f.question: f.text for f in findings(results_with(1))}
    assert "standard deviation up to 0.004 in a mean max influence" in texts["How many tests were made"]
    base, names = results_with(1), ("relevance", "dominance")
    wide = {name: getattr(base, name).with_columns(sketch_error=pl.lit(0.11)) for name in names}
    unsure = {f.question: f.text for f in findings(replace(base, **wide))}
    for question in (
        "Domain relevance: `medical` over `songs` as `chatml`",
        "Is fine-tuning closer than `medical` as `chatml`?",
    ):
        assert "another seed may reverse this" not in texts[question]
        assert unsure[question].endswith("The sketch error is up to 0.110: another seed may reverse this.")


def test_ratios_of_single_queries_are_reported_where_defined():
    base = results_with(1)
    spread = "The median of 38 queries' ratios is 1.500, the quartiles are 0.750 and 2.250."
    questions = ("Is fine-tuning closer than `medical` as `chatml`?", FORMAT_QUESTION)
    texts = {f.question: f.text for f in findings(base)}
    none = {name: getattr(base, name).with_columns(n_ratio=0) for name in ("dominance", "format_effect")}
    without = {f.question: f.text for f in findings(replace(base, **none))}
    for question in questions:
        assert spread in texts[question]
        assert "quartiles" not in without[question]


def test_undefined_ratios_have_no_verdict_on_size():
    nothing = dict.fromkeys(("low", "high"), pl.lit(None, pl.Float64))
    base = results_with(1)
    undefined = replace(
        base,
        dominance=base.dominance.with_columns(ratio=pl.lit(None, pl.Float64), **nothing),
        format_effect=base.format_effect.with_columns(value=pl.lit(None, pl.Float64), **nothing),
    )
    answers = {f.question: f for f in findings(undefined)}
    dominance = answers["Is fine-tuning closer than `medical` as `chatml`?"]
    assert "ratio undefined (40 queries" in dominance.text
    assert dominance.holds is True  # by the test of the difference
    effect = answers[FORMAT_QUESTION]
    assert "undefined in mean max influence" in effect.text
    assert "a mean is not above 0" in effect.text
    assert NO_DIFFERENCE not in effect.text
    assert effect.holds is None


def test_each_format_has_its_own_findings():
    base = results_with(1)
    other = base.format_effect.with_columns(variant=pl.lit("formatted"), value=pl.col("value") + 2)
    both = replace(base, format_effect=pl.concat([base.format_effect, other]))
    texts = {f.question: f.text for f in findings(both)}
    for variant, value in (("chatml", "+20.0%"), ("formatted", "+220.0%")):
        text = texts[f"Does the format alone bring `medical` as `{variant}` closer?"]
        assert f"`medical` as `{variant}` over itself as `raw`" in text
        assert value in text
    falls = texts["Does the format effect of `medical` as `formatted` fall with training?"]
    assert falls.startswith("The format effect (`formatted` over `raw`) of `medical` is 2.800 ")


def test_interval_across_zero_and_undefined_value_are_worded():
    base = results_with(1)
    wide = replace(base, relevance=base.relevance.with_columns(difference_low=pl.lit(-0.1)))
    assert findings(wide)[0].holds is None
    assert NO_DIFFERENCE in findings(wide)[0].text
    nothing = pl.lit(None, pl.Float64)
    undefined = findings(
        replace(base, relevance=base.relevance.with_columns(value=nothing, low=nothing, high=nothing))
    )[0]
    assert "+0.100 [+0.050, +0.150] in mean max influence (0.500 against 0.400" in undefined.text
    assert undefined.holds is True


def test_storage_has_units():
    (storage,) = [
        finding for finding in findings(results_with(1)) if finding.question == "Are sketches smaller than gradients?"
    ]
    assert storage.text == (
        "A sketch takes 100.0 kB on disk, all 100 take 10.0 MB. Gradients of the 50,000,000 sketched parameters "
        "would take 100.0 MB each and 10.0 GB in total in fp16 (1,000.0 times as much)."
    )
    assert storage.holds is True


@pytest.mark.parametrize(
    ("sign", "words"), [(1, "no sign of training"), (-1, "pretraining is closer"), (0, NO_DIFFERENCE)]
)
def test_lead_before_training_is_reported(sign, words):
    base = results_with(sign)
    before = base.dominance.with_columns(checkpoint=pl.lit("base"), epoch=pl.lit(0, base.dominance.schema["epoch"]))
    both = replace(base, dominance=pl.concat([before, base.dominance]))
    (lead,) = [finding for finding in findings(both) if "before any training" in finding.question]
    assert words in lead.text
    assert "not yet trained on it, fine-tuning is ahead of `medical` as `chatml` on 50.0% of 40 queries" in lead.text
    assert lead.holds is {1: True, -1: False, 0: None}[sign]
