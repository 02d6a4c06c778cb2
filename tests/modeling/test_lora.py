"""LoRA checkpoints: adapters on a base model, hashed with it and sketched by their trained parameters."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import save_checkpoint, save_lora, save_tokenizer
from helpers.gradients import CPU
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lark_store.errors import CheckpointChangedError, CheckpointError, NameTakenError
from lark_store.modeling.checkpoints import examine
from lark_store.modeling.loading import context_length, load_model, load_tokenizer, meta_model, trained_parameters

peft = pytest.importorskip("peft")
IDS = torch.arange(20)[None]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # peft uses it
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
]
KINDS = {
    "dropout": {"target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.5},
    "all-linear": {"target_modules": "all-linear", "use_rslora": True, "rank_pattern": {"q_proj": 2}},
    "dora": {"target_modules": ["q_proj"], "use_dora": True},
    "pissa": {"target_modules": ["q_proj"], "init_lora_weights": "pissa"},
    "head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "tied": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens", "lm_head"],
        "ensure_weight_tying": True,
    },
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
    "replicated": {"target_modules": ["q_proj"], "layer_replication": [[0, 2], [0, 2]]},
}


def edit(file: Path, **values: object) -> None:
    """Set values in a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture
def base(tmp_path):
    return save_checkpoint(tmp_path / "base")


@pytest.fixture
def lora(tmp_path, base):
    save_lora(tmp_path / "lora", base)
    return tmp_path / "lora"


def shapes(model):
    return [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]


@pytest.mark.parametrize("kind", KINDS)
def test_loaded_model_equals_the_saved_one(tmp_path, checkpoints, kind):
    saved = save_lora(tmp_path / "lora", checkpoints["base"], **KINDS[kind])
    empty, loaded = meta_model(tmp_path / "lora"), load_model(tmp_path / "lora", CPU, "auto")
    assert torch.equal(loaded(IDS).logits, saved(IDS).logits)
    assert shapes(empty) == shapes(loaded)
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert not loaded.training
    trained = {n.removeprefix("base_model.model.") for n, p in saved.named_parameters() if p.requires_grad}
    assert trained_parameters(empty) == trained_parameters(loaded) == trained
    assert context_length(empty) == 256


def test_trained_parameters_are_known_for_adapters_only(checkpoints, lora):
    model = load_model(lora, CPU, "float32")
    before = trained_parameters(model)
    assert len(before) == 8
    assert all(".lora_A." in name or ".lora_B." in name for name in before)
    assert trained_parameters(model.requires_grad_(requires_grad=False)) == before
    assert trained_parameters(meta_model(checkpoints["base"])) is None


def test_untrained_adapters_have_gradients_in_b_only(tmp_path, checkpoints):
    model = AutoModelForCausalLM.from_pretrained(checkpoints["base"])
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    model = load_model(tmp_path / "lora", CPU, "float32")
    model(IDS, labels=IDS).loss.backward()
    grads = {n: p.grad.norm() for n, p in model.named_parameters() if n in trained_parameters(model)}
    assert {name for name, norm in grads.items() if norm > 0} == {name for name in grads if ".lora_B." in name}


