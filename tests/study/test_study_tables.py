"""The study's tables against plain loops over the store's rows, the truth with ties."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import pytest
from helpers.checkpoints import save_checkpoint
from helpers.texts import qa_rows, text_rows, write_jsonl

from lark_store import Store
from lark_store.errors import InputError, NothingToScoreError
from lark_store.stats.bootstrap import intervals
from lark_store.study import known_answers, tables
from lark_store.study.conclusions import findings
from lark_store.study.recipe import Recipe

if TYPE_CHECKING:
    from lark_store.study.results import Results

FACT = 'the/"fact"~'
METHODS = ["cosine", "dot", "bm25"]
CHECKPOINTS = ["base", "epoch-1", "epoch-2"]
GROUPS = [
    ("finetune", "chatml"),
    ("medical", "chatml"),
    ("medical", "raw"),
    ("songs", "chatml"),
    ("songs", "raw"),
]
MEASURED = {"accuracy": 0.5, "accuracy_low": 0.4, "accuracy_high": 0.6, "n_evaluated": 6.0, "train_loss": 1.25}
MEASURED |= {"macro_f1": 0.3, "macro_f1_low": 0.2, "macro_f1_high": 0.4}


def with_facts(rows: list[dict[str, object]], facts: list[object]) -> list[dict[str, object]]:
    return [row | {FACT: fact} for row, fact in zip(rows, facts, strict=True)]


def sources(folder: Path) -> list[dict[str, object]]:
    """Four sources; `short` has one token and as `raw` no target; the copies of fine-tuning samples make for ties."""
    tuning = with_facts(qa_rows(6), ["f0", "f1", "f2", "f0", 7, None])
    medical = [
        *with_facts(text_rows(5, "kidney"), ["f0", "f1", "f3", None, ""]),
        {"id": "short", "text": "a"},
        *qa_rows(3),
    ]
    songs = [
        *with_facts(text_rows(6), ["f0", "f3", "f3", "7", "f9", "f9"]),
        {"id": "copy", "text": text_rows(6)[1]["text"]},
    ]
    queries = with_facts(qa_rows(7, start=100), ["f0", "f1", "f2", "f3", "7", "", "nowhere"])
    files = {"finetune": tuning, "medical": medical, "songs": songs, "test": queries}
    stages = {"finetune": "finetune", "test": "query"}
    return [
        {
            "name": name,
            "stage": stages.get(name, "pretrain"),
            "uri": str(write_jsonl(folder / f"{name}.jsonl", rows)),
            "variants": ["chatml"] if name in stages else ["raw", "chatml"],
        }
        for name, rows in files.items()
    ]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("study")
    return Recipe.model_validate(
        {
            "title": "tiny",
            "folder": folder,
            "model": {"path": "a/tiny"},
            "finetune": {"learning_rates": [2e-4, 2e-5]},
            "compare": {"methods": METHODS},
            "truth": {"column": FACT},
            "source": sources(folder),
        }
    )


@pytest.fixture(scope="module")
def path(recipe: Recipe) -> Path:
    """The study's store, ingested and scored; to be read only."""
    with Store.create(recipe.store) as store:
        for epoch, name in enumerate(CHECKPOINTS):
            rate = recipe.finetune.learning_rates[epoch - 1] if epoch else None
            folder = save_checkpoint(recipe.folder / name, seed=epoch)
            options = {
                "epoch": epoch,
                "step": 10 * epoch,
                "learning_rate": rate,
                "metrics": MEASURED if epoch else None,
            }
            store.checkpoint_add(name, folder, **options)
        for source in recipe.source:
            store.source_add(source.name, source.uri, stage=source.stage)
        store.sketcher_add("study", k=1024)
        store.ingest(CHECKPOINTS, ["finetune", "test"], ["chatml"], sketcher="study")
        store.ingest(CHECKPOINTS, ["medical", "songs"], ["raw", "chatml"], sketcher="study")
        for method in METHODS:
            store.attribute(CHECKPOINTS, queries="test", sketcher="study", method=method)
    return recipe.store


