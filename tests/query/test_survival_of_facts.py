"""Events of facts over checkpoints, and their survival analysis, on planted probes."""

from __future__ import annotations

import json

import numpy as np
import polars as pl
import pytest
from helpers.measured import add_course
from helpers.texts import write_jsonl
from scipy.stats import kstest
from typer.testing import CliRunner

from lark_store.cli.app import app
from lark_store.errors import InputError, NothingToScoreError
from lark_store.query.answers import survival as module
from lark_store.specs import SurvivalSpec
from lark_store.stats.survival import cox

# Facts × epochs 0 to 4: is the greedy answer correct?
COURSE = np.array(
    [[0, 1, 0, 1, 1], [0, 0, 0, 0, 0], [0, 0, 1, 1, 0], [1, 1, 0, 1, 0],
     [1, 1, 1, 1, 1], [0, 0, 0, 0, 1], [1, 1, 1, 0, 0]],
    bool,
)  # fmt: skip
SEEN = [True, True, False, True, False, False, False]
FIRST = {
    "f0": (1, True),
    "f1": (4, False),
    "f2": (2, True),
    "f3": (2, True),
    "f4": (4, False),
    "f5": (4, True),
    "f6": (3, True),
}
STABLE = FIRST | {"f0": (3, True), "f3": (4, False), "f5": (4, False)}
EVENTS = {
    **dict.fromkeys(("f0", "f1"), "acquisition"),
    **dict.fromkeys(("f2", "f5"), "generalisation"),
    **dict.fromkeys(("f3", "f4", "f6"), "degradation"),
}


@pytest.fixture
def followed(store):
    add_course(store, COURSE, [{"seen": seen, "size": i} for i, seen in enumerate(SEEN)], latent=[0, 0, 3, 9, 9, 1, 8])
    return store


@pytest.mark.parametrize(("rule", "expected"), [("first", FIRST), ("stable", STABLE)])
def test_events_by_hand(followed, rule, expected):
    rows = followed.sql("FROM fact_events(rule := $rule)", {"rule": rule})
    assert {r["sample_id"]: (r["time"], r["observed"]) for r in rows.iter_rows(named=True)} == expected
    assert dict(rows.select("sample_id", "event").iter_rows()) == EVENTS
    assert dict(rows.select("sample_id", "is_latent").iter_rows()) == {f"f{i}": i in {2, 5} for i in range(7)}
    assert set(rows["baseline"]) == {"e0"}


def test_baseline_and_checkpoints_bound_the_course(followed):
    rows = followed.sql("FROM fact_events(baseline := 'e1')")
    assert dict(rows.select("sample_id", "time").iter_rows())["f0"] == 1  # correct at e1, wrong at e2
    rows = followed.sql("FROM fact_events(checkpoints := ['e0', 'e2', 'e4'])")
    assert dict(rows.select("sample_id", "time").iter_rows())["f0"] == 4


def test_seen_facts_are_those_of_a_source(followed, tmp_path):
    train = [{"id": f"other-{i}", "prompt": f"p{i}", "response": f"r{i}"} for i in (1, 2)]
    followed.source_add("train", write_jsonl(tmp_path / "train.jsonl", train), stage="finetune")
    seen = followed.sql("SELECT sample_id FROM fact_events(seen_in := 'train') WHERE seen ORDER BY ALL")
    assert seen["sample_id"].to_list() == ["f1", "f2"]
    with pytest.raises(InputError, match="no fact has `known` in its metadata"):
        followed.survival(seen_key="known")
    with pytest.raises(InputError, match="`size` of a fact is 2, neither true nor false"):
        followed.survival(seen_key="size")


def test_curves_are_of_the_events(followed):
    report = followed.survival(event="learning", by="seen", covariates=["size"])
    seen = report.curves.filter(group="seen")
    assert seen.select("time", "n_risk", "n_events", "survival").rows() == [
        (0, 2, 0, 1),
        (1, 2, 1, 0.5),
        (4, 1, 0, 0.5),
    ]
    assert report.tests["n_groups"].item() == 2
    assert report.effects.select("covariate", "n", "n_events").row(0) == ("size", 4, 3)
    assert report.events["sample_id"].to_list() == ["f0", "f1", "f2", "f5"]


def test_sql_gives_the_same_effects(followed):
    query = "FROM survival(event := 'learning', covariates := ['size', 'latent'], rule := 'stable')"
    report = followed.survival(event="learning", covariates=["size", "latent"], rule="stable")
    assert followed.sql(query).equals(report.effects)


@pytest.mark.parametrize(
    ("options", "fault", "message"),
    [
        ({"event": "loss"}, InputError, "there is no event `loss`"),
        ({"rule": "last"}, InputError, "there is no rule `last`"),
        ({"covariates": ["colour"]}, InputError, "no fact has the covariate `colour`"),
        ({"covariates": ["phi_pt"]}, InputError, "no fact has the covariate `phi_pt`"),
        ({"by": "colour"}, InputError, "no fact has `colour` in its metadata"),
        ({"baseline": "base"}, NothingToScoreError, "no facts were probed at `base`"),
        ({"baseline": "e4"}, NothingToScoreError, "no fact was probed at `e4` and a later checkpoint"),
        ({"source": "test"}, NothingToScoreError, "no facts were probed"),
    ],
)
def test_questions_without_an_answer_say_why(followed, options, fault, message):
    with pytest.raises(fault, match=message):
        followed.survival(**options)


