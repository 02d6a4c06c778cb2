"""Hashes that stores and backups hold: they must stay the same from version to version."""

from __future__ import annotations

import hashlib
import json

import pytest
from helpers.checkpoints import save_checkpoint, save_lora, sharded

from lark_store.core.hashing import content_hash, file_hash, is_whole, sealed
from lark_store.modeling.checkpoints import examine, weight_files

TOKENIZER = ["chat_template.jinja", "config.json", "tokenizer.json", "tokenizer_config.json"]


def sha256(text):
    return hashlib.sha256(text if isinstance(text, bytes) else text.encode()).hexdigest()


def digest(folder, names):
    """The hash of files by name: a line each, sorted."""
    return sha256("".join(f"{name} {sha256((folder / name).read_bytes())}\n" for name in sorted(names)))


def test_hashes_of_a_model_cover_its_weights_and_its_tokenizer(tmp_path):
    folder = save_checkpoint(tmp_path / "model")
    files = examine(str(folder))
    assert files.weights_sha256 == digest(folder, ["model.safetensors"])
    assert files.tokenizer_sha256 == digest(folder, TOKENIZER)
    assert (files.folder, files.base, files.revision, files.parts) == (folder, folder, None, {})


def test_hash_of_shards_covers_each_by_name(tmp_path):
    folder = save_checkpoint(tmp_path / "model")
    sharded()(folder)
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) > 1
    assert examine(str(folder)).weights_sha256 == digest(folder, shards)
    assert [path.name for path in weight_files(folder)] == shards


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft uses it
def test_hash_of_adapters_covers_weights_config_and_base(tmp_path):
    base = save_checkpoint(tmp_path / "base")
    save_lora(tmp_path / "lora", base)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    del config["base_model_name_or_path"], config["revision"]
    for name in ("target_modules", "exclude_modules", "modules_to_save"):
        config[name] = config[name] and sorted(config[name])
    hashes = [
        digest(tmp_path / "lora", ["adapter_model.safetensors"]),
        sha256(json.dumps(dict(sorted(config.items())))),
        digest(base, ["model.safetensors"]),
    ]
    files = examine(str(tmp_path / "lora"))
    assert files.weights_sha256 == sha256(" ".join(hashes))
    assert files.tokenizer_sha256 == digest(base, TOKENIZER)


def test_hashes_of_texts_files_and_records(tmp_path):
    (tmp_path / "file").write_bytes(b"a\r\nb")
    assert file_hash(tmp_path / "file") == sha256(b"a\r\nb")
    assert content_hash("ä", None) == sha256('["ä", null]')
    record = {"b": "ä", "a": 1}
    assert sealed(record) == {"b": "ä", "a": 1, "sha256": sha256('{"a": 1, "b": "ä"}')}
    assert is_whole(sealed(record))
    assert is_whole(record)  # of an older version, without a hash
    assert not is_whole(sealed(record) | {"a": 2})