@pytest.fixture(scope="module")
def results(path: Path, recipe: Recipe) -> Results:
    guesses = [
        {"checkpoint": "epoch-1", "query_id": "q100", "label": "yes", "prediction": "no", "correct": False},
        {"checkpoint": "epoch-1", "query_id": "q101", "label": "no", "prediction": "no", "correct": True},
        {"checkpoint": "epoch-1", "query_id": "elsewhere", "label": "no", "prediction": "no", "correct": True},
    ]
    with Store.open(path) as store:
        given = {"environment": {"python": "3"}, "hashes": {"a": "b"}, "notes": ["a note"]}
        return tables.collect(store, recipe, predictions=pl.DataFrame(guesses), **given)


@pytest.fixture(scope="module")
def scores(path: Path) -> dict[tuple[str, ...], dict[str, float]]:
    """The scores of all samples by (method, checkpoint, query, source, variant): from `influence`, by a loop."""
    actual: dict[tuple[str, ...], dict[str, float]] = {}
    with Store.open(path) as store:
        for row in store.sql("SELECT * FROM influence").iter_rows(named=True):
            key = tuple(row[name] for name in ("method", "checkpoint", "query_id", "source", "variant"))
            actual.setdefault(key, {})[row["sample_id"]] = row["score"]
    return actual


@pytest.fixture(scope="module")
def phi(scores):
    """Φ of each query, a list in the queries' order, by (method, checkpoint, source, variant)."""
    queries = sorted({key[2] for key in scores})
    assert len(queries) == 7
    return {
        (method, checkpoint, source, variant): [
            max(scores[method, checkpoint, q, source, variant].values()) for q in queries
        ]
        for method in METHODS
        for checkpoint in CHECKPOINTS
        for source, variant in GROUPS
    }


def exact_p(differences: list[float]) -> float:
    """The paired permutation test by all changes of sign."""
    sums = [
        sum(s * d for s, d in zip(signs, differences, strict=True)) for signs in itertools.product((1, -1), repeat=7)
    ]
    seen = sum(differences)
    ends = (sum(s >= seen - 1e-9 for s in sums), sum(s <= seen + 1e-9 for s in sums))
    return min(1.0, 2 * min(ends) / len(sums))


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def ratio(top, bottom) -> float | None:
    """The ratio of two means, where both are above 0."""
    return mean(top) / mean(bottom) if min(mean(top), mean(bottom)) > 0 else None


def per_query(row, top, bottom) -> None:
    """Compare a row's ratios of single queries with numpy's."""
    ratios = [a / b for a, b in zip(top, bottom, strict=True) if b > 0]
    spread = [float(x) for x in np.quantile(ratios, [0.5, 0.25, 0.75])] if ratios else [None] * 3
    close([row["r_median"], row["r_q1"], row["r_q3"]], spread)
    assert (row["n_ratio"], row["n_queries"]) == (len(ratios), 7)


def bounds(top, bottom=None) -> list[float]:
    columns = [np.array(side)[:, None] for side in (top, bottom) if side is not None]
    low, high = intervals(*columns)
    return [float(low[0]), float(high[0])]


def share_bounds(wins) -> list[float]:
    """As `bounds`; of all or none, Clopper and Pearson's: (α/2)^(1/n) for n of n."""
    wins = list(wins)
    edge = 0.025 ** (1 / len(wins))
    return {0.0: [0, 1 - edge], 1.0: [edge, 1]}.get(mean(wins)) or bounds(wins)


def close(actual: list[object], expected: list[object]) -> None:
    """Compare two lists of numbers; NaN is null."""
    expected = [None if isinstance(x, float) and np.isnan(x) else x for x in expected]
    assert [x is None for x in actual] == [x is None for x in expected]
    assert [x for x in actual if x is not None] == pytest.approx([x for x in expected if x is not None], abs=1e-6)


def minus(left, right):
    return [a - b for a, b in zip(left, right, strict=True)]


def noises(values):
    """The standard deviation of each cosine from sketching."""
    return [(1 - x * x) / 32 for x in values]  # √1024


