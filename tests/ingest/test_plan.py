"""`plan`: the cost of an ingest before it runs, and the parameters which a sketcher selects."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

import polars as pl
import pytest
import torch
import transformers as hf
from helpers.checkpoints import save_checkpoint, save_lora, save_tokenizer
from helpers.gradients import CPU
from helpers.program import lark
from helpers.texts import write_jsonl

from lark_store.errors import CheckpointChangedError, CheckpointError, InputError, NameUnknownError
from lark_store.ingest.plan import PeakMemory
from lark_store.modeling.loading import load_model, meta_model, unweighted_model
from lark_store.schema.table_schemas import SKETCH_PREFIX

JOB = (["base"], ["finetune", "songs"], ["raw", "chatml"])
TINY = {"vocab_size": 384, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # peft uses it
]


def describe(folder: Path, config: hf.PretrainedConfig) -> Path:
    """Make a checkpoint's folder with a config and a tokenizer; its weights are no weights."""
    config.save_pretrained(folder)
    save_tokenizer(folder)
    (folder / "model.safetensors").write_bytes(b"no tensors are in here")
    return folder


def wide(folder: Path) -> Path:
    """Describe a model of 270 MB in float32, 17 MB a layer."""
    shape = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 8}
    return describe(folder, hf.LlamaConfig(**(TINY | shape), tie_word_embeddings=True))


def without_measurements(report) -> list[list[dict[str, object]]]:
    measured = ("seconds", "seconds_per_sample", "peak_bytes")
    return [[{name: value for name, value in row.items() if name not in measured} for row in rows] for rows in report]


def test_planned_counts_equal_the_later_ingest(store):
    store.ingest(["base"], ["finetune"], ["raw"], sketcher="small", limit=2)
    plan = store.plan(*JOB, sketcher="small")
    assert plan.units.select("source", "variant", "n_samples", "n_existing", "bytes").rows() == [
        ("finetune", "raw", 6, 2, 4 * 1024 * 2),
        ("finetune", "chatml", 6, 0, 6 * 1024 * 2),
        ("songs", "raw", 5, 0, 5 * 1024 * 2),
        ("songs", "chatml", 5, 0, 5 * 1024 * 2),
    ]
    result = store.ingest(*JOB, sketcher="small").units
    same = ["checkpoint", "source", "variant", "n_samples", "n_existing", "bytes"]
    assert plan.units.select(same).equals(result.select(same))
    tokens = "select avg(n_tokens) from sketches where ingest_run > 1 group by ingest_run order by ingest_run"
    assert plan.units["tokens_per_sample"].to_list() == store.sql(tokens).to_series().to_list()


def test_plan_lists_sketched_parameters_per_checkpoint(scored, checkpoints):
    (row,) = scored.plan(["base"], ["finetune"], ["raw"], sketcher="small").checkpoints.to_dicts()
    model = load_model(checkpoints["base"], CPU, "auto")  # a tied weight is one parameter
    assert (row["checkpoint"], row["path"], row["bytes_per_sample"]) == ("base", "BatchPath", 2048)
    assert row["tensors"] == len(list(model.parameters()))
    assert row["coordinates"] == sum(p.numel() for p in model.parameters())


def test_time_and_memory_are_measured(scored):
    plan = scored.plan(["base"], ["finetune"], ["raw"], sketcher="small")
    (row,), (unit,) = plan.checkpoints.to_dicts(), plan.units.to_dicts()
    assert unit["seconds"] == pytest.approx(6 * row["seconds_per_sample"])
    assert 0 < row["seconds_per_sample"] < 10
    assert row["peak_bytes"] > 4 * row["coordinates"]


def test_longer_samples_take_longer(store, tmp_path):
    long = [{"id": f"{i}", "text": "A song about the sea and the night train. " * 10} for i in range(5)]
    store.source_add("long", write_jsonl(tmp_path / "long.jsonl", long), stage="pretrain")
    short, long = store.plan(["base"], ["songs", "long"], ["raw"], sketcher="small").units.to_dicts()
    assert long["seconds"] / short["seconds"] == pytest.approx(
        long["tokens_per_sample"] / short["tokens_per_sample"], rel=0.2
    )
    assert long["seconds"] > 3 * short["seconds"]


