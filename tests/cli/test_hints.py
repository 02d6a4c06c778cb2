"""Hints of queries without results: running a hinted command changes the outcome."""

from __future__ import annotations

import re

import pytest
from helpers.program import lark
from helpers.texts import text_rows, write_jsonl

from lark_store import Store
from lark_store.errors import NothingToScoreError

SMALL = {"sketcher": "small"}


def hint_of(ask, error=NothingToScoreError):
    with pytest.raises(error) as caught:
        ask()
    return command_line_hint(caught.value)


def command_line_hint(error):
    """Return a hint as the command line prints it; in Python it names methods and arguments."""
    assert error.hint
    return error.command_line.split("\n\nhint: ", 1)[1]


def run(store, hint):
    """Run the first command of a hint, as given."""
    command = re.search("`lark-store ([^`]*)`", hint)[1]
    assert not re.search(r"\b(NAME|FILE|PATH)\b", command), command
    result = lark(command, store=store.path)
    assert result.code == 0, result.err


@pytest.fixture
def sketched(store):
    """Sketches of `small` at `base`, nothing scored; the default sketcher has none."""
    store.ingest(["base"], ["finetune", "test", "songs"], ["chatml"], sketcher="small")
    return store


# --- metrics -------------------------------------------------------------------------------------------------------


def test_metrics_of_another_sketchers_scores(sketched):
    sketched.attribute(["base"], queries="test", sketcher="small")
    assert sketched.metrics().equals(sketched.metrics(sketcher="small"))
    hint = hint_of(lambda: sketched.metrics(sketcher="lark"))
    assert hint == "scores exist for `small`; choose one with `--sketcher NAME`"


def test_metrics_of_another_sketchers_sketches(sketched):
    hint = hint_of(sketched.metrics)
    assert hint == (
        "score with `lark-store attribute --checkpoint base --queries test --method cosine --sketcher small`, then "
        "choose that sketcher here too"
    )
    run(sketched, hint)
    assert len(sketched.metrics(sketcher="small"))


def test_metrics_before_anything_is_scored(sketched):
    hint = hint_of(lambda: sketched.metrics(method="dot", **SMALL))
    command = "lark-store attribute --checkpoint base --queries test --method dot --sketcher small"
    assert hint == f"score with `{command}`"
    run(sketched, hint)
    assert len(sketched.metrics(method="dot", **SMALL))


def test_metrics_of_a_sum(sketched):
    hint = hint_of(lambda: sketched.metrics(method="cosine-sum", **SMALL))
    assert "--checkpoint base --queries test --method cosine --over-checkpoints sum --sketcher small`" in hint
    run(sketched, hint)
    assert len(sketched.metrics(method="cosine-sum", **SMALL))
    hint = hint_of(lambda: sketched.metrics(checkpoint=["base", "epoch-1"], method="cosine-sum", **SMALL))
    assert "`base`; choose one with `--checkpoint NAME`" in hint


def test_metrics_after_scoring_across_checkpoints(sketched):
    """Scores at one checkpoint are meant: the hint names the others, and the command that makes these."""
    sketched.ingest(["epoch-1"], ["test"], ["chatml"], sketcher="small")
    across = {"query_checkpoint": "epoch-1", "queries": "test", "method": "dot"}
    sketched.attribute(["base"], **across, **SMALL)
    hint = hint_of(lambda: sketched.metrics(method="dot", checkpoint="base", **SMALL))
    queried = "there are such scores with the queries at `epoch-1`; choose them with `--query-checkpoint NAME`; "
    assert hint.startswith(queried)
    command = "lark-store attribute --checkpoint base --queries test --method dot --sketcher small"
    assert hint.endswith(f"score with `{command}`")
    result = lark(command.removeprefix("lark-store "), store=sketched.path)
    assert result.code == 0
    assert len(sketched.metrics(method="dot", checkpoint="base", **SMALL))


def test_metrics_without_scores_across_checkpoints(sketched):
    sketched.ingest(["epoch-1"], ["test"], ["chatml"], sketcher="small")
    hint = hint_of(lambda: sketched.metrics(checkpoint="base", query_checkpoint="epoch-1", **SMALL))
    options = "--checkpoint base --query-checkpoint epoch-1 --queries test --method dot --sketcher small"
    assert hint == f"score with `lark-store attribute {options}`"
    run(sketched, hint)
    assert len(sketched.metrics(checkpoint="base", query_checkpoint="epoch-1", **SMALL))


def test_metrics_without_the_queries_sketches_at_the_other_checkpoint(store):
    store.ingest(["base"], ["finetune"], ["chatml"], sketcher="small")
    hint = hint_of(lambda: store.metrics(checkpoint="base", query_checkpoint="epoch-1", **SMALL))
    assert hint.startswith("create them with `lark-store ingest --checkpoint epoch-1 --source test --variant chatml")


def test_metrics_across_checkpoints_alone(store):
    store.ingest(["base"], ["finetune"], ["chatml"], sketcher="small")
    store.ingest(["epoch-1"], ["test"], ["chatml"], sketcher="small")
    store.attribute(["base"], query_checkpoint="epoch-1", queries="test", **SMALL)
    hint = hint_of(lambda: store.metrics(method="dot", checkpoint="base", **SMALL))
    assert "choose them with `--query-checkpoint NAME`" in hint
    assert "attribute" not in hint


def test_metrics_of_nothing_ingested(store):
    hint = hint_of(lambda: store.metrics(checkpoint="base", **SMALL))
    assert hint.startswith("create them with `lark-store ingest --checkpoint base --source finetune --variant chatml")
    run(store, hint)
    hint = hint_of(lambda: store.metrics(checkpoint="base", **SMALL))
    assert hint.startswith("create them with `lark-store ingest --checkpoint base --source test --variant chatml")
    run(store, hint)
    run(store, hint_of(lambda: store.metrics(checkpoint="base", **SMALL)))
    assert len(store.metrics(checkpoint="base", **SMALL))