def test_influence_equals_plain_loops(results, phi):
    rows = results.influence.rows(named=True)
    assert [(r["epoch"], r["checkpoint"], r["source"], r["variant"]) for r in rows] == [
        (epoch, checkpoint, *group) for epoch, checkpoint in enumerate(CHECKPOINTS) for group in GROUPS
    ]
    for row in rows:
        mine = phi["cosine", row["checkpoint"], row["source"], row["variant"]]
        close([row["mean_max_influence"], row["low"], row["high"]], [mean(mine), *bounds(mine)])
        close([row["sketch_error"]], [mean(noises(mine))])
        assert row["n_queries"] == 7
        assert row["stage"] == ("finetune" if row["source"] == "finetune" else "pretrain")
        names = ("ft_wins", "ft_wins_low", "ft_wins_high")
        if row["source"] == "finetune":
            assert [row[name] for name in names] == [None] * 3
        else:
            wins = [
                float(f > p) for f, p in zip(phi["cosine", row["checkpoint"], "finetune", "chatml"], mine, strict=True)
            ]
            close([row[name] for name in names], [mean(wins), *share_bounds(wins)])


def test_relevance_equals_plain_loops(results, phi):
    rows = results.relevance.rows(named=True)
    assert [(r["epoch"], r["variant"], r["source"], r["against_source"]) for r in rows] == [
        (epoch, variant, "medical", "songs") for epoch in range(3) for variant in ("chatml", "raw")
    ]
    for row in rows:
        left, right = (phi["cosine", row["checkpoint"], name, row["variant"]] for name in ("medical", "songs"))
        value = None if ratio(left, right) is None else ratio(left, right) - 1
        close([row["value"], row["low"], row["high"]], [value, *(x - 1 for x in bounds(left, right))])
        gap = minus(left, right)
        close([row[f"difference{end}"] for end in ("", "_low", "_high")], [mean(gap), *bounds(gap)])
        close([row["p_value"], row["n_queries"]], [exact_p(gap), 7])
        close([row["sketch_error"]], [mean(np.hypot(noises(left), noises(right)).tolist())])


def test_dominance_equals_plain_loops(results, phi):
    rows = results.dominance.rows(named=True)
    assert [(r["epoch"], r["source"], r["variant"]) for r in rows] == [
        (epoch, *group) for epoch in range(3) for group in GROUPS[1:]
    ]
    for row in rows:
        ft = phi["cosine", row["checkpoint"], "finetune", "chatml"]
        pt = phi["cosine", row["checkpoint"], row["source"], row["variant"]]
        lost = [float(b > a) for a, b in zip(ft, pt, strict=True)]
        expected = [mean(ft), mean(pt), ratio(ft, pt), *bounds(ft, pt)]
        close([row[c] for c in ("ft", "pt", "ratio", "low", "high")], expected)
        per_query(row, ft, pt)
        close([row[c] for c in ("pt_wins", "pt_wins_low", "pt_wins_high")], [mean(lost), *share_bounds(lost)])
        close(
            [row["ft_wins"], row["p_value"]], [mean(a > b for a, b in zip(ft, pt, strict=True)), exact_p(minus(ft, pt))]
        )
        assert row["learning_rate"] == [None, 2e-4, 2e-5][row["epoch"]]
        assert row["accuracy"] == [None, 0.5, 0.5][row["epoch"]]


def test_format_effect_and_methods_equal_plain_loops(results, phi):
    for row in results.format_effect.rows(named=True):
        formatted, plain = (phi["cosine", row["checkpoint"], row["source"], v] for v in ("chatml", "raw"))
        close([row["value"], row["low"], row["high"]], [ratio(formatted, plain), *bounds(formatted, plain)])
        close([row["p_value"]], [exact_p(minus(formatted, plain))])
        per_query(row, formatted, plain)
    assert results.format_effect.select("epoch", "source", "variant").rows() == [
        (e, s, "chatml") for e in range(3) for s in ("medical", "songs")
    ]
    rows = results.methods.rows(named=True)
    assert [(r["epoch"], r["method"], r["source"], r["variant"]) for r in rows] == [
        (epoch, method, *group) for epoch in range(3) for method in METHODS[1:] for group in GROUPS[1:]
    ]
    for row in rows:
        wins = [
            [
                float(f > p)
                for f, p in zip(
                    phi[m, row["checkpoint"], *GROUPS[0]],
                    phi[m, row["checkpoint"], row["source"], row["variant"]],
                    strict=True,
                )
            ]
            for m in ("cosine", row["method"])
        ]
        gap = minus(*wins)
        close([row["ft_wins"], row["rival_ft_wins"], row["difference"]], [mean(wins[0]), mean(wins[1]), mean(gap)])
        close([row["low"], row["high"], row["p_value"]], [*bounds(gap), exact_p(gap)])


