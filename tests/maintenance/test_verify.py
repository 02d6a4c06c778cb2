"""`verify` recomputes stored sketches: intact ones pass, changed ones are reported."""

from __future__ import annotations

import math
import re

import pytest
import torch
import transformers as hf
from helpers.checkpoints import save_checkpoint, save_lora, save_tokenizer
from helpers.corruption import rewrite_sketch
from helpers.program import lark

from lark_store.errors import CheckpointChangedError, InputError, NameUnknownError
from lark_store.ingest.verify import _draw

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # peft uses it
]
COLUMNS = [
    "sketcher",
    "checkpoint",
    "source",
    "variant",
    "sample_id",
    "cosine",
    "norm_ratio",
    "same_answer",
    "limit",
    "ok",
]
# Changes of a stored row and their effects: cosine and ratio of the norms.
SOME, SAME, OTHER = pytest.approx(0.5, abs=0.4999), pytest.approx(1, abs=1e-4), pytest.approx(0, abs=0.3)
CHANGES = {
    "q0": (lambda row: {"vector": [-60 * row["vector"][0], *row["vector"][1:]]}, SOME, SAME),
    "q1": (lambda row: {"vector": row["vector"][::-1]}, OTHER, SAME),
    "q2": (lambda row: {"vector": [-value for value in row["vector"]]}, pytest.approx(-1, abs=1e-4), SAME),
    "q3": (lambda row: {"vector": [0.0 for _ in row["vector"]]}, None, SAME),
    "q4": (lambda row: {"vector": [math.inf, *row["vector"][1:]]}, None, SAME),
    "q5": (lambda row: {"grad_norm": row["grad_norm"] * 1.01}, SAME, pytest.approx(1 / 1.01, abs=1e-4)),
    "q100": (lambda _: {"grad_norm": 0.0}, SAME, None),
    "q101": (lambda row: {"vector": row["vector"][:512] + row["vector"][:512]}, SOME, SAME),
}


@pytest.fixture
def ingested(store):
    store.ingest(["base"], ["finetune"], ["raw"], sketcher="small")
    return store


def test_sketches_of_two_checkpoints_verify(scored):
    report = scored.verify(sketches=1000, sketcher="small")
    assert report.columns == COLUMNS
    assert len(report) == 60
    keys = report.select("checkpoint", "source", "variant", "sample_id")
    stored = scored.sql("select checkpoint, source, variant, sample_id from sketches")
    assert sorted(keys.rows()) == sorted(stored.rows())
    assert report["ok"].all()
    assert report["limit"].unique().to_list() == [0.9999]
    assert report["cosine"].min() > 0.99999
    assert (report["norm_ratio"] - 1).abs().max() < 1e-4


def test_changed_rows_are_reported_by_cosine_and_norm(scored_copy):
    for sample, (change, _, _) in CHANGES.items():
        rewrite_sketch(scored_copy, sample, change)
    rewrite_sketch(scored_copy, "q102", lambda row: {"grad_norm": row["grad_norm"] * 1.004})  # within the limit
    report = scored_copy.verify(sketches=1000, checkpoint="base")
    assert len(report) == 30
    wrong = report.filter(~report["ok"]).select("sample_id", "cosine", "norm_ratio").rows()
    assert sorted(wrong) == sorted((sample, cosine, ratio) for sample, (_, cosine, ratio) in CHANGES.items())


def test_sketch_of_a_lost_sample_is_reported(ingested):
    ingested._db.vectors.table("samples").delete("source = 'finetune' AND sample_id = 'q3'")
    report = ingested.verify(sketches=1000, sketcher="small")
    assert len(report) == 6
    (lost,) = report.filter(~report["ok"]).rows(named=True)
    names = {"sketcher": "small", "checkpoint": "base", "source": "finetune", "variant": "raw", "sample_id": "q3"}
    assert lost == names | {"cosine": None, "norm_ratio": None, "same_answer": None, "limit": 0.9999, "ok": False}


def test_rows_are_drawn_from_all_and_reproducibly(scored):
    first, second = ([(run.id, sample_id) for run, sample_id in _draw(scored._db, 12, None, None, 0)] for _ in range(2))
    assert first == second
    assert len(set(first)) == 12
    assert {run.checkpoint.name for run, _ in _draw(scored._db, 12, None, None, 0)} == {"base", "epoch-1"}
    assert len({run for run, _ in first}) > 4


def test_rows_of_unfinished_runs_are_not_drawn(ingested):
    from lark_store.schema.catalog import IngestRun

    ingested.ingest(["base"], ["songs"], ["raw"], sketcher="small")
    with ingested._db.session() as session:
        session.get(IngestRun, 1).status = "running"
        session.get(IngestRun, 2).n_sketched = 1
    assert set(ingested.verify(sketches=100)["source"]) == {"songs"}
    with ingested._db.session() as session:
        session.get(IngestRun, 1).status, session.get(IngestRun, 1).n_sketched = "done", 0  # counted as empty
    assert set(ingested.verify(sketches=100)["source"]) == {"songs"}