def test_limit_and_several_checkpoints_are_planned(scored):
    plan = scored.plan(["base", "epoch-1"], ["finetune"], ["raw"], sketcher="small", limit=4)
    assert plan.units.select("checkpoint", "n_samples", "bytes").rows() == [("base", 4, 8192), ("epoch-1", 4, 8192)]
    assert plan.checkpoints["checkpoint"].to_list() == ["base", "epoch-1"]
    assert plan.checkpoints["seconds_per_sample"].min() > 0


def test_plan_covers_the_sketchers_parameters(store):
    store.sketcher_add("part", k=256, dtype="float32", parameters=r"layers\.1\.", exclude="norm")
    (row,) = store.plan(["base"], ["finetune"], ["raw"], sketcher="part").checkpoints.to_dicts()
    assert (row["tensors"], row["coordinates"]) == (7, 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160)
    assert row["bytes_per_sample"] == 256 * 4


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith("catalog.sqlite-")
    }


def test_planning_writes_nothing(store):
    before = contents(store.path)
    store.plan(*JOB, sketcher="small")
    assert contents(store.path) == before
    assert [name for name in store._db.vectors.table_names() if name.startswith(SKETCH_PREFIX)] == []
    assert store.sql("select count(*) from ingest_runs").item() == 0


def test_planning_reads_no_weights(store, tmp_path):
    store.checkpoint_add("wide", wide(tmp_path / "wide"))
    store.sketcher_add("norms", k=256, parameters="norm")
    plan = store.plan(["wide", "base"], ["finetune"], ["raw"], sketcher="norms")
    weights = sum(p.numel() for p in meta_model(tmp_path / "wide").parameters()) * 4
    peak = dict(plan.checkpoints.select("checkpoint", "peak_bytes").rows())
    assert weights > 250e6
    assert peak["wide"] - peak["base"] > 0.8 * weights  # they are counted all the same
    with pytest.raises(CheckpointError, match="can't be loaded"):
        store.ingest(["wide"], ["finetune"], ["raw"], sketcher="norms")


def test_fully_sketched_checkpoint_costs_nothing(store):
    store.ingest(["base"], ["finetune"], ["raw"], sketcher="small")
    plan = store.plan(["base"], ["finetune"], ["raw"], sketcher="small")
    assert plan.units.select("n_samples", "n_existing", "seconds", "bytes").rows() == [(6, 6, 0.0, 0)]
    (row,) = plan.checkpoints.to_dicts()
    assert (row["tensors"], row["path"], row["seconds_per_sample"], row["peak_bytes"]) == (20, None, None, None)
    printed = lark("plan -c base -s finetune --variant raw --sketcher small", store=store.path)
    assert printed.code == 0
    assert "0 sketches to compute: 0 B, about 0 s, 0 B of memory" in printed.err


def test_unrenderable_samples_take_no_time(store):
    store.variant_add("strict", template="chatml", max_length=2)
    (unit,) = store.plan(["base"], ["finetune"], ["strict"], sketcher="small").units.to_dicts()
    assert (unit["n_samples"], unit["tokens_per_sample"], unit["seconds"]) == (6, 0.0, 0.0)


def test_a_source_without_samples_is_planned(store):
    store._db.vectors.table("samples").delete("source = 'songs'")
    plan = store.plan(["base"], ["songs"], ["raw"], sketcher="small")
    assert plan.units.select("n_samples", "n_existing", "seconds", "bytes").rows() == [(0, 0, 0.0, 0)]


@pytest.mark.parametrize(("kind", "path"), [(hf.MixtralConfig, "BatchPath"), (hf.GptOssConfig, "HookPath")])
def test_plan_tells_whether_a_mixture_is_batched(store, tmp_path, kind, path):
    config = kind(**TINY, intermediate_size=40, num_key_value_heads=2, num_local_experts=4, eos_token_id=1)
    store.checkpoint_add("moe", describe(tmp_path / "moe", config))
    plan = store.plan(["moe"], ["finetune"], ["raw"], sketcher="small")
    assert plan.checkpoints["path"].to_list() == [path]
    assert plan.units["seconds"].item() > 0