def test_queries_and_checkpoints_equal_plain_loops(results, phi, path):
    with Store.open(path) as store:
        losses = {
            (r["checkpoint"], r["sample_id"]): r["loss"]
            for r in store.sql("SELECT * FROM sketches WHERE source = 'test'").rows(named=True)
        }
    queries = sorted({query for _, query in losses})
    rows = results.queries.rows(named=True)
    assert [(r["checkpoint"], r["query_id"]) for r in rows] == [(c, q) for c in CHECKPOINTS for q in queries]
    for row in rows:
        i = queries.index(row["query_id"])
        ft, pt = (
            phi["cosine", row["checkpoint"], "finetune", "chatml"][i],
            phi["cosine", row["checkpoint"], "medical", "chatml"][i],
        )
        close([row["ft"], row["pt"], row["ratio"]], [ft, pt, ft / pt if pt > 0 else None])
        assert row["winner"] == ("finetune" if ft > pt else "pretrain" if pt > ft else "tie")
        assert row["loss"] == pytest.approx(losses[row["checkpoint"], row["query_id"]])
        guess = {"q100": ("no", False), "q101": ("no", True)} if row["checkpoint"] == "epoch-1" else {}
        assert (row["prediction"], row["correct"]) == guess.get(row["query_id"], (None, None))
        assert row["label"] == (
            ("yes", "no", "maybe")[int(row["query_id"][1:]) % 3]
            if row["query_id"] not in guess
            else {"q100": "yes", "q101": "no"}[row["query_id"]]
        )
    for epoch, row in enumerate(results.checkpoints.rows(named=True)):
        expected = dict.fromkeys(MEASURED) | (MEASURED if epoch else {})
        assert {name: row[name] for name in MEASURED} == expected
        assert (row["checkpoint"], row["epoch"], row["step"]) == (CHECKPOINTS[epoch], epoch, 10 * epoch)
        assert row["query_loss"] == pytest.approx(mean(losses[row["checkpoint"], q] for q in queries))


def test_storage_equals_the_size_on_disk(results, path):
    (folder,) = (
        (path / "vectors").glob("sketches_*.lance") if (path / "vectors").is_dir() else path.rglob("sketches_*.lance")
    )
    on_disk = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    n = 3 * (6 + 7 + 2 * 9 + 2 * 7 - 1)
    with Store.open(path) as store:
        n_parameters = sum(
            row["coordinates"] for row in store.sketcher_show("study", checkpoint="base").rows(named=True)
        )
    rows = results.storage.rows(named=True)
    assert [(r["model"], r["parameters"], r["measured"]) for r in rows[::3]] == [
        ("tiny", n_parameters, True),
        ("OLMo-3-7B", 7_298_011_136, False),
    ]
    for row in rows:
        per_byte = {"sketches": None, "gradients in fp16": 2, "gradients in fp32": 4}[row["what"]]
        size = on_disk / n if per_byte is None else row["parameters"] * per_byte
        close([row["bytes_per_sample"], row["times_smaller"]], [size, size / (on_disk / n)])
        assert (row["n_samples"], row["bytes"]) == (n, round(size * n))


def own_samples(path: Path) -> dict[str, set[tuple[str, str]]]:
    """A query's own samples, by a loop over the metadata."""
    with Store.open(path) as store:
        rows = store.sql("SELECT source, sample_id, meta FROM samples").rows(named=True)
    facts = {(row["source"], row["sample_id"]): json.loads(row["meta"]).get(FACT) for row in rows}
    return {
        query: {key for key, other in facts.items() if key[0] != "test" and str(other) == fact and other is not None}
        for (source, query), fact in facts.items()
        if source == "test" and fact
    }