def test_mixed_precisions_sketchers_and_checkpoints_verify(ingested):
    ingested.sketcher_add("fine", k=256, dtype="float32", parameters="layers")
    ingested.ingest(["base"], ["finetune"], ["chatml"], sketcher="small", precision="bfloat16")
    ingested.ingest(["epoch-1"], ["songs"], ["chatml"], sketcher="fine")
    report = ingested.verify()
    assert report.group_by("sketcher", "checkpoint", "variant", "limit").len().sort("sketcher", "variant").rows() == [
        ("fine", "epoch-1", "chatml", 0.9999, 5),
        ("small", "base", "chatml", 0.999, 6),
        ("small", "base", "raw", 0.9999, 6),
    ]
    assert report["ok"].all()
    assert set(ingested.verify(sketcher="fine")["checkpoint"]) == {"epoch-1"}
    assert set(ingested.verify(sketches=4, checkpoint="base")["sketcher"]) == {"small"}
    with pytest.raises(InputError, match="no sketches to verify"):
        ingested.verify(sketcher="fine", checkpoint="base")


def test_half_or_different_precision_widens_the_limit(scored):
    report = scored.verify(sketches=6, checkpoint="base", precision="bfloat16")
    assert report["limit"].unique().to_list() == [0.999]
    assert report["cosine"].is_between(0.9, 0.99999).all()  # rounding shows: it is another model
    with pytest.raises(InputError, match="unknown precision `float8`"):
        scored.verify(sketches=6, checkpoint="base", precision="float8")


def test_sketches_by_hooks_of_mixtures_and_of_adapters_verify(store, tmp_path, checkpoints):
    config = {"vocab_size": 384, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    torch.manual_seed(0)
    for name, kind in (("hooks", hf.GptOssConfig), ("moe", hf.MixtralConfig)):
        model = hf.AutoModelForCausalLM.from_config(kind(**config, **heads, eos_token_id=1))
        model.save_pretrained(tmp_path / name)
        save_tokenizer(tmp_path / name)
    save_lora(tmp_path / "lora", checkpoints["base"])
    for name in ("hooks", "moe", "lora"):
        store.checkpoint_add(name, tmp_path / name)
    result = store.ingest(["hooks", "moe", "lora"], ["finetune"], ["chatml"], sketcher="small")
    (note,) = result.notes
    assert note.startswith("checkpoint `hooks` is sketched one sample at a time: `model.layers.0.self_attn.sinks`")
    report = store.verify()
    assert report.group_by("checkpoint").len().sort("checkpoint").rows() == [("hooks", 6), ("lora", 6), ("moe", 6)]
    assert report["ok"].all()


def test_sketches_with_gradient_checkpointing_verify(store):
    options = {"batch_tokens": 100, "gradient_checkpointing": True}
    store.ingest(["base"], ["finetune", "songs"], ["chatml"], sketcher="small", **options)
    report = store.verify()
    assert (len(report), report["ok"].all()) == (11, True)


@pytest.mark.parametrize("n", [0, -3])
def test_fewer_than_one_sketch_is_an_error(scored, n):
    with pytest.raises(InputError, match=f"must be at least 1, not {n}"):
        scored.verify(sketches=n)


def test_store_without_sketches_verifies_nothing(store):
    with pytest.raises(
        InputError, match=r"there are no sketches to verify\n\nhint: create some with `store.ingest\(...\)`"
    ):
        store.verify()


def test_wrong_name_or_changed_checkpoint_is_refused(store, tmp_path):
    with pytest.raises(NameUnknownError, match="no sketcher `smal`"):
        store.verify(sketcher="smal")
    with pytest.raises(NameUnknownError, match="no checkpoint `bas`"):
        store.verify(checkpoint="bas")
    path = save_checkpoint(tmp_path / "moving")
    store.checkpoint_add("moving", path)
    store.ingest(["moving"], ["finetune"], ["raw"], sketcher="small")
    save_checkpoint(path, seed=9)
    with pytest.raises(CheckpointChangedError, match="weights of checkpoint `moving`"):
        store.verify()


def test_progress_counts_the_sketches(scored):
    seen = []
    scored.verify(sketches=3, checkpoint="base", on_progress=seen.append)
    assert [(progress.done, progress.total) for progress in seen] == [(1, 3), (2, 3), (3, 3)]


def test_command_prints_rows_and_summary(scored):
    result = lark("verify --sketches 7 -c epoch-1 --sketcher small -f json", store=scored.path)
    assert (result.code, len(result.rows)) == (0, 7)
    assert list(result.rows[0]) == COLUMNS
    assert {row["checkpoint"] for row in result.rows} == {"epoch-1"}
    told = re.fullmatch(r"7 sketches recomputed, 0 differ; lowest cosine (\d\.\d{7})", result.err.splitlines()[-1])
    assert 0.9999 < float(told[1]) <= 1


def test_command_exits_with_1_if_a_sketch_differs(scored_copy):
    rewrite_sketch(scored_copy, "q2", CHANGES["q2"][0])
    result = lark("verify --sketches 1000 -c base -f json", store=scored_copy.path)
    assert result.code == 1
    assert [row["sample_id"] for row in result.rows if not row["ok"]] == ["q2"]
    assert result.err.endswith("30 sketches recomputed, 1 differ; lowest cosine -1.0000000\n")


def test_command_gives_the_reason_for_refusal(store):
    result = lark("verify", store=store.path)
    assert (result.code, result.out) == (1, "")
    assert result.err == "error: there are no sketches to verify\n\nhint: create some with `lark-store ingest`\n"
    assert lark("verify --sketches 0", store=store.path).err.startswith("error: `--sketches` must be at least 1, not 0")