def test_adapters_are_planned_by_trained_parameters(store, tmp_path, checkpoints):
    save_lora(tmp_path / "lora", checkpoints["base"])
    store.checkpoint_add("lora", tmp_path / "lora")
    (row,) = store.plan(["lora"], ["finetune"], ["raw"], sketcher="small").checkpoints.to_dicts()
    assert (row["path"], row["tensors"]) == ("BatchPath", 8)
    assert row["coordinates"] == 2 * 4 * ((64 + 64) + (64 + 32))
    assert row["seconds_per_sample"] > 0


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True},
        {"batch_tokens": 1},
        {"batch_tokens": 100_000, "precision": "bfloat16"},
        {"device": "cpu", "precision": "float32", "gradient_checkpointing": True, "batch_tokens": 64},
    ],
)
def test_every_option_of_an_ingest_is_one_of_its_plan(scored, options):
    plan = scored.plan(["base"], ["finetune"], ["raw"], sketcher="small", **options)
    assert plan.checkpoints["path"].item() == "BatchPath"
    assert plan.units["seconds"].item() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_tokens": 0}, "`batch_tokens` must be at least 1, not 0"),
        ({"limit": 0}, "`limit` must be at least 1, not 0"),
        ({"precision": "float8"}, "unknown precision `float8`"),
        ({"device": "abacus"}, "device `abacus` is not available"),
    ],
)
def test_plan_refuses_the_options_ingest_refuses(scored, options, message):
    with pytest.raises(InputError, match=message):
        scored.plan(["base"], ["finetune"], ["raw"], sketcher="small", **options)


@pytest.mark.parametrize(
    "use",
    [
        lambda store: store.ingest(["base"], ["finetune"], ["raw"], sketcher="small", precision="float8"),
        lambda store: store.correction_fit("base", precision="float8"),
        lambda store: store.verify(sketches=1, sketcher="small", precision="float8"),
    ],
)
def test_invalid_precision_is_refused_without_work(scored, use):
    with pytest.raises(InputError, match="unknown precision `float8`"):
        use(scored)


def test_wrong_name_or_changed_checkpoint_is_refused(store, tmp_path):
    with pytest.raises(NameUnknownError, match="no source `song`"):
        store.plan(["base"], ["song"], ["raw"], sketcher="small")
    path = save_checkpoint(tmp_path / "moving")
    store.checkpoint_add("moving", path)
    save_checkpoint(path, seed=9)
    with pytest.raises(CheckpointChangedError, match="weights of checkpoint `moving`"):
        store.plan(["moving"], ["finetune"], ["raw"], sketcher="small")


def test_progress_names_the_checkpoint(scored):
    seen = []
    scored.plan(["base"], ["finetune"], ["raw"], sketcher="small", on_progress=seen.append)
    assert [progress.label for progress in seen] == ["base: timing a few batches"]


def test_dry_run_prints_the_plan(scored):
    words = "-c base -s finetune -s test --variant raw --sketcher small --limit 3 --batch-tokens 64 -f json"
    plan, dry = (lark(f"{command} {words}", store=scored.path) for command in ("plan", "ingest --dry-run"))
    assert (plan.code, dry.code) == (0, 0)
    assert without_measurements(json.loads(plan.out).values()) == without_measurements(json.loads(dry.out).values())
    (row,) = json.loads(plan.out)["checkpoints"]
    assert row["seconds_per_sample"] > 0
    assert "6 sketches to compute: 12 KiB, about " in plan.err
    assert "6 sketches to compute: 12 KiB, about " in dry.err


def storages(model: torch.nn.Module) -> set[int]:
    return {p.untyped_storage().data_ptr() for p in model.parameters()}


def test_an_unweighted_model_holds_one_tensor_for_each_shape(checkpoints):
    model, described = unweighted_model(checkpoints["base"], torch.bfloat16, CPU), meta_model(checkpoints["base"])
    assert [(n, p.shape) for n, p in model.named_parameters()] == [
        (n, p.shape) for n, p in described.named_parameters()
    ]
    assert len(storages(model)) == len({tuple(p.shape) for p in model.parameters()})
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not model.training
    assert model(input_ids=torch.arange(20)[None]).logits.isfinite().all()


def test_unweighted_model_takes_the_memory_of_one_layer(tmp_path):
    folder = wide(tmp_path / "wide")
    with PeakMemory(CPU) as peak:
        model = unweighted_model(folder, torch.float32, CPU)
    assert sum(p.numel() for p in model.parameters()) * 4 > 250e6
    assert peak.highest - peak.start < 80e6


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_weight_of_an_unweighted_model_stays_one_parameter(tmp_path, tied):
    config = hf.LlamaConfig(**TINY, intermediate_size=40, num_key_value_heads=2, tie_word_embeddings=tied)
    model = unweighted_model(describe(tmp_path / "some", config), torch.float32, CPU)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert ("lm_head.weight" in dict(model.named_parameters())) == (not tied)


