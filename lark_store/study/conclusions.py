"""A study's findings: its numbers in words, with q-values by Benjamini–Hochberg over all tests of the findings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import polars as pl

from lark_store.stats.significance import benjamini_hochberg
from lark_store.study.claims import CLAIMS
from lark_store.study.wording import ALPHA, number

if TYPE_CHECKING:
    from lark_store.study.results import Results

    Qs = list[float | None]


@dataclass(frozen=True)
class Finding:
    """A question, the answer in words, and whether it is yes (None: undecided)."""

    question: str
    text: str
    holds: bool | None


def findings(results: Results) -> list[Finding]:
    """Return a study's findings in the order of the paper's questions, then the number of tests."""
    claims = [claim for ask in CLAIMS for claim in ask(results)]
    p = pl.Series([value for claim in claims for value in claim.tests], dtype=pl.Float64)
    q = pl.Series(benjamini_hochberg(p.fill_null(float("nan")).to_numpy()), dtype=pl.Float64).fill_nan(None).to_list()
    answers, start = [], 0
    for claim in claims:
        text, holds = claim.say(q[start : start + len(claim.tests)])
        answers.append(Finding(claim.question, text, holds))
        start += len(claim.tests)
    return [*answers, *_test_count(results, q)]


def _test_count(results: Results, q: Qs) -> list[Finding]:
    tests = [value for value in q if value is not None]
    if not tests:
        return []
    passed = sum(value <= ALPHA for value in tests)
    errors = results.influence["sketch_error"].drop_nulls()
    sketch = ""
    if len(errors):
        sketch = (
            f" Sketching adds an error (standard deviation up to {number(max(errors))} in a mean max influence), "
            "shared by all queries: more queries do not reduce it."
        )
    text = (
        f"{len(tests)} differences were tested; q-values are Benjamini–Hochberg's over all "
        f"{len(tests)}, and {passed} have q ≤ {ALPHA}. They generalise to other queries like these "
        f"{results.queries['query_id'].n_unique()}, not to another seed, model or choice of samples."
        f"{sketch}"
    )
    return [Finding("How many tests were made", text, None)]