def test_without_statsmodels_the_extra_is_named(followed, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "statsmodels", None)
    with pytest.raises(InputError, match="needs statsmodels") as caught:
        followed.survival()
    assert "lark-store[survival]" in caught.value.hint


def planted(rng, n, log_hr, epochs=12):
    """Facts of which half are latent and are learned at another rate; all are seen."""
    latent = rng.permutation(np.arange(n) % 2)
    learned = np.ceil(rng.exponential(1 / (0.1 * np.exp(log_hr * latent))))
    return latent, learned[:, None] <= np.arange(epochs + 1)


def test_planted_latent_knowledge_is_found(store):
    rng = np.random.default_rng(0)
    latent, correct = planted(rng, 120, np.log(2.6))
    add_course(store, correct, [{"seen": True, "noise": x} for x in rng.normal(size=120)], latent=latent)
    report = store.survival(covariates=["latent", "noise"])
    hit, noise = report.effects.iter_rows(named=True)
    assert hit["low"] > 1
    assert hit["low"] < 2.6 < hit["high"]
    assert hit["discrete_hazard_ratio"] == pytest.approx(hit["hazard_ratio"], rel=0.2)
    assert noise["scale"] == pytest.approx(
        float(pl.Series([r["noise"] for r in map(json.loads, report.events["meta"])]).std())
    )
    assert report.tests["p_value"].item() < 0.01
    assert set(report.curves["group"]) == {"latent", "not latent"}


def test_shuffled_latent_knowledge_has_uniform_p_values(store):
    """The same facts with their groups shuffled, by the rows that `survival` analyses."""
    rng = np.random.default_rng(1)
    latent, correct = planted(rng, 120, np.log(2.6))
    add_course(store, correct, [{"seen": True}] * 120, latent=latent)
    events = store.survival().events
    time, observed = events["time"].to_numpy(), events["observed"].to_numpy()
    p = [cox(time, observed, rng.permutation(latent)[:, None].astype(float)).p_value[0] for _ in range(40)]
    assert kstest(p, "uniform").pvalue > 0.01
    assert store.survival().effects["p_value"].item() < 0.01


def test_influence_of_the_store_is_a_covariate(scored_copy):
    """The stored maxima of sources by stage, and the self-influence of the facts' own sketches."""
    spec = SurvivalSpec()
    ids = [f"q10{i}" for i in range(4)]
    events = pl.DataFrame(
        {
            "sample_id": ids,
            "baseline": ["base"] * 4,
            "source": ["test"] * 4,
            "variant": ["chatml"] * 4,
            "meta": ["{}"] * 4,
        }
    )
    for name, stage in (("phi_pt", "pretrain"), ("best_driver", "finetune")):
        stored = scored_copy.sql(
            "SELECT query_id, max(i.max) AS phi FROM source_influence i JOIN sources s ON s.name = i.source "
            "WHERE checkpoint = 'base' AND stage = $stage GROUP BY 1 ORDER BY 1", {"stage": stage},
        )  # fmt: skip
        assert module.covariate(scored_copy._db, events, name, spec).to_list() == pytest.approx(stored["phi"].to_list())
    own = scored_copy.sql(
        "SELECT self_influence FROM self_influence WHERE checkpoint = 'base' AND source = 'test' ORDER BY sample_id"
    )
    values = module.covariate(scored_copy._db, events, "self_influence", spec)
    assert values.to_list() == pytest.approx(own["self_influence"].to_list())


def test_figures_show_curves_hazards_and_recall(store, tmp_path):
    rng = np.random.default_rng(0)
    latent, correct = planted(rng, 60, np.log(2.6))
    add_course(store, correct, [{"seen": i < 40, "size": i} for i in range(60)], latent=latent)
    report = store.survival(event="learning", covariates=["latent", "size"], output=tmp_path / "figures")
    texts = {path.stem: path.read_text(encoding="utf-8") for path in (tmp_path / "figures").iterdir()}
    assert set(texts) == {"curves", "hazards", "recall"}
    assert all(text in texts["curves"] for text in ("at risk", "not latent", "log-rank test by latent", ">30<"))
    assert all(text in texts["hazards"] for text in ("discrete time", "size", "hazard ratio of learning"))
    assert all(text in texts["recall"] for text in ("greedy recall", "withheld"))
    last = report.recall.filter(epoch=12).select("group", "n", "n_correct").rows()
    assert last == [("seen", 40, correct[:40, 12].sum()), ("withheld", 20, correct[40:, 12].sum())]
    assert (report.recall["low"] <= report.recall["recall"]).all()


def test_command_prints_effects_curves_and_tests(followed):
    arguments = ["survival", "--store", str(followed.path), "--event", "learning", "-x", "size", "--format", "json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    frames = json.loads(result.stdout)
    assert list(frames) == ["effects", "curves", "tests"]
    assert frames["effects"][0]["covariate"] == "size"
    assert "4 facts at risk from `e0` on, 3 with the event" in result.stderr
    assert "lack a covariate" not in result.stderr


def test_facts_without_a_covariate_are_said_to_be_left_out(store):
    add_course(store, COURSE, [{"seen": seen} | ({"rare": i} if i in (0, 2) else {}) for i, seen in enumerate(SEEN)])
    arguments = ["survival", "--store", str(store.path), "--event", "learning", "-x", "rare", "--format", "json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "note: 2 facts lack a covariate; `effects` leaves them out" in result.stderr
