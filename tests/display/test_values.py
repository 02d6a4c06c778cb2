"""Values of tables are rounded by the name and the type of their column."""

from __future__ import annotations

import datetime as dt

import polars as pl
import pytest

from lark_store.display.texts import shortened, starts
from lark_store.display.values import exact, rounded


@pytest.mark.parametrize(
    ("name", "values", "cells"),
    [
        ("score", [0.123456, -0.00004, None], ["0.1235", "-4e-05", ""]),
        ("ratio", [28.5993, 4.1496], ["28.60", "4.15"]),
        ("noise", [0.01761, 0.0077], ["0.018", "0.008"]),
        ("learning_rate", [2e-4, 1e-4], ["0.0002", "0.0001"]),
        ("learning_rate", [2e-5, 1e-5], ["2e-05", "1e-05"]),
        ("p_value", [0.03125, 1e-9, 1.0, None], ["0.031", "<0.001", "1.000", ""]),
        ("q_value", [float("nan")], ["nan"]),
        ("n_samples", [1200, 7], ["1,200", "7"]),
        ("year", [2015, 2016], ["2015", "2016"]),
        ("seed", [123456], ["123456"]),
        ("ingest_run", [1200], ["1200"]),
        ("bytes", [512, 81_920, 1_300_000_000], ["512 B", "80 KiB", "1.2 GiB"]),
        ("peak_bytes", [None, 1 << 20], ["", "1 MiB"]),
        ("seconds", [0.0213, 12, 200, 7_500], ["0.021 s", "12 s", "3 min 20 s", "2 h 5 min"]),
        ("ok", [True, False, None], ["yes", "no", ""]),
        ("at", [dt.datetime(2026, 11, 30, 9, 5, 1)], ["2026-11-30 09:05"]),  # noqa: DTZ001  as the views have it
        ("weights_sha256", ["0123456789abcdef" * 4], ["0123456789ab…"]),
        ("sample_id", ["0123456789abcdef" * 4], ["0123456789abcdef" * 4]),
        ("shape", [[384, 64]], ["384, 64"]),
        ("text", ["two\n lines\x1b[31m"], ["two lines�[31m"]),
        ("recipe", ['{"a":1,"b":2}'], ['{"a": 1, "b": 2}']),
        ("large", [1.5e20, 3.0], ["1.5e+20", "3"]),
        ("x", [float("inf"), 1.0], ["inf", "1"]),
    ],
)
def test_values_are_rounded(name, values, cells):
    assert rounded(pl.Series(name, values, strict=False)).cells == cells


def test_exact_values_are_complete():
    assert exact(pl.Series("score", [0.1234567891234, None])).cells == ["0.1234567891234", ""]
    assert exact(pl.Series("bytes", [1_300_000_000])).cells == ["1300000000"]
    assert exact(pl.Series("x", [{"a": [1, 2]}])).cells == ['{"a": [1, 2]}']
    assert exact(pl.Series("x", [b"\x01\xff"])).cells == ["01ff"]


@pytest.mark.parametrize("width", [18, 40, 75])
@pytest.mark.parametrize("n_lines", [1, 2, 3])
@pytest.mark.parametrize(
    "text", ["one two three four " * 20 + "end", "日本語の長い文章です。" * 20, "x" * 300, "a " * 300]
)
def test_shortened_texts_fit_and_end_as_they_did(text, width, n_lines):
    lines = shortened(text.strip(), width, n_lines, start=9)
    assert len(lines) <= n_lines
    assert max(map(len, lines)) <= width
    assert "…" in " ".join(lines)
    if " " in text.strip() and width * n_lines >= 28:
        assert lines[-1].split()[-1] == text.split()[-1]


def test_texts_without_a_common_beginning_start_at_their_beginning():
    assert starts(["short", "another text that is long enough", "short"]) == [0, 0, 0]
    same = "one and the same text that two hits have"
    assert starts([same, same]) == [0, 0]
