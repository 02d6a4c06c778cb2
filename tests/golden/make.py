"""Make the golden store of a schema: a tiny store, made by the old code, for the upgrade tests.

    python tests/golden/make.py COMMIT      # the last commit before the next schema came

checks COMMIT out into a folder that goes again, and has its code make a store: two checkpoints of a tiny model, three
sources, sketches, scores; a snapshot, an index and a study where there were such things. `NNNN.tar.xz` beside this file
is the store, NNNN its schema; `NNNN.json` holds the old code's answers, for `tests/migrations/test_golden.py`.

The weights are not inside: `save_model` makes the same files, byte by byte, with any version of any library.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from lark_store import Store

HERE = Path(__file__).parent
CHECKPOINTS, SKETCHER = ("base", "epoch-1"), "tiny"
MARKS = ["<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
HIDDEN, INNER, VOCABULARY = 16, 32, 258
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": VOCABULARY,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "dtype": "float32",
    "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 257,
}  # fmt: skip
SHAPES = {
    "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
    "model.layers.0.input_layernorm.weight": (HIDDEN,),
    "model.layers.0.mlp.down_proj.weight": (HIDDEN, INNER),
    "model.layers.0.mlp.gate_proj.weight": (INNER, HIDDEN),
    "model.layers.0.mlp.up_proj.weight": (INNER, HIDDEN),
    "model.layers.0.post_attention_layernorm.weight": (HIDDEN,),
    "model.layers.0.self_attn.k_proj.weight": (HIDDEN, HIDDEN),
    "model.layers.0.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
    "model.layers.0.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
    "model.layers.0.self_attn.v_proj.weight": (HIDDEN, HIDDEN),
    "model.norm.weight": (HIDDEN,),
}
QUESTIONS = [
    {"id": f"q{i}", "question": f"Is organ {i} affected?", "answer": ("yes", "no", "maybe")[i % 3]} for i in range(6)
]
SONGS = [{"id": f"song-{i}", "text": f"A song about the sea, number {i}"} for i in range(4)]
MUTE = {"id": "mute", "text": "x"}  # one token: nothing to predict, so it fails


# --- the model -----------------------------------------------------------------------------------------------------


def save_model(folder: Path, seed: int) -> Path:
    """Write a checkpoint: weights from an integer sequence, a tokenizer of bytes, everything spelled out here."""
    folder.mkdir(parents=True)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    body = b""
    for number, (name, shape) in enumerate(SHAPES.items()):
        size = int(np.prod(shape))
        drawn = (np.arange(size, dtype=np.uint64) + np.uint64(1 + seed * 7919 + number * 104_729)) * np.uint64(
            2654435761
        )
        drawn = (drawn ^ (drawn >> np.uint64(15))) * np.uint64(2246822519) % np.uint64(1 << 24)
        values = (drawn.astype(np.float64) / (1 << 24) - 0.5).astype("<f4")
        values = np.float32(1) + values / np.float32(4) if len(shape) == 1 else values / np.float32(2)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(body), len(body) + 4 * size]}
        body += values.astype("<f4").tobytes()
    output = json.dumps(header).encode()
    output += b" " * (-len(output) % 8)
    (folder / "model.safetensors").write_bytes(len(output).to_bytes(8, "little") + output + body)
    for name, content in {"config": CONFIG, "tokenizer": tokenizer(), "tokenizer_config": TOKENIZER_CONFIG}.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1, sort_keys=True), encoding="utf-8")
    return folder


TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 256, "chat_template": TEMPLATE,
    "bos_token": MARKS[0], "eos_token": MARKS[1], "pad_token": MARKS[1],
}  # fmt: skip


def tokenizer() -> dict[str, Any]:
    """Return tokenizer.json: a token for each byte, under GPT-2's names of the bytes, and two marks."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    names = {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"))
    vocabulary = {names[byte]: byte for byte in range(256)} | {mark: 256 + i for i, mark in enumerate(MARKS)}
    model |= {"type": "BPE", "fuse_unk": False, "byte_fallback": False, "vocab": vocabulary, "merges": []}
    added = [{"id": 256 + i, "content": mark, "special": True, **flags} for i, mark in enumerate(MARKS)]
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
            "pre_tokenizer": level, "post_processor": None, "decoder": level, "model": model}  # fmt: skip


# --- the store, made by the old code -------------------------------------------------------------------------------


def add(store: Store, folder: Path, name: str, rows: list[dict[str, str]], stage: str) -> None:
    """Add rows as a source."""
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    store.source_add(name, file, stage=stage)