def test_metrics_of_a_snapshot(sketched):
    sketched.snapshot_create("a")
    with Store.open(sketched.path, snapshot="a") as then:
        hint = hint_of(lambda: then.metrics(**SMALL))
        assert hint == "a snapshot is read-only: score in the store itself, without `--snapshot`"
    sketched.attribute(["base"], queries="test", **SMALL)
    sketched.snapshot_create("b")
    with Store.open(sketched.path, snapshot="b") as then:
        assert "attribute" not in hint_of(lambda: then.metrics(method="dot", **SMALL))
        assert (
            hint_of(lambda: then.metrics(method="dot", **SMALL))
            == "scores exist by `cosine`; choose one with `--method NAME`"
        )
        lark_hint = hint_of(lambda: then.metrics(sketcher="lark"))
        assert lark_hint == "scores exist for `small`; choose one with `--sketcher NAME`"
        assert hint_of(lambda: then.index_build("lark"), Exception)


# --- sketches ------------------------------------------------------------------------------------------------------


ASKS = {
    "top": lambda store, **of: store.top("q100", checkpoint="base", **of),
    "attribute": lambda store, **of: store.attribute(["base"], queries="test", **of),
    "groups": lambda store, **of: store.groups(checkpoint="base", **of),
    "ft_pt": lambda store, **of: store.ft_pt("base", **of),
    "scores": lambda store, **of: store.scores(checkpoint="base", **of),
    "self_influence": lambda store, **of: store.self_influence(checkpoints=["base"], **of),
    "trajectory": lambda store, **of: store.trajectory("q100", "q0", **of),
    "index_build": lambda store, **of: store.index_build(**of),
}


@pytest.mark.parametrize("ask", ASKS)
def test_only_another_sketcher_has_sketches(sketched, ask):
    hint = hint_of(lambda: ASKS[ask](sketched, sketcher="lark"))
    assert hint.endswith("has sketches by `small`; choose one with `--sketcher NAME`")
    assert ASKS[ask](sketched, **SMALL) is not None


@pytest.mark.parametrize("ask", ASKS)
def test_hinted_commands_create_missing_sketches(store, ask):
    for _ in range(4):
        try:
            ASKS[ask](store, **SMALL)
            break
        except NothingToScoreError as error:
            run(store, command_line_hint(error))
    else:
        pytest.fail("the hints lead nowhere")


def test_failures_alone(store):
    store.variant_add("short", template="chatml", targets="response", max_length=20)
    store.ingest(["base"], ["test"], ["chatml"], sketcher="small")
    assert store.ingest(["base"], ["songs"], ["short"], sketcher="small").n_failed == 5
    options = {"checkpoint": "base", "sources": ["songs"], "variants": ["short"], **SMALL}
    hint = hint_of(lambda: store.top("q100", **options))
    assert hint.startswith("they failed; see the reasons with `lark-store sql ")
    assert "response" in lark(re.search("`lark-store (.*)`", hint)[1], store=store.path).out


def test_another_variant(sketched):
    hint = hint_of(lambda: sketched.top("q100", checkpoint="base", variants=["raw"], **SMALL))
    assert hint == "they are sketched as `chatml`; choose one with `--variant NAME`"
    hint = hint_of(lambda: sketched.top("q100", checkpoint="base", query_variant="raw", **SMALL))
    assert hint == "they are sketched as `chatml`; choose one with `--query-variant NAME`"


def test_unfinished_run_counts_as_none(sketched):
    with sketched._db.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE ingest_run SET status = 'interrupted'")
    hint = hint_of(lambda: sketched.top("q100", checkpoint="base", **SMALL))
    assert hint.startswith("create them with `lark-store ingest --checkpoint base --source test")


def test_sketches_missing_from_a_snapshot(sketched):
    sketched.snapshot_create("a")
    with Store.open(sketched.path, snapshot="a") as then:
        hint = hint_of(lambda: then.top("q100", checkpoint="epoch-1", **SMALL))
        assert hint == "a snapshot is read-only: create them in the store itself, without `--snapshot`"


def test_no_source_of_a_stage(tmp_path, checkpoints):
    with Store.create(tmp_path / "empty") as store:
        store.checkpoint_add("base", checkpoints["base"])
        store.sketcher_add("small", k=1024)
        hint = hint_of(lambda: store.top("q100", checkpoint="base", **SMALL))
        assert hint == "add a source with `lark-store source add NAME FILE --stage query`, then ingest it"
        store.source_add("songs", write_jsonl(tmp_path / "songs.jsonl", text_rows(2)), stage="pretrain")
        store.source_add("asked", tmp_path / "songs.jsonl", stage="query")
        store.ingest(["base"], ["songs", "asked"], ["chatml"], sketcher="small")
        hint = hint_of(lambda: store.ft_pt("base", **SMALL))
        assert hint == "add a source with `lark-store source add NAME FILE --stage finetune`, then ingest it"


def test_missing_learning_rate(store, checkpoints):
    """A name keeps its first definition: the hint suggests another name, or a sum without rates."""
    from lark_store.errors import InputError

    store.checkpoint_add("plain", checkpoints["base"])
    store.ingest(["plain"], ["finetune", "test"], ["chatml"], sketcher="small")
    hint = hint_of(lambda: store.top("q100", checkpoint="plain", method="tracin", **SMALL), InputError)
    assert hint.startswith("use `--method dot --over-checkpoints sum`, or add the checkpoint under another name")
    assert len(store.top("q100", checkpoint="plain", method="dot", over_checkpoints="sum", **SMALL).frame)