@pytest.mark.parametrize("first", [10, 2])
def test_truth_equals_a_plain_loop_with_pessimistic_ties(first, path, recipe, scores, monkeypatch):
    monkeypatch.setattr(known_answers, "FIRST", first)
    own = {query: samples for query, samples in own_samples(path).items() if samples}
    assert len(own) == 5
    assert max(map(len, own.values())) > 2
    with Store.open(path) as store:
        actual = tables.collect(store, recipe)
    item: dict[tuple[str, str], list[tuple[float, float]]] = {}
    n_tied = 0
    for method, checkpoint in itertools.product(METHODS, CHECKPOINTS):
        for query in sorted(own):
            ranked = {
                (s, z): x
                for s in ("finetune", "medical", "songs")
                for z, x in scores[method, checkpoint, query, s, "chatml"].items()
            }
            assert len(ranked) == 22
            best = max(ranked[z] for z in own[query])
            others = [x for z, x in ranked.items() if z not in own[query]]
            n_tied += best in others
            places = sorted(
                1 + sum(x >= ranked[z] for x in others) + sum(ranked[o] > ranked[z] for o in own[query])
                for z in own[query]
            )
            hits = sum(place <= first for place in places)
            item.setdefault((checkpoint, method), []).append(
                (1 / (1 + sum(x >= best for x in others)), hits / min(first, len(own[query])))
            )
    assert n_tied > 0
    for row in actual.truth.rows(named=True):
        mine = item[row["checkpoint"], row["method"]]
        for name, i in (("mrr", 0), ("recall_at_10", 1)):
            values = [pair[i] for pair in mine]
            prefix = name.removesuffix("_at_10")
            close([row[name], row[f"{prefix}_low"], row[f"{prefix}_high"]], [mean(values), *bounds(values)])
        assert (row["n_queries"], row["n_samples"]) == (5, 22)
    assert actual.truth.select("checkpoint", "method").rows() == list(itertools.product(CHECKPOINTS, METHODS))
    for row in actual.truth_gaps.rows(named=True):
        i = ["mrr", "recall_at_10"].index(row["metric"])
        gap = [
            a[i] - b[i]
            for a, b in zip(item[row["checkpoint"], "cosine"], item[row["checkpoint"], row["method"]], strict=True)
        ]
        close([row["difference"], row["low"], row["high"]], [mean(gap), *bounds(gap)])
    assert len(actual.truth_gaps) == 3 * 2 * 2


def test_undefined_truth_is_an_error(path, recipe, tmp_path):
    with Store.open(path) as store:
        wrong = recipe.model_copy(update={"truth": recipe.truth.model_copy(update={"column": "nothing"})})
        with pytest.raises(InputError, match="no query of `test` has the same value of `nothing`"):
            tables.collect(store, wrong)
        none = tables.collect(store, recipe.model_copy(update={"truth": None}))
        assert none.truth.is_empty()
        assert "truth" not in none.tables()
        assert none.truth.columns == list(known_answers.TRUTH)
    shutil.copytree(path, tmp_path / "copy")
    with Store.open(tmp_path / "copy") as store:
        store.attribute(["epoch-1"], queries="test", sketcher="study", hits=3)
        with pytest.raises(InputError, match=r"9 of 22 samples are ranked by `cosine` at `epoch-1`[\s\S]*hits=9"):
            tables.collect(store, recipe)
        store.checkpoint_remove("epoch-2")
        with pytest.raises(NothingToScoreError, match=r"not scored by `cosine` at `epoch-2` yet"):
            tables.collect(store, recipe)


def test_notes_contain_warnings(results):
    notes = "\n".join(results.notes)
    assert results.notes[0] == "a note"
    assert "1 sample of `medical` as `raw` could not be sketched at `base`, `epoch-1` and `epoch-2`" in notes
    assert "(`finetune` 6, `medical` 9, `songs` 7)" in notes
    assert "Of 7 queries 5 have samples stating their answer" in notes
    losses = results.checkpoints["query_loss"].to_list()
    for i, name in enumerate(CHECKPOINTS[1:], 1):
        assert (f"nats at `{name}`" in notes) == (losses[i] > losses[i - 1])
    lost = results.dominance.filter(pl.col("n_ratio") < pl.col("n_queries"))
    assert notes.count("is undefined for") == lost.select("source", "variant").n_unique()
    assert (results.environment, results.hashes) == ({"python": "3"}, {"a": "b"})
    assert {name: f.columns for name, f in results.tables().items()}["storage"] == list(tables.STORAGE)


def test_findings_follow_from_the_tables(results):
    actual = {finding.question: finding for finding in findings(results)}
    row = results.relevance.filter(epoch=2, variant="chatml").row(0, named=True)
    text = actual["Domain relevance: `medical` over `songs` as `chatml`"].text
    assert f"{row['difference']:+.3f}".replace("-", "−") in text  # the ratio's interval is undefined
    assert "7 queries" in text
    assert actual["Are sketches smaller than gradients?"].holds is True