def test_unweighted_model_includes_adapters(tmp_path, checkpoints):
    save_lora(tmp_path / "lora", checkpoints["base"])
    model, described = (make(tmp_path / "lora", *rest) for make, *rest in MAKERS)
    assert [(n, p.shape) for n, p in model.named_parameters()] == [
        (n, p.shape) for n, p in described.named_parameters()
    ]


MAKERS = ((unweighted_model, torch.float32, CPU), (meta_model,))


def test_brief_memory_peaks_are_measured():
    with PeakMemory(CPU) as peak:
        taken = torch.ones(75_000_000)
        time.sleep(0.05)
        del taken
        time.sleep(0.05)
    assert 250e6 < peak.highest - peak.start < 600e6


def test_memory_peaks_without_the_interpreter_are_measured():
    with PeakMemory(CPU) as peak:
        taken = bytearray(b"x") * 300_000_000
    assert peak.highest - peak.start > 250e6
    assert len(taken) == 300_000_000


def test_parameters_are_shown_with_shapes_and_ties_once(scored, checkpoints):
    parameters = scored.sketcher_show("small", checkpoint="base")
    model = load_model(checkpoints["base"], CPU, "auto")
    assert parameters.schema == {
        "parameter": pl.String,
        "shape": pl.List(pl.Int64),
        "coordinates": pl.Int64,
        "sketched": pl.Boolean,
    }
    assert parameters.rows() == [(name, list(p.shape), p.numel(), True) for name, p in model.named_parameters()]
    assert parameters["parameter"].str.contains("lm_head|embed_tokens").sum() == 1


def test_excluded_parameters_are_shown(store):
    store.sketcher_add("part", k=256, parameters=r"layers\.1\.", exclude="norm|mlp")
    store.sketcher_add("nothing", k=256, parameters="convolution")
    parameters = store.sketcher_show("part", checkpoint="base")
    assert len(parameters) == 20
    taken = parameters.filter("sketched")["parameter"].to_list()
    assert taken == [f"model.layers.1.self_attn.{x}_proj.weight" for x in "qkvo"]
    with pytest.raises(
        InputError, match="the sketcher matches none of the model's 20 parameters\n\nhint: its parameters include"
    ):
        store.sketcher_show("nothing", checkpoint="base")


def test_adapters_default_to_trained_parameters(store, tmp_path, checkpoints):
    save_lora(tmp_path / "lora", checkpoints["base"])
    store.checkpoint_add("lora", tmp_path / "lora")
    store.sketcher_add("norms", k=256, parameters="norm")
    parameters = store.sketcher_show("small", checkpoint="lora")
    assert len(parameters) == 20 + 8
    assert parameters["sketched"].to_list() == parameters["parameter"].str.contains("lora_[AB]").to_list()
    shown_parameters = store.sketcher_show("norms", checkpoint="lora").filter("sketched")["parameter"]
    assert len(shown_parameters) == 5
    assert shown_parameters.str.contains("norm").all()


def test_shown_parameters_are_the_sketched_ones(store):
    store.sketcher_add("part", k=256, parameters="layers", exclude="norm")
    parameters = store.sketcher_show("part", checkpoint="base").filter("sketched")
    store.ingest(["base"], ["finetune"], ["raw"], sketcher="part", limit=1)
    rows = store.sql("select recipe->>'parameters', recipe->>'coordinates' from ingest_runs").row(0)
    assert tuple(map(int, rows)) == (len(parameters), parameters["coordinates"].sum())


def test_command_prints_the_methods_result(store):
    store.sketcher_add("part", k=256, parameters="embed")
    printed = lark("sketcher show part -c base -f json", store=store.path)
    assert (printed.code, printed.rows) == (0, store.sketcher_show("part", checkpoint="base").to_dicts())
    assert printed.err == "1 of 20 parameters, 24,576 of 110,912 coordinates\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("sketcher show smal -c base", "error: no sketcher `smal`\n\nhint: did you mean `small`?"),
        ("sketcher show small -c bas", "error: no checkpoint `bas`\n\nhint: did you mean `base`?"),
    ],
)
def test_unknown_name_hints_the_nearest(scored, line, message):
    result = lark(line, store=scored.path)
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith(message)