def test_requested_precision_applies_to_base_and_adapters(lora):
    model = load_model(lora, CPU, "bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.dtype == torch.bfloat16


def test_adapters_stay_float32_beside_a_half_precision_base(tmp_path, checkpoints):
    from lark_store.modeling import lora

    save_lora(tmp_path / "lora", checkpoints["base"], modules_to_save=["lm_head"])
    half = AutoModelForCausalLM.from_pretrained(checkpoints["base"], dtype="bfloat16")
    model = lora.attach(half, tmp_path / "lora", widen=True)
    model(IDS, labels=IDS).loss.backward()
    trained = {n: p for n, p in model.named_parameters() if n in trained_parameters(model)}
    assert all(parameter.grad is not None for parameter in trained.values())
    assert {n: p.dtype for n, p in trained.items() if p.dtype != torch.float32} == {
        "lm_head.modules_to_save.default.weight": torch.bfloat16
    }


def test_adapters_are_added_and_ingested(store, lora, base, tmp_path):
    info = store.checkpoint_add("lora", lora, epoch=1, metrics={"accuracy": 0.7})
    assert (info.model, info.path) == ("llama", str(lora))
    assert info == store.checkpoint_add("lora", lora)
    assert info.weights_sha256 != store.checkpoint_add("plain", base).weights_sha256
    store.sketcher_add("lora", k=1024, parameters=r"\.lora_[AB]\.")
    report = store.ingest(["lora"], ["finetune"], ["chatml"], sketcher="lora")
    assert report.units["n_sketched"].item() == 6
    assert store.variant_show("chatml", sample="q0", checkpoint="lora").pieces
    recipe = store.sql("select recipe->>'parameters' as n from ingest_runs").item()
    assert recipe == "8"
    save_lora(tmp_path / "other", base, seed=1)
    with pytest.raises(NameTakenError, match="other weights"):
        store.checkpoint_add("lora", tmp_path / "other")


def change_adapters(lora, base):
    save_lora(lora, base, seed=1)


def change_config(lora, base):
    del base
    edit(lora / "adapter_config.json", lora_alpha=99)


def change_base(lora, base):
    del lora
    save_checkpoint(base, seed=1)


@pytest.mark.parametrize("change", [change_adapters, change_config, change_base])
def test_changed_adapters_or_base_are_refused(store, lora, base, change):
    store.checkpoint_add("lora", lora)
    change(lora, base)
    with pytest.raises(CheckpointChangedError, match="the weights of checkpoint `lora`"):
        store.ingest(["lora"], ["finetune"], ["chatml"], sketcher="small")


def test_order_of_pefts_sets_changes_nothing(lora):
    before = examine(str(lora))
    for order in (["q_proj", "v_proj"], ["v_proj", "q_proj"]):
        edit(lora / "adapter_config.json", target_modules=order)
        assert examine(str(lora)) == before


def test_changed_base_config_changes_the_checkpoint(store, lora, base):
    store.checkpoint_add("lora", lora)
    edit(base / "config.json", rms_norm_eps=1e-3)
    with pytest.raises(CheckpointChangedError):
        store.ingest(["lora"], ["finetune"], ["chatml"], sketcher="small")


def test_base_may_move_and_be_relative_to_the_adapters(tmp_path, lora, base, monkeypatch):
    before = examine(str(lora))
    elsewhere = shutil.move(base, tmp_path / "z" / "moved")
    edit(lora / "adapter_config.json", base_model_name_or_path="../z/moved")
    monkeypatch.chdir("/")
    after = examine(str(lora))
    assert after.base == Path(elsewhere)
    assert (after.weights_sha256, after.tokenizer_sha256) == (before.weights_sha256, before.tokenizer_sha256)
    edit(lora / "adapter_config.json", base_model_name_or_path="z/moved")
    monkeypatch.chdir(tmp_path)
    assert examine(str(lora)).base == Path(elsewhere)


def test_hub_base_is_fetched_once_at_its_revision(lora, base, monkeypatch):
    requests = []

    def snapshot_download(name, *, revision, local_files_only, allow_patterns):
        assert "adapter_config.json" in allow_patterns
        requests.append((name, revision, local_files_only))
        return str(base)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    edit(lora / "adapter_config.json", base_model_name_or_path="org/base", revision="v2")
    assert examine(str(lora)).base == base
    assert requests == [("org/base", "v2", False)]
    load_tokenizer(lora)
    meta_model(lora)
    load_model(lora, CPU, "auto")
    assert set(requests[1:]) == {("org/base", "v2", True)}


def test_tokenizer_comes_from_the_adapters_or_the_base(tmp_path, lora, base):
    without = examine(str(lora)).tokenizer_sha256
    assert without == examine(str(base)).tokenizer_sha256
    assert load_tokenizer(lora).chat_template == load_tokenizer(base).chat_template
    save_tokenizer(lora, chat_template="{{ messages }}")
    assert examine(str(lora)).tokenizer_sha256 != without
    assert load_tokenizer(lora).chat_template == "{{ messages }}"
    (base / "tokenizer.json").unlink()
    (base / "tokenizer_config.json").unlink()
    assert load_tokenizer(lora).chat_template == "{{ messages }}"
    examine(str(lora))
    save_lora(tmp_path / "bare", base)
    with pytest.raises(CheckpointError, match="bare` has no tokenizer"):
        examine(str(tmp_path / "bare"))


def refused(folder, message, hint):
    with pytest.raises(CheckpointError, match=message) as caught:
        examine(str(folder))
    assert hint in caught.value.hint


def test_unusable_base_is_named(tmp_path, lora, base):
    config = lora / "adapter_config.json"
    edit(config, base_model_name_or_path="/nowhere/base")
    refused(lora, "the base model of the adapters in .* is missing: there is no checkpoint folder `/nowhere", "adapter")
    edit(config, base_model_name_or_path="org/base")
    refused(
        lora,
        "is missing: `org/base` is not a local folder and can't be downloaded from the hub",
        "base_model_name_or_path",
    )
    edit(config, base_model_name_or_path=None)
    refused(lora, "names no base model", "base_model_name_or_path")
    save_lora(tmp_path / "second", base)
    edit(config, base_model_name_or_path=str(tmp_path / "second"))
    refused(lora, "holds adapters itself", "merge")
    edit(config, base_model_name_or_path=str(base))
    (base / "model.safetensors").unlink()
    refused(lora, "base` has no .safetensors file", "save_pretrained")


def test_unusable_adapters_give_the_reason(lora):
    config = lora / "adapter_config.json"
    kept = config.read_text()
    edit(config, peft_type="PROMPT_TUNING")
    refused(lora, "holds PROMPT_TUNING adapters", "merge")
    config.write_text(kept)
    edit(config, alora_invocation_tokens=[1, 2])
    refused(lora, "activated LoRA", "merge")
    config.write_text("[1]")
    refused(lora, "is not a JSON object", "save")
    config.write_text(kept)
    (lora / "adapter_model.safetensors").rename(lora / "adapter_model.bin")
    refused(lora, "has adapter_config.json but no adapter_model.safetensors", "if the model is merged")


def rewrite(lora, change):
    file = lora / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_mismatched_adapter_tensors_are_refused(tmp_path, lora, checkpoints):
    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    rewrite(lora, lambda tensors: tensors.update({"base_model.model.model.extra.lora_A.weight": torch.zeros(1)}))
    with pytest.raises(CheckpointError, match=r"1 tensors unknown to the model, such as .*extra"):
        load_model(lora, CPU, "auto")
    rewrite(lora, lambda tensors: tensors.update({first: torch.zeros(2, 64)}))
    with pytest.raises(CheckpointError, match=r"do not fit their base model: size mismatch for .*q_proj.lora_A"):
        load_model(lora, CPU, "auto")
    rewrite(lora, lambda tensors: tensors.pop(first))
    with pytest.raises(CheckpointError, match=r"lack 1 of their tensors, such as `model\.layers\.0\.self_attn\.q_proj"):
        load_model(lora, CPU, "auto")
    rewrite(lora, lambda tensors: tensors.pop(first.replace("lora_A", "lora_B")))
    with pytest.raises(
        CheckpointError, match=r"lack 2 of their tensors, such as `model\..*q_proj\.lora_A"
    ):  # the first
        load_model(lora, CPU, "auto")
    save_lora(tmp_path / "whole", checkpoints["base"], modules_to_save=["lm_head"])
    rewrite(tmp_path / "whole", lambda tensors: tensors.pop("base_model.model.lm_head.weight"))
    with pytest.raises(CheckpointError, match="lack 1 of their tensors, such as `lm_head"):
        load_model(tmp_path / "whole", CPU, "auto")


@pytest.mark.parametrize(("error", "fact"), [("one line", "one line"), ("the class:\n\ta fact\n\tmore", "a fact")])
def test_peft_error_is_shown_by_its_first_fact(lora, monkeypatch, error, fact):
    def refuse(*_):
        raise RuntimeError(error)

    monkeypatch.setattr(peft, "set_peft_model_state_dict", refuse)
    with pytest.raises(CheckpointError) as caught:
        load_model(lora, CPU, "auto")
    assert caught.value.fact == f"the adapters in `{lora}` do not fit their base model: {fact}"


def test_adapters_unknown_to_peft_are_an_error(lora):
    edit(lora / "adapter_config.json", target_modules=["no_such_layer"])
    for build in (meta_model, lambda folder: load_model(folder, CPU, "auto")):
        with pytest.raises(CheckpointError, match="can't be loaded: Target modules"):
            build(lora)
    (lora / "adapter_model.safetensors").write_bytes(b"broken")
    with pytest.raises(CheckpointError, match="can't be loaded"):
        load_model(lora, CPU, "auto")


def test_without_peft_ingest_hints_the_installation(store, lora, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    store.checkpoint_add("lora", lora)
    with pytest.raises(CheckpointError, match="peft library can't be imported") as caught:
        store.ingest(["lora"], ["finetune"], ["chatml"], sketcher="small")
    assert caught.value.hint == "install it with `pip install 'lark-store[lora]'`"
    with pytest.raises(CheckpointError, match="peft library can't be imported"):
        load_model(lora, CPU, "auto")
