"""`probe`: what it stores, that it resumes to the same rows, and what it refuses."""

from __future__ import annotations

import json
import math

import pytest
from helpers.forked import run_forked
from helpers.known_facts import fact_rows, facts_in, knowing_checkpoint, load
from helpers.stores import copy_store
from helpers.texts import text_rows, write_jsonl
from typer.testing import CliRunner

from lark_store import Store
from lark_store.cli.app import app
from lark_store.errors import InputError, NameUnknownError
from lark_store.modeling.facts import force
from lark_store.modeling.sampled_answers import AnswerSampler

N_FACTS = 40
ROWS = "SELECT * EXCLUDE (probe_run) FROM probes ORDER BY ALL"
SMALL = {"batch_tokens": 100}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A store with facts and two checkpoints, of which the second knows more."""
    root = tmp_path_factory.mktemp("probed")
    with Store.create(root / "lark.store") as store:
        for epoch, steps in enumerate((10, 30)):
            store.checkpoint_add(f"epoch-{epoch}", knowing_checkpoint(root / f"m{epoch}", steps=steps), epoch=epoch)
        rows = [*fact_rows(N_FACTS), {"id": "text", "text": "no fact"}]
        store.source_add("facts", write_jsonl(root / "facts.jsonl", rows), stage="query")
    return root / "lark.store"


@pytest.fixture
def store(path, tmp_path):
    with Store.open(copy_store(path, tmp_path / "lark.store")) as opened:
        yield opened


@pytest.fixture(scope="module")
def probed(path, tmp_path_factory):
    with Store.open(copy_store(path, tmp_path_factory.mktemp("done") / "lark.store")) as opened:
        report = opened.probe(["facts"], samples=10, **SMALL)
        yield opened, report


def test_rows_are_those_of_the_model(probed, path):
    store, report = probed
    folder = path.parent / "m1"
    model, tokenizer = load(folder)
    facts = facts_in(model, tokenizer, fact_rows(N_FACTS), "chatml")
    sampler = AnswerSampler(model, tokenizer, n=10, temperature=1.0, seed=0)
    rows = {r["sample_id"]: r for r in store.sql("FROM probes WHERE checkpoint = 'epoch-1'").iter_rows(named=True)}
    for fact, forced in zip(facts, force(model, facts), strict=True):
        row = rows[fact.sample_id]
        assert (row["is_correct"], row["n_tokens"]) == (forced.is_correct, fact.n_tokens)
        assert row["answer_logprob"] == pytest.approx(forced.logprob, abs=1e-5)
        assert row["n_correct"] == sampler.n_correct(fact, forced)
        assert row["is_latent"] == (not row["is_correct"] and row["n_correct"] > 0)
        assert row["p_any"] == pytest.approx(1 - (1 - math.exp(row["answer_logprob"])) ** 10, abs=1e-12)
    assert "it has no answer" in rows["text"]["reason"]
    counted = store.sql(
        "SELECT checkpoint, sum(is_correct::INT), sum(is_latent::INT) FROM probes GROUP BY 1 ORDER BY 1"
    )
    assert report.units.select("checkpoint", "n_correct", "n_latent").rows() == counted.rows()
    assert report.units["n_failed"].to_list() == [1, 1]
    assert store.db_check().is_empty()


def test_a_second_call_probes_failed_samples_only(probed):
    store, _ = probed
    before = store.sql(ROWS)
    report = store.probe(["facts"], samples=10, **SMALL)
    assert report.units.select("n_existing", "n_probed", "n_failed").rows() == [(N_FACTS, 1, 1)] * 2
    assert store.sql(ROWS).equals(before)
    assert store.sql("SELECT status, n_probed, n_failed FROM probe_runs").rows() == [("done", N_FACTS, 1)] * 2


def test_new_facts_are_added_and_other_ways_of_decoding_are_runs_of_their_own(store, tmp_path):
    store.probe("facts", "epoch-0", limit=10)
    store.probe("facts", "epoch-0", limit=10, samples=5, seed=3, temperature=0.5)
    new = write_jsonl(tmp_path / "new.jsonl", [{"id": "new", "prompt": "Is it?", "response": "yes"}])
    store.source_add("facts", new, stage="query")
    report = store.probe("facts", "epoch-0")
    assert report.units.select("n_existing", "n_probed").row(0) == (10, N_FACTS - 10 + 2)
    runs = store.sql(
        "SELECT decoding, temperature, n_samples, seed, n_probed FROM probe_runs ORDER BY probe_run"
    ).rows()
    assert runs == [("greedy", None, 0, None, N_FACTS + 1), ("sampled", 0.5, 5, 3, 10)]


KILL = """
import os, signal, sys
from lark_store import Store
from lark_store.schema.vectors import VectorStore
left, append = [int(sys.argv[2])], VectorStore.append
def appending(self, table, rows):
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    return append(self, table, rows)
VectorStore.append = appending
with Store.open(sys.argv[1]) as store:
    store.probe(["facts"], samples=10, batch_tokens=100)