def fill(store: Store, work: Path) -> None:
    """Create rows of every kind in the schema."""
    for epoch, name in enumerate(CHECKPOINTS):
        model, metrics = save_model(work / name, epoch), {"accuracy": 0.5 + epoch / 4}
        store.checkpoint_add(name, model, epoch=epoch, learning_rate=1e-3, metrics=metrics)
    store.sketcher_add(SKETCHER, k=256)
    add(store, work, "finetune", QUESTIONS[:4], "finetune")
    add(store, work, "test", QUESTIONS[4:], "query")
    add(store, work, "songs", SONGS[:3], "pretrain")
    score(store)
    if hasattr(store, "snapshot_create"):
        store.snapshot_create("before")
    add(store, work, "songs", [*SONGS, MUTE], "pretrain")  # the snapshot lacks the new ones
    score(store)
    if hasattr(store, "index_build"):
        store.index_build(SKETCHER)
    if hasattr(store, "study_keep"):
        store.study_keep("facts", recipe={"seed": 1}, environment={"device": "cpu"}, hashes={"table": "0" * 64})


def score(store: Store) -> None:
    """Ingest and score everything."""
    for sources, variants in ((["finetune", "test"], ["chatml"]), (["songs"], ["raw", "chatml"])):
        store.ingest(CHECKPOINTS, sources, variants, sketcher=SKETCHER)
    store.attribute(CHECKPOINTS, queries="test", sketcher=SKETCHER)


# Queries which every version of the code can answer.
ANSWERS = {
    "samples": "SELECT source, sample_id, prompt, response, text, label, meta, content_sha256 FROM samples",
    "checkpoint_metrics": "SELECT checkpoint, name, value FROM checkpoint_metrics",
    "sketches": "SELECT sketcher, row_key, n_tokens, n_loss_tokens, loss, grad_norm FROM sketches",
    "failures": "SELECT checkpoint, source, variant, sample_id, reason FROM failures",
    "influence": "SELECT checkpoint, query_id, source, variant, rank, score, sample_id, method FROM influence",
    "source_influence": 'SELECT checkpoint, query_id, source, variant, "max", argmax, mean, std, n '
    "FROM source_influence",
}


def answers(store: Store) -> dict[str, list[list[Any]]]:
    """Return all stored data, sorted."""
    return {
        name: [list(row) for row in store.sql(f"{query} ORDER BY ALL").iter_rows()] for name, query in ANSWERS.items()
    }


def tops(store: Store) -> dict[str, list[list[Any]]]:
    """Return every sample's score for each query, which the code computes from the sketches."""
    results = {}
    for checkpoint, query in itertools.product(CHECKPOINTS, ("q4", "q5")):
        frame = store.top(query, checkpoint=checkpoint, sketcher=SKETCHER, k=100).frame
        names = ["source", "variant", "sample_id"]
        results[f"{checkpoint}/{query}"] = [list(row) for row in frame.sort(names).select(*names, "score").iter_rows()]
    return results


def make(out: Path) -> None:
    """Make a store with the imported `lark_store`, pack it and write its answers."""
    from lark_store import Store

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "golden.store"
        with Store.create(path) as store:
            fill(store, Path(folder))
        with Store.open(path) as store:
            output = {"answers": answers(store), "tops": tops(store)}
        status: Any = Store.db_status(path)
        schema = status[0] if isinstance(status, tuple) else status.schema
        with tarfile.open(out / f"{schema}.tar.xz", "w:xz", preset=9) as archive:
            archive.add(path, "golden.store", filter=plain)
    text = json.dumps(output, ensure_ascii=False, separators=(",", ":"))
    (out / f"{schema}.json").write_text(text + "\n", encoding="utf-8")


def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Leave out who made a file."""
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry


def main(commit: str) -> None:
    """Check a commit out, and run this file again with its code."""
    with tempfile.TemporaryDirectory() as folder:
        code = Path(folder) / "code"
        git = ["git", "-C", str(HERE), "worktree"]
        subprocess.run([*git, "add", "--detach", str(code), commit], check=True)
        try:
            environment = os.environ | {"PYTHONPATH": str(code), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            subprocess.run([sys.executable, __file__, "--here"], check=True, env=environment)
        finally:
            subprocess.run([*git, "remove", "--force", str(code)], check=True)


if __name__ == "__main__":
    if sys.argv[1] == "--here":
        make(HERE)
    else:
        main(sys.argv[1])
