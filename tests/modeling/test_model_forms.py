"""Models as people have them: parts elsewhere, accelerate's folders, wrapped names, quantised files, objects."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers.checkpoints import save_lora, save_tokenizer
from helpers.program import lark
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig, BloomForCausalLM, LlamaForCausalLM

from lark_store import Store
from lark_store.errors import CheckpointChangedError, CheckpointError, InputError, NameTakenError
from lark_store.modeling.auto_models import _unavailable
from lark_store.modeling.checkpoints import examine
from lark_store.modeling.loading import load_model, meta_model, unweighted_model
from lark_store.modeling.weight_distance import relative_distances
from lark_store.results import NewText

CPU = torch.device("cpu")


@pytest.fixture
def base(checkpoints, tmp_path):
    return shutil.copytree(checkpoints["base"], tmp_path / "base")


@pytest.fixture
def parted(base, tmp_path):
    """Folders of the weights, of the config and of the tokenizer."""
    folders = [tmp_path / name for name in ("weights", "config", "tokenizer")]
    for folder in folders:
        folder.mkdir()
    shutil.move(base / "model.safetensors", folders[0])
    shutil.move(base / "config.json", folders[1])
    for file in base.iterdir():
        shutil.move(file, folders[2])
    return folders


@pytest.fixture
def empty(tmp_path):
    with Store.create(tmp_path / "empty.store") as created:
        yield created


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def rename(folder, new_name):
    tensors = load_file(folder / "model.safetensors")
    save_file({new_name(key): value for key, value in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


# --- config and tokenizer in other folders -------------------------------------------------------------------------


def test_config_and_tokenizer_elsewhere_are_the_same_checkpoint(store, checkpoints, parted):
    weights, config, tokenizer = parted
    result = lark(
        f"checkpoint add apart {weights} --config {config}/config.json --tokenizer {tokenizer}", store=store.path
    )
    assert result.code == 0, result.err
    apart, whole = store.checkpoint_add("apart", weights), store.checkpoint_add("whole", checkpoints["base"])
    assert (apart.weights_sha256, apart.tokenizer_sha256) == (whole.weights_sha256, whole.tokenizer_sha256)
    assert apart.parts == {
        "config": {"path": str(config), "revision": None},
        "tokenizer": {"path": str(tokenizer), "revision": None},
    }
    report = store.ingest(["apart", "whole"], ["finetune"], ["chatml"], sketcher="small")
    assert report.units["n_sketched"].to_list() == [6, 6]
    assert store.sql("select sample_id, grad_norm from sketches").n_unique() == 6
    assert store.verify(sketches=4, checkpoint="apart")["ok"].all()
    assert len(store.plan(["apart"], ["finetune"], ["raw"], sketcher="small").units) == 1
    new = NewText(text="the kidney is affected")
    assert len(store.top(checkpoint="apart", new=new, sketcher="small").frame) == 6


@pytest.mark.parametrize("part", ["config", "tokenizer"])
def test_changed_part_is_refused(store, parted, part):
    weights, config, tokenizer = parted
    store.checkpoint_add("apart", weights, config=config, tokenizer=tokenizer)
    if part == "config":
        edit(config / "config.json", rms_norm_eps=1e-3)
    else:
        save_tokenizer(tokenizer, chat_template="{{ messages }}")
    with pytest.raises(CheckpointChangedError, match="the tokenizer or configuration of checkpoint `apart`"):
        store.ingest(["apart"], ["test"], ["chatml"], sketcher="small")


def test_check_notes_a_missing_part(empty, parted):
    weights, config, tokenizer = parted
    empty.checkpoint_add("apart", weights, config=config, tokenizer=tokenizer)
    assert len(empty.db_check()) == 0
    shutil.rmtree(tokenizer)
    (detail,) = empty.db_check()["detail"]
    assert f"`{tokenizer}` is missing" in detail


def test_missing_parts_are_errors_that_name_the_options(empty, parted):
    weights, config, tokenizer = parted
    missing = {
        "has no config.json": {},
        "has no tokenizer": {"config": config},
        "tokenizer` has no config.json": {"config": tokenizer, "tokenizer": tokenizer},
        "config` has no tokenizer": {"config": config, "tokenizer": config},
        "there is no config folder `nowhere`": {"config": "nowhere"},
    }
    for fact, options in missing.items():
        with pytest.raises(CheckpointError, match=fact) as caught:
            empty.checkpoint_add("apart", weights, **options)
        assert caught.value.hint
    assert "--config PATH" in lark(f"checkpoint add a {weights}", store=empty.path).err
    assert "--tokenizer PATH" in lark(f"checkpoint add a {weights} --config {config}", store=empty.path).err


def test_part_from_a_hub_is_kept_with_its_revision(empty, parted, monkeypatch):
    weights, config, tokenizer = parted
    requests = []

    def snapshot_download(name, *, revision, local_files_only, allow_patterns):
        del local_files_only
        assert "*.safetensors" not in allow_patterns
        requests.append((name, revision))
        return str(tokenizer)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    info = empty.checkpoint_add("apart", weights, config=config, tokenizer="org/tokenizer")
    assert info.parts["tokenizer"] == {"path": "org/tokenizer", "revision": "tokenizer"}
    assert empty.checkpoint_add("apart", weights) == info
    assert requests == [("org/tokenizer", None), ("org/tokenizer", "tokenizer")]


# --- folders that can't be read ------------------------------------------------------------------------------------

FOREIGN = {
    "pytorch_model_fsdp_0/__0_0.distcp": (
        "shards of an FSDP training",
        "accelerate merge-weights {}/pytorch_model_fsdp_0",
    ),
    "global_step5/mp_rank_00_model_states.pt": ("shards of a DeepSpeed training", "python {0}/zero_to_fp32.py {0} OUT"),
    "pytorch_model.bin": ("only pickled weights: `pytorch_model.bin`", "safe_serialization=True"),
    "model-Q4_K_M.gguf": ("holds a GGUF file", "full-precision weights"),
}


@pytest.mark.parametrize("file", FOREIGN)
def test_foreign_weights_are_named_with_the_way_to_convert_them(empty, base, file):
    fact, hint = FOREIGN[file]
    (base / "model.safetensors").unlink()
    (base / "optimizer.bin").touch()
    (base / file).parent.mkdir(exist_ok=True)
    (base / file).touch()
    with pytest.raises(CheckpointError, match=fact) as caught:
        empty.checkpoint_add("m", base)
    assert hint.format(base) in caught.value.hint


def test_accelerate_folders_are_added_with_a_config(empty, base, tmp_path):
    from accelerate import Accelerator

    model = LlamaForCausalLM.from_pretrained(base)
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(model)
    accelerator.save_state(str(tmp_path / "state"))
    accelerator.save_model(prepared, str(tmp_path / "model"), max_shard_size="100KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    for name in ("state", "model"):
        empty.checkpoint_add(name, tmp_path / name, config=base, tokenizer=base)
        files = examine(str(tmp_path / name), None, {k: {"path": str(base)} for k in ("config", "tokenizer")})
        loaded = load_model(files.model, CPU, "auto").state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8"])
def test_quantised_config_is_named(empty, base, method):
    edit(base / "config.json", quantization_config={"quant_method": method})
    with pytest.raises(CheckpointError, match=rf"are quantised \({method}\)") as caught:
        empty.checkpoint_add("m", base)
    assert "full-precision weights" in caught.value.hint


@pytest.mark.parametrize(
    ("ending", "name"), [("SCB", "bitsandbytes"), ("qweight", "GPTQ or AWQ"), ("weight_scale_inv", "FP8")]
)
def test_quantised_tensors_are_named(empty, base, ending, name):
    rename(base, lambda key: key.replace("q_proj.weight", f"q_proj.{ending}"))
    with pytest.raises(CheckpointError, match=rf"quantised \({name}\): they have `.*q_proj.{ending}`"):
        empty.checkpoint_add("m", base)


# --- names of wrapped models ---------------------------------------------------------------------------------------

PREFIXED = {
    "DDP": lambda key: f"module.{key}",
    "compiled": lambda key: f"_orig_mod.{key}",
    "both": lambda key: f"module._orig_mod.{key}",
    "a compiled layer": lambda key: key.replace("layers.1.", "layers.1._orig_mod."),
}


@pytest.mark.parametrize("kind", PREFIXED)
def test_names_of_wrapped_models_are_read_without_the_prefix(empty, base, checkpoints, kind, caplog):
    rename(base, PREFIXED[kind])
    (note,) = empty.checkpoint_add("m", base).notes
    assert note.startswith("its weights have names of a wrapped model: ")
    expected = load_model(checkpoints["base"], CPU, "auto").state_dict()
    assert caplog.messages == []
    loaded = load_model(base, CPU, "auto").state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[key], value) for key, value in expected.items())
    assert "names of a wrapped model" in caplog.messages[0]
    files = dict.fromkeys(load_file(checkpoints["base"] / "model.safetensors"), base / "model.safetensors")
    reference = dict.fromkeys(files, checkpoints["base"] / "model.safetensors")
    assert relative_distances(files, reference, ("m", "base"))["all"] == 0


def test_wrapped_names_that_still_do_not_match_are_an_error(base):
    rename(base, lambda key: f"module.{key.replace('norm', 'nom')}")
    with pytest.raises(CheckpointError, match=r"names of a wrapped model, such as `module\..*norm.weight` is missing"):
        load_model(base, CPU, "auto")


# --- attention -----------------------------------------------------------------------------------------------------


def test_missing_attention_falls_back_and_says_so(store, base):
    edit(base / "config.json", attn_implementation="flash_attention_2")
    store.checkpoint_add("flash", base)
    result = lark("ingest -c flash -s test --variant raw --sketcher small", store=store.path)
    assert result.code == 0, result.err
    notes = [line for line in result.err.splitlines() if "flash_attention_2" in line]
    assert len(notes) == 1
    assert notes[0].startswith("note: the config in `")
    assert notes[0].endswith("but it needs CUDA; the default (`sdpa`) is used instead")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_is_chosen(store, base, attention):
    edit(base / "config.json", attn_implementation="flash_attention_2")
    assert load_model(base, CPU, "auto", attention).config._attn_implementation == attention
    assert unweighted_model(base, torch.float32, CPU, attention).config._attn_implementation == attention
    assert len(list(meta_model(base).parameters())) > 0
    result = lark(
        f"ingest -c base -s finetune --variant raw --sketcher small --attention {attention}", store=store.path
    )
    assert result.code == 0, result.err
    assert store.sql("select recipe->>'attention' as a from ingest_runs").item() == attention
    assert store.verify(sketches=2, attention="eager")["ok"].all()
    new = NewText(text="the kidney", attention=attention)
    assert len(store.top(checkpoint="base", new=new, sketcher="small").frame) == 6


def test_flash_attention_needs_cuda_half_precision_and_its_package():
    cuda, version = torch.device("cuda"), "flash_attention_2"
    assert _unavailable(version, CPU, "auto") == _unavailable("flex_attention", None, "auto") == "it needs CUDA"
    assert _unavailable(version, cuda, "float32") == "it needs half precision"
    assert _unavailable(version, cuda, "auto") == "it is not installed"
    assert _unavailable("flex_attention", cuda, "float32") is _unavailable("eager", CPU, "auto") is None


def test_attention_that_a_model_lacks_is_an_error(tmp_path):
    config = BloomConfig(vocab_size=300, hidden_size=48, n_layer=1, n_head=4)
    BloomForCausalLM(config).save_pretrained(tmp_path)
    for build in (
        lambda: load_model(tmp_path, CPU, "auto", "sdpa"),
        lambda: unweighted_model(tmp_path, torch.float32, CPU, "sdpa"),
    ):
        with pytest.raises(InputError, match="the model does not support `--attention sdpa`"):
            build()


def test_unknown_attention_is_refused(store):
    result = lark("plan -c base -s test --variant raw --attention flash", store=store.path)
    assert result.err.startswith("error: unknown attention `flash`\n\nhint: use one of auto, eager, sdpa")


# --- objects -------------------------------------------------------------------------------------------------------


@pytest.fixture
def objects(base):
    return {"model": AutoModelForCausalLM.from_pretrained(base), "tokenizer": AutoTokenizer.from_pretrained(base)}


@pytest.mark.folder
def test_model_object_is_saved_in_the_store_and_added(store, objects, base):
    info = store.checkpoint_add("m", **objects, epoch=2)
    folder = store.path / "checkpoints" / "m"
    assert (info.path, info.epoch, info.model) == (str(folder), 2.0, "llama")
    assert info.weights_sha256 == store.checkpoint_add("base", base).weights_sha256
    assert store.checkpoint_add("m", **objects) == info
    assert list(folder.parent.iterdir()) == [folder]
    assert store.ingest(["m"], ["test"], ["chatml"], sketcher="small").units["n_sketched"].item() == 4
    with torch.no_grad():
        objects["model"].lm_head.weight.add_(1)
    with pytest.raises(NameTakenError, match="has other files"):
        store.checkpoint_add("m", **objects)
    assert ("saved model", "checkpoints", 1) in store.checkpoint_remove("m", dry_run=True).rows()
    assert folder.is_dir()
    store.checkpoint_remove("m")
    assert not folder.exists()


def test_model_object_is_saved_to_a_path(empty, objects, tmp_path):
    compiled = torch.nn.Module()
    compiled._orig_mod = objects["model"]
    wrapped = torch.nn.DataParallel(compiled)
    info = empty.checkpoint_add("m", tmp_path / "new" / "m", model=wrapped, tokenizer=objects["tokenizer"])
    assert info.path == str(tmp_path / "new" / "m")
    assert not any(".m." in child.name for child in (tmp_path / "new").iterdir())
    empty.checkpoint_remove("m")
    assert (tmp_path / "new" / "m" / "model.safetensors").is_file()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft uses it
def test_adapters_need_no_tokenizer_of_their_own(empty, base, tmp_path):
    model = save_lora(tmp_path / "lora", base)
    assert empty.checkpoint_add("m", tmp_path / "object", model=model).parts is None
    assert (tmp_path / "object" / "adapter_config.json").is_file()


def test_unusable_objects_are_refused_before_saving(empty, objects, base):
    model, tokenizer = objects["model"], objects["tokenizer"]
    for fact, options in {
        "no path is given": {},
        "there is no model to save": {"tokenizer": tokenizer},
        "the model has no tokenizer": {"model": model},
        "`model` has no `save_pretrained`: Linear": {"model": torch.nn.Linear(2, 2), "tokenizer": tokenizer},
        "`tokenizer` must be a text or a path or a tokenizer or None": {"model": model, "tokenizer": 5},
    }.items():
        with pytest.raises(InputError, match=fact):
            empty.checkpoint_add("m", **options)
    with pytest.raises(NameTakenError, match="has other files"):
        empty.checkpoint_add("m", base.parent, **objects)
    info = empty.checkpoint_add("m", base.parent / "m", model=model, tokenizer=base)
    assert info.parts == {"tokenizer": {"path": str(base), "revision": None}}


def test_store_without_a_folder_needs_a_path(empty, objects, monkeypatch):
    monkeypatch.setattr("lark_store.modeling.save_objects.saved_folder", lambda *_: None)
    with pytest.raises(InputError, match="this store has no folder to save the model in"):
        empty.checkpoint_add("m", **objects)
