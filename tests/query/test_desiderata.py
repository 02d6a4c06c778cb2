"""`eif-report`: desiderata of measured influence over draws, from matrices with known answers."""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers.program import lark
from scipy import stats

from lark_store.domains import DOMAINS
from lark_store.errors import NameUnknownError, NothingToScoreError
from lark_store.stats.influence_matrix import asymmetry, density, related_pairs, self_over_others, unrelated_pairs

ROLES = list(DOMAINS["squares"].statements)


@pytest.fixture
def measured(statements, monkeypatch):
    """Measured influence with chosen values: training symmetric, context not."""
    from lark_store.eif import meter

    def after(shift):
        def chosen(self, sample, queries):
            before = self.before(queries)
            return before - np.array([influence(sample, query, shift) for query in queries])

        return chosen

    monkeypatch.setattr(meter.TrainingMeter, "after", after(0.0))
    monkeypatch.setattr(meter.ContextMeter, "after", after(0.5))
    for options in ({}, {"in_context": True}):
        statements.eif("base", "squares", queries="squares", variant="text", by_draw=True, **options)
    return statements


def influence(sample, query, shift):
    """1 on itself; else the product of the lengths, with `shift` for queries shorter than the sample."""
    a, b = len(sample.input_ids), len(query.input_ids)
    if sample.input_ids == query.input_ids:
        return 1.0
    return a * b / 1e4 + shift * (b < a)


def matrices(store, mode):
    """The stored matrix of each draw, by role."""
    rows = store.sql(
        "select e.draw, s.meta->>'role' as z, q.meta->>'role' as x, e.value from eif e "
        "join samples s on s.source = e.source and s.sample_id = e.sample_id "
        "join samples q on q.source = e.queries and q.sample_id = e.query_id where mode = ?", [mode]
    )  # fmt: skip
    result = {}
    for draw, z, x, value in rows.iter_rows():
        result.setdefault(draw, np.full((len(ROLES),) * 2, np.nan))[ROLES.index(z), ROLES.index(x)] = value
    return [result[draw] for draw in sorted(result)]


def row(frame, desideratum, mode):
    (found,) = frame.filter(desideratum=desideratum, mode=mode).rows(named=True)
    return found


def test_figures_are_means_over_draws(measured):
    frame = measured.eif_report("base")
    is_unrelated = np.array([role == "unrelated" for role in ROLES])
    for mode in ("finetune", "context"):
        of_draws = matrices(measured, mode)
        assert len(of_draws) == 2
        contrast = DOMAINS["squares"].contrasts[0]
        values = [
            m[tuple(map(ROLES.index, contrast.larger))] - m[tuple(map(ROLES.index, contrast.smaller))] for m in of_draws
        ]
        scales = [np.abs(related_pairs(m, is_unrelated)).mean() for m in of_draws]
        found = row(frame, contrast.name, mode)
        assert found["value"] == pytest.approx(np.mean(values))
        assert found["relative"] == pytest.approx(np.mean(np.array(values) / scales))
        assert found["share"] == pytest.approx(np.mean(np.array(values) > 0))
        assert found["n_draws"] == 2
        assert found["learning_rate"] == (1e-4 if mode == "finetune" else None)
        assert row(frame, "asymmetry", mode)["value"] == pytest.approx(np.mean([asymmetry(m) for m in of_draws]))
        assert row(frame, "self over others", mode)["value"] == pytest.approx(
            np.mean(list(map(self_over_others, of_draws)))
        )
    assert row(frame, "asymmetry without the diagonal", "finetune")["value"] == pytest.approx(0, abs=1e-6)
    assert row(frame, "asymmetry without the diagonal", "context")["value"] > 0.1
    gap = row(frame, "self over others", "context − finetune")
    single = [row(frame, "self over others", mode)["relative"] for mode in ("context", "finetune")]
    assert gap["value"] == pytest.approx(single[0] - single[1])


def test_the_test_of_a_contrast_is_a_permutation_of_signs(measured):
    found = row(measured.eif_report("base"), "self over others", "finetune")
    values = np.array([self_over_others(m) for m in matrices(measured, "finetune")])
    expected = stats.permutation_test((values,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert found["p_value"] == pytest.approx(expected.pvalue)
    assert found["low"] <= found["value"] <= found["high"]
    assert row(measured.eif_report("base"), "asymmetry", "finetune")["p_value"] is None


def test_measurements_can_be_chosen(measured):
    assert measured.eif_report("base", learning_rate=1e-4, optimizer="sgd", sources="squares")["mode"].n_unique() == 3
    for options in ({"learning_rate": 1e-2}, {"optimizer": "adamw"}):
        assert set(measured.eif_report("base", **options)["mode"]) == {"context"}
    with pytest.raises(NameUnknownError):
        measured.eif_report("base", sources=["none"])
    with pytest.raises(NameUnknownError):
        measured.eif_report("none")


def test_nothing_measured_is_an_error(statements):
    with pytest.raises(NothingToScoreError, match="no influence of a domain is measured at `base`"):
        statements.eif_report("base")


@pytest.mark.folder
def test_the_command_prints_the_rows(measured):
    expected = measured.eif_report("base")
    measured.close()
    result = lark("eif-report -c base -f json", store=measured.path)
    assert json.loads(result.out) == json.loads(expected.write_json())


def test_density_counts_pairs_above_the_unrelated_ones():
    rng = np.random.default_rng(0)
    matrix, is_unrelated = rng.normal(size=(40, 40)), np.arange(40) >= 20
    assert density(matrix, is_unrelated) == pytest.approx(0.05, abs=0.03)
    matrix[:20, :20] *= 100
    assert density(matrix, is_unrelated) > 0.95
    assert len(unrelated_pairs(matrix, is_unrelated)) == 2 * 20 * 20
    assert len(related_pairs(matrix, is_unrelated)) == 20 * 19