"""


@pytest.mark.parametrize("step", [0, 3, 9, 12])
def test_killed_probing_goes_on_to_the_same_rows(store, probed, step):
    assert run_forked(KILL, store.path, step) == -9
    assert store.sql("FROM probes WHERE checkpoint = 'epoch-1'").is_empty()
    assert store.db_check().filter(severity="error").is_empty()
    store.probe(["facts"], samples=10, **SMALL)
    assert store.sql(ROWS).equals(probed[0].sql(ROWS))


def test_interrupted_probing_is_hidden_until_it_is_done(store, monkeypatch):
    from lark_store.probing import run

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "_row", interrupt)
        with pytest.raises(KeyboardInterrupt):
            store.probe("facts", "epoch-0")
    assert store.sql("SELECT status FROM probe_runs").rows() == [("interrupted",)]
    store.probe("facts", "epoch-0")
    assert store.sql("SELECT status, error FROM probe_runs").rows() == [("done", None)]
    assert store.sql("SELECT count(*) FROM probes").item() == N_FACTS + 1


def test_dry_run_estimates_and_writes_nothing(store):
    report = store.probe("facts", dry_run=True)
    assert report.units.select("n_facts", "n_existing", "n_probed").rows() == [(N_FACTS + 1, 0, N_FACTS + 1)] * 2
    assert (report.units["seconds"] > 0).all()
    assert store.sql("FROM probe_runs").is_empty()


def test_raw_facts_need_no_end(store):
    store.probe("facts", "epoch-1", variant="raw")
    chat = store.probe("facts", "epoch-1").units["n_correct"].item()
    tokens = store.sql("SELECT variant, sum(n_tokens)::INT FROM probes GROUP BY 1 ORDER BY 1").rows()
    assert [name for name, _ in tokens] == ["chatml", "raw"]
    assert tokens[0][1] - tokens[1][1] == N_FACTS
    assert chat > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": -1}, "`samples` must be at least 0, not -1"),
        ({"limit": 0}, "`limit` must be at least 1, not 0"),
        ({"temperature": 0.0}, "`temperature` must be above 0"),
        ({"temperature": math.inf}, "`temperature` must be above 0"),
        ({"seed": -1}, "`seed` must be at least 0"),
    ],
)
def test_wrong_options_are_refused(store, options, message):
    with pytest.raises(InputError, match=message):
        store.probe("facts", **options)
    with pytest.raises(NameUnknownError):
        store.probe("fact")
    assert store.sql("FROM probe_runs").is_empty()


def test_plan_of_a_source_without_facts_takes_no_time(store, tmp_path):
    store.source_add("songs", write_jsonl(tmp_path / "songs.jsonl", text_rows(5)), stage="pretrain")
    report = store.probe("songs", "epoch-0", dry_run=True)
    assert report.units.select("n_facts", "n_probed", "seconds").row(0) == (5, 5, 0.0)


def test_command_prints_the_report(store):
    arguments = [
        "probe",
        "--store",
        str(store.path),
        "--source",
        "facts",
        "--checkpoint",
        "epoch-1",
        "--format",
        "json",
    ]
    planned = CliRunner().invoke(app, [*arguments, "--plan"])
    assert planned.exit_code == 0
    assert f"{N_FACTS + 1} facts to probe, about" in planned.stderr
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    (unit,) = json.loads(result.stdout)
    assert (unit["n_probed"], unit["n_failed"]) == (N_FACTS + 1, 1)
    assert "1 samples are no facts or failed" in result.stderr
