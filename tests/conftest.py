"""A tiny randomly initialised Llama with a real tokenizer, small sources, and a store around them."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # tiny models: threads would only wait for each other
os.environ.pop("LARK_STORE", None)

import pytest
import torch
from hypothesis import settings

from lark_store import Store
from lark_store import store as package

pytest_plugins = ["cluster"]
settings.register_profile("untimed", deadline=None)  # how fast a test runs here says nothing
settings.load_profile("untimed")

TEMPLATE = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
WORDS = (
    "is the kidney affected by this disease yes no maybe often never seen in most patients a song about the sea and "
    "the night train to the old harbour Context Question Answer user assistant"
)


def save_tokenizer(folder: Path, *, chat_template: str | None = TEMPLATE) -> None:
    """Save a byte-level BPE tokenizer: any text comes back from it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    fast.chat_template = chat_template
    fast.save_pretrained(folder)


def save_checkpoint(folder: Path, *, seed: int = 0, chat_template: str | None = TEMPLATE, **config: object) -> Path:
    """Save a random Llama and its tokenizer as a trainer would."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape = {
        "vocab_size": 384,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "initializer_range": 0.1,
    }
    LlamaForCausalLM(LlamaConfig(**(shape | config))).save_pretrained(folder)
    save_tokenizer(folder, chat_template=chat_template)
    return folder


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def qa_rows(n: int, start: int = 0) -> list[dict[str, object]]:
    """Make questions with answers."""
    answers = ("yes", "no", "maybe")
    return [
        {
            "id": f"q{i}",
            "question": f"Is organ {i} affected?",
            "context": f"Seen in {i}.",
            "answer": answers[i % 3],
        }
        for i in range(start, start + n)
    ]


def text_rows(n: int, what: str = "sea") -> list[dict[str, object]]:
    """Make plain texts."""
    return [{"id": f"{what}-{i}", "text": f"A song about the {what} number {i} and the night train."} for i in range(n)]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of two checkpoints of one model: `base` and `epoch-1`."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: save_checkpoint(root / name, seed=seed) for seed, name in enumerate(("base", "epoch-1"))}


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of four sources."""
    root = tmp_path_factory.mktemp("texts")
    return {
        "finetune": write_jsonl(root / "finetune.jsonl", qa_rows(6)),
        "test": write_jsonl(root / "test.jsonl", qa_rows(4, start=100)),
        "medical": write_jsonl(root / "medical.jsonl", text_rows(5, "kidney")),
        "songs": write_jsonl(root / "songs.jsonl", text_rows(5)),
    }


def fill(store: Store, checkpoints: dict[str, Path], texts: dict[str, Path]) -> None:
    """Add the checkpoints and sources, and a sketcher `small` of 1,024 bins."""
    for epoch, (name, path) in enumerate(checkpoints.items()):
        store.checkpoint_add(name, path, epoch=epoch, learning_rate=2e-4, metrics={"accuracy": 0.5 + epoch / 10})
    store.source_add("finetune", texts["finetune"], stage="finetune", domain="medical")
    store.source_add("medical", texts["medical"], stage="pretrain", domain="medical")
    store.source_add("songs", texts["songs"], stage="pretrain", domain="entertainment")
    store.source_add("test", texts["test"], stage="query")
    store.sketcher_add("small", k=1024)


def named(path: Path) -> str:
    """Return what another process has to call the store at a path."""
    return package.location_of(path).label


def copy_store(source, target):
    """Copy a store to another path, where nobody is at work on it; returns the path."""
    if Path(source).is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("locks"))
    else:
        with tempfile.TemporaryDirectory() as folder, Store.open(source) as opened:
            Store.db_restore(opened.db_backup(Path(folder) / "backup").path, to=target)
    return Path(target)


@pytest.fixture
def store(tmp_path: Path, checkpoints: dict[str, Path], texts: dict[str, Path]) -> Store:
    """A store with checkpoints and sources, not ingested."""
    with Store.create(tmp_path / "lark.store") as made:
        fill(made, checkpoints, texts)
        yield made


@pytest.fixture(scope="session")
def scored_path(tmp_path_factory: pytest.TempPathFactory, checkpoints: dict[str, Path], texts: dict[str, Path]) -> Path:
    """A store that is ingested (sketcher `small`) and scored at both checkpoints; to be read only."""
    path = tmp_path_factory.mktemp("scored") / "lark.store"
    with Store.create(path) as made:
        fill(made, checkpoints, texts)
        names = list(checkpoints)
        made.ingest(names, ["finetune", "test"], ["chatml"], sketcher="small")
        made.ingest(names, ["medical", "songs"], ["raw", "chatml"], sketcher="small")
        made.attribute(names, queries="test", sketcher="small")
    return path


@pytest.fixture
def scored(scored_path: Path) -> Store:
    """The scored store, open."""
    with Store.open(scored_path) as opened:
        yield opened


@pytest.fixture(scope="session")
def scored_backup(scored_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backup of the scored store."""
    path = tmp_path_factory.mktemp("scored-backup") / "backup"
    with Store.open(scored_path) as opened:
        opened.db_backup(path)
    return path


@pytest.fixture
def scored_copy(scored_path: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Store:
    """A copy of the scored store, to change."""
    if request.config.getoption("place") == "cluster":
        Store.db_restore(request.getfixturevalue("scored_backup"), to=tmp_path / "copy")
    else:
        copy_store(scored_path, tmp_path / "copy")
    with Store.open(tmp_path / "copy") as opened:
        yield opened
