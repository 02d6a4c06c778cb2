"""Which tensors of a checkpoint's files are the weights of linear layers."""

from __future__ import annotations

import re

import pytest
from helpers.models import CONFIGS, build_model
from safetensors.torch import load_file

from lark_store import Store
from lark_store.errors import CheckpointError
from lark_store.modeling.linear_modules import linear_tensors
from lark_store.modeling.loading import meta_model

# Embeddings, heads, routers of mixtures, and the norms of a block.
OTHER = re.compile(r"embed|wte|wpe|lm_head|norm|ln_|\.(gate|router)\.(weight|e_score)|bias$")


@pytest.mark.parametrize("name", CONFIGS)
def test_linear_tensors_are_the_matrices_of_mlps_and_attention(name, tmp_path):
    build_model(name).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    expected = {key for key, tensor in tensors.items() if tensor.dim() > 1 and not OTHER.search(key)}
    assert len(expected) >= 8
    assert linear_tensors(meta_model(tmp_path), tensors) == expected


def test_files_without_the_models_prefix(tmp_path):
    build_model("GPT-2").save_pretrained(tmp_path)
    tensors = {
        key.removeprefix("transformer."): value for key, value in load_file(tmp_path / "model.safetensors").items()
    }
    found = linear_tensors(meta_model(tmp_path), tensors)
    assert found == {
        f"h.{i}.{layer}.weight" for i in range(2) for layer in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }


def test_unknown_names_leave_only_the_distance_over_all(tmp_path, checkpoints, monkeypatch):
    monkeypatch.setattr("lark_store.modeling.linear_modules.linear_modules", lambda _: [("other.name", None, False)])
    with Store.create(tmp_path / "lark.store") as store:
        for name, folder in checkpoints.items():
            store.checkpoint_add(name, folder)
        assert store.checkpoint_distance("epoch-1", "base") > 0
        with pytest.raises(CheckpointError, match="have other names than the linear layers of its model"):
            store.checkpoint_distance("epoch-1", "base", layers="linear")
