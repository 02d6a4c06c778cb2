"""The study's figures and tables as they are read: valid charts, right numbers, nothing drawn without data."""

from __future__ import annotations

import dataclasses
import json
import struct

import polars as pl
import pytest
from helpers.study import example_results, stripped

from lark_store.charts import numbers
from lark_store.study import charts, presentation


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return example_results(tmp_path_factory.mktemp("study"), [f"q{i}" for i in range(12)])


def test_every_figure_is_drawn_as_png_and_svg(results, tmp_path):
    drawn = charts.figures(results)
    assert list(drawn) == list(presentation.FIGURES)
    paths = charts.save(drawn, tmp_path / "figures")
    assert [path.name for path in paths] == [f"{name}.{kind}" for name in drawn for kind in ("png", "svg")]
    for path in paths:
        content = path.read_bytes()
        if path.suffix == ".png":
            width, height = struct.unpack(">II", content[16:24])
            assert content.startswith(b"\x89PNG"), path
            assert (width, height) > (1000, 400), path
        else:
            assert content.startswith(b"<svg"), path
            assert content.count(b"aria-roledescription") > 4 or path.stem == "trajectories", path


def test_figures_are_reproducible_byte_for_byte(results, tmp_path):
    first, second = (charts.save(charts.figures(results), tmp_path / name) for name in ("one", "two"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_control_characters_in_ids_do_not_stop_a_study(tmp_path):
    drawn = charts.figures(example_results(tmp_path, [f"q\x1b{i}" for i in range(12)]))
    assert len(charts.save(drawn, tmp_path)) == 2 * len(presentation.FIGURES)


@pytest.mark.parametrize(
    ("table", "gone"),
    [
        ("influence", {"influence", "influence-raw", "heatmap"}),
        ("dominance", {"pt-wins"}),
        ("storage", {"storage"}),
        ("methods", {"methods"}),
        ("queries", {"trajectories"}),
        ("truth", {"truth"}),
    ],
)
def test_a_figure_without_data_is_left_out(results, table, gone):
    assert set(presentation.FIGURES) - set(charts.figures(stripped(results, table))) == gone


def test_nonfinite_numbers_are_null_in_charts(results):
    hurt = results.influence.with_columns(high=pl.lit(float("nan")), low=pl.lit(float("-inf")))
    for chart in charts.figures(dataclasses.replace(results, influence=hurt)).values():
        json.dumps(chart.to_dict(), allow_nan=False)


def drawn_values(chart) -> list[dict[str, object]]:
    return [row for rows in chart.to_dict()["datasets"].values() for row in rows]


def test_low_learning_rate_is_marked(results):
    spans = [row for row in drawn_values(charts.figures(results)["pt-wins"]) if "label" in row]
    assert [(row["start"], row["label"]) for row in spans] == [(3.5, "learning rate 2e-5")]
    level = results.checkpoints.with_columns(learning_rate=2e-4)
    spans = drawn_values(charts.figures(dataclasses.replace(results, checkpoints=level))["pt-wins"])
    assert not [row for row in spans if "label" in row]


def test_trajectory_shows_differences_and_the_median_of_all(results):
    rows = drawn_values(charts.figures(results)["trajectories"])
    queries = results.queries.with_columns(gap=pl.col("ft") - pl.col("pt"))
    gaps = {(row["query_id"], row["epoch"]): row["gap"] for row in rows if "query_id" in row}
    assert len(gaps) == len(queries)
    for query_id, epoch, gap in queries.select("query_id", "epoch", "gap").iter_rows():
        assert gaps[query_id, epoch] == pytest.approx(gap, rel=1e-4)
    medians = {row["epoch"]: row["gap"] for row in rows if "queries" in row}
    expected = queries.group_by("epoch").agg(pl.median("gap"))
    assert medians == {epoch: pytest.approx(gap, rel=1e-4) for epoch, gap in expected.iter_rows()}


def test_method_comparison_uses_the_recipes_epoch(results):
    rows = [row for row in drawn_values(charts.figures(results)["methods"]) if row.get("method") == "BM25"]
    expected = results.methods.filter(epoch=5, method="bm25")
    assert [row["wins"] for row in rows] == pytest.approx(expected["rival_ft_wins"].to_list(), rel=1e-4)
    for row, (wins, low, high) in zip(rows, expected.select("ft_wins", "low", "high").iter_rows(), strict=True):
        assert row["low"] == pytest.approx(max(wins - high, 0), rel=1e-4)
        assert row["high"] == pytest.approx(min(wins - low, 1), rel=1e-4)


@pytest.mark.parametrize(
    ("output", "text"),
    [
        (presentation.number(-0.12345), "−0.123"),
        (presentation.number(None), "–"),
        (presentation.number(float("nan")), "–"),
        (presentation.share(0.4167), "41.7%"),
        (presentation.change(0.672), "+67.2%"),
        (presentation.change(-0.0001), "0.0%"),
        (presentation.points(-0.25), "−25.0"),
        (presentation.p_value(0.0004), "< 0.001"),
        (presentation.p_value(0.021), "0.021"),
        (numbers.rate_text(2e-5), "2e-5"),
        (numbers.rate_text(1.5e-4), "1.5e-4"),
        (numbers.bytes_text(132_400), "132 kB"),
        (numbers.bytes_text(999), "999 B"),
        (numbers.bytes_text(28e9), "28 GB"),
        (numbers.times_text(2031.9), "2,030×"),
        (numbers.times_text(1.0), "1×"),
    ],
)
def test_number_formatting(output, text):
    assert output == text


def test_tables_have_captions(results):
    sheets = {sheet.label: sheet for sheet in presentation.sheets(results)}
    assert list(sheets) == [
        "Table I", "Table I b", "Table II", "Table II b", "Table II c", "Table III", "Table IV", "Table V", "Table VI",
        "Table VII",
    ]  # fmt: skip
    assert all(len(row) == len(sheet.heads) for sheet in sheets.values() for row in sheet.rows)
    first = results.influence.filter(epoch=5).row(1, named=True)
    output = f"{first['mean_max_influence']:.3f}", f"[{first['low']:.3f}, {first['high']:.3f}]"
    assert sheets["Table I"].rows[1][3:5] == list(output)
    assert "epoch-5; 12 queries" in sheets["Table I"].caption
    assert [row[0] for row in sheets["Table II"].rows] == ["base", "1", "2", "3", "4", "5"]
    assert len(sheets["Table II b"].rows) == 18


def test_tables_show_ratios_of_means_and_of_queries(results):
    sheets = {sheet.label: sheet for sheet in presentation.sheets(results)}
    row = results.dominance.filter(epoch=2, source="medical", variant="chatml").row(0, named=True)
    effect = results.format_effect.filter(epoch=2, source="medical").row(0, named=True)
    for label, number, name, shown in (("Table II", 2, "FT/PT", row), ("Table II c", 2, "over raw", effect)):
        sheet = sheets[label]
        cells = dict(zip([head for head, _ in sheet.heads], sheet.rows[number], strict=True))
        assert cells[name] == f"{shown.get('ratio', shown.get('value')):.3f}"
        assert cells["median R(q)"] == f"{shown['r_median']:.3f}"
        assert cells["quartiles"] == f"{shown['r_q1']:.3f} to {shown['r_q3']:.3f}"
        assert cells["queries with R(q)"] == "10"
    assert sheets["Table II c"].rows[0][:3] == ["medical", "chatml", "base"]
    spread = dict.fromkeys(("r_median", "r_q1", "r_q3"), pl.lit(None, pl.Float64))
    undefined = results.dominance.with_columns(**spread, n_ratio=0)
    table = {s.label: s for s in presentation.sheets(dataclasses.replace(results, dominance=undefined))}["Table II"]
    assert [table.rows[0][i] for i, (head, _) in enumerate(table.heads) if head in {"median R(q)", "quartiles"}] == [
        "–"
    ] * 2
