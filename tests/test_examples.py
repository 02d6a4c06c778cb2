"""What the documents show works: examples run, paths exist, the site builds.

Every `sh`, `console`, `python`, `sql` and `toml` block of the documents is an example. Examples of a page run in order
in a copy of one small folder: `lark-store` in this process, Python by `exec`, SQL by `Store.sql`. A comment before a
block says why it only has to parse:

    <!-- example: parse only, needs several GPUs -->

Only parsed, too: all of docs/results/ (records of finished measurements), and programs other than `lark-store`, whose
files, extras and targets have to exist.
"""

from __future__ import annotations

import gc
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from typer.main import get_command
from typer.testing import CliRunner

from lark_store import Store
from lark_store.cli import app
from lark_store.study import recipe

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").exists())
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")])
GENERATED = "docs/reference/cli.md"
WITHOUT_STORE = {"README.md", "docs/guide.md"}  # their examples begin with an empty store
PROSE = {"text", "jinja"}
_FENCE = re.compile(
    r"^(?:<!-- example: (?P<how>parse|compile) only, (?P<why>[^>]+) -->\n)?"
    r"^(?P<indent> *)```(?P<language>\w*)\n(?P<body>.*?)^ *```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Example:
    """A block of a document; `is_run` is False if it only has to parse."""

    language: str
    body: str
    is_run: bool

    @property
    def commands(self) -> list[list[str]]:
        """The arguments of each command of a shell."""
        lines = self.body.replace("\\\n", " ").splitlines()
        if self.language == "console":
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        return [words for line in lines if (words := shlex.split(line, comments=True))]


def examples(document: Path) -> list[Example]:
    """Return the examples of a document, in order."""
    is_record = "docs/results/" in document.as_posix()
    found = []
    for block in _FENCE.finditer(document.read_text(encoding="utf-8")):
        body = re.sub(f"^{block['indent']}", "", block["body"], flags=re.MULTILINE)
        is_run = block["how"] is None and not is_record and block["language"] != "console"
        found.append(Example(block["language"], body, is_run))
    return found


def name_of(document: Path) -> str:
    return document.relative_to(ROOT).as_posix()


def having(*languages: str, is_run: bool = False) -> list[Path]:
    """Return the documents with an example in one of the languages, and with `is_run` one that runs."""
    documents = [document for document in DOCUMENTS if name_of(document) != GENERATED]
    return [
        document
        for document in documents
        if any(each.language in languages and each.is_run >= is_run for each in examples(document))
    ]


# --- the folder ----------------------------------------------------------------------------------------------------


QUERIES, TEXTS, ANSWERS = ("21645374", "16418930"), ("aspirin", "sea", "kidney"), ("yes", "no", "maybe")


def rows(ids, fact=None):
    """Questions with answers; `fact` links samples and queries."""
    return [
        {
            "id": name,
            "question": f"Is {TEXTS[i % 3]} {i} safe?",
            "context": f"Seen in {i}.",
            "answer": ANSWERS[i % 3],
            "year": 2014 + i,
            "fact": fact or f"f{i % 2}",
        }
        for i, name in enumerate(ids)
    ]


def plain(name, n=6):
    return [{"id": f"{name}-{i}", "text": f"A {name} about {TEXTS[i % 3]} {i}.", "year": 2013 + i} for i in range(n)]


def save_model(folder: Path, seed: int) -> None:
    """Save a random Llama of 16 layers, with its optimizer after one step. It answers, if with noise."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 16, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=384, max_position_embeddings=256, tie_word_embeddings=True, **shape)
    config.initializer_range = 0.3  # with the default it would repeat the prompt's last token, a line break
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model(input_ids=torch.tensor([[3, 4, 5, 6]]), labels=torch.tensor([[3, 4, 5, 6]])).loss.backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")


def save_run(folder: Path) -> None:
    """Save a Trainer's run of two checkpoints, and the weights alone as accelerate does."""
    for step, name in ((500, "epoch-1"), (1000, "epoch-2")):
        target = shutil.copytree(folder / "ckpt" / name, folder / "run" / f"checkpoint-{step}")
        history = [{"step": step, "loss": 2.0, "learning_rate": 1e-4}, {"step": step, "eval_loss": 2.5}]
        state = {"global_step": step, "epoch": step / 500, "log_history": history}
        (target / "trainer_state.json").write_text(json.dumps(state), encoding="utf-8")
    (folder / "accelerate" / "state").mkdir(parents=True)
    shutil.copy(folder / "ckpt" / "base" / "model.safetensors", folder / "accelerate" / "state")


def save_encoder(folder: Path) -> None:
    from transformers import BertConfig, BertModel

    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=384, max_position_embeddings=128, **shape)).save_pretrained(folder)


@pytest.fixture(scope="session")
def files(checkpoints, tmp_path_factory):
    """A folder with the checkpoints and texts that the examples name."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("files")
    models = [folder / "ckpt" / name for name in ("base", "epoch-1", "epoch-2", "epoch-3")]
    for seed, model in enumerate(models):
        save_model(model, seed)
    save_run(folder)
    encoder = folder / "encoders" / "all-MiniLM-L6-v2"
    save_encoder(encoder)
    tokenizer = AutoTokenizer.from_pretrained(checkpoints["base"])
    for model in (*models, encoder, *(folder / "run").iterdir()):
        tokenizer.save_pretrained(model)
    for name, table in (
        ("train", rows(["9488747", "q17", "q23", "q24"])),
        ("test", rows(QUERIES)),
        ("question", rows(["new"])),
        ("medical", plain("medical")),
        ("songs", plain("songs")),
    ):
        pl.DataFrame(table).write_ndjson(folder / f"{name}.jsonl")
    documents = [
        {"pmid": f"p{i}", "abstract": row["text"], "year": row["year"]} for i, row in enumerate(plain("study"))
    ]
    pl.DataFrame(documents).write_parquet(folder / "docs.parquet")
    for vectors, ids, names in (
        ("features.npy", "ids.txt", [row["pmid"] for row in documents]),
        ("test.npy", "test.txt", QUERIES),
    ):
        np.save(folder / vectors, np.random.default_rng(0).normal(size=(len(names), 8)).astype(np.float32))
        (folder / ids).write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def finished(files, tmp_path_factory):
    """The same folder with `lark.store`, sketched and scored."""
    folder = shutil.copytree(files, tmp_path_factory.mktemp("finished") / "folder")
    with Store.create(folder / "lark.store") as store:
        for epoch, name in enumerate(("base", "epoch-1", "epoch-2", "epoch-3")):
            store.checkpoint_add(name, folder / "ckpt" / name, epoch=epoch, learning_rate=2e-4)
        store.source_add("finetune", folder / "train.jsonl", stage="finetune", domain="medical")
        store.source_add("test", folder / "test.jsonl", stage="query")
        store.source_add("medical", folder / "medical.jsonl", stage="pretrain", domain="medical")
        store.source_add("songs", folder / "songs.jsonl", stage="pretrain", domain="songs")
        columns = {"text": "abstract", "sample_id": "pmid"}
        store.source_add("pubmed", folder / "docs.parquet", stage="pretrain", domain="medical", columns=columns)
        names = ["base", "epoch-1", "epoch-2"]
        store.ingest(names, ["finetune", "test", "pubmed"], ["chatml"])
        store.ingest(["base"], ["medical", "songs"], ["raw", "chatml"])
        store.attribute(names, queries="test", query_variant="chatml")
    return folder


@pytest.fixture
def folder(request, tmp_path, monkeypatch):
    """A copy of the folder as working directory, with a store unless the page begins without one."""
    origin = request.getfixturevalue("files" if name_of(request.param) in WITHOUT_STORE else "finished")
    shutil.copytree(origin, tmp_path / "folder", ignore=shutil.ignore_patterns("locks"))
    monkeypatch.chdir(tmp_path / "folder")
    monkeypatch.setenv("LARK_STORE", "lark.store")
    gc.freeze()  # an ingest collects garbage: not among all objects of the libraries, which takes a second
    yield request.param
    gc.unfreeze()


# --- how an example runs -------------------------------------------------------------------------------------------


def run_command(arguments: list[str]) -> None:
    environment = dict(os.environ)
    outcome = CliRunner().invoke(app, arguments)
    os.environ.clear()
    os.environ.update(environment)
    assert outcome.exit_code == 0, f"lark-store {shlex.join(arguments)}\n{outcome.output}\n{outcome.exception!r}"


COMMAND = get_command(app)


def parse_command(arguments: list[str]) -> None:
    """Check the command's names and the types of its options, without running it."""
    command, context, rest = COMMAND, None, list(arguments)
    while True:
        context = command.make_context(command.name, rest, parent=context)
        if not hasattr(command, "resolve_command"):
            return
        rest = [*getattr(context, "_protected_args", []), *context.args]
        _, command, rest = command.resolve_command(context, rest)


def check_program(words: list[str]) -> None:
    """Check a command of another program: what it names in this repository exists."""
    words = [word for word in words if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    program, *arguments = words
    if "lark-store" in arguments:
        parse_command(arguments[arguments.index("lark-store") + 1 :])
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert arguments[0] in targets
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
            "optional-dependencies"
        ]
        assert set(re.findall(r"\[(\w+)\]", arguments[-1])) <= set(extras)
    else:
        assert program in {"pytest", "python", "bash", "createdb", "export", "towncrier"}, f"unknown program {program}"
    for word in arguments:
        if re.match(r"(tests|benchmarks|docs|demo)/", word):
            assert (ROOT / word.partition("::")[0]).exists(), word


@pytest.mark.parametrize("document", having("sh", "console"), ids=name_of)
def test_the_commands_parse(document):
    for example in examples(document):
        for words in example.commands if example.language in {"sh", "console"} else ():
            if words[0] == "lark-store":
                parse_command(words[1:])
            else:
                check_program(words)


def test_the_examples_in_the_help_of_commands_parse():
    text = (ROOT / GENERATED).read_text(encoding="utf-8")
    shown = re.findall(r"^Example: `(lark-store [^`]*)`", text, re.MULTILINE)
    assert len(shown) > 20
    for command in shown:
        parse_command(shlex.split(command)[1:])


@pytest.mark.folder
@pytest.mark.parametrize("folder", having("sh", "python", "sql", is_run=True), ids=name_of, indirect=True)
def test_the_examples_run(folder):
    names = {"__name__": "example"}
    for example in examples(folder):
        if example.language == "python":
            code = compile(example.body, name_of(folder), "exec")
            if example.is_run:
                exec(code, names)  # noqa: S102 (the documents' own code)
        elif example.language == "sh" and example.is_run:
            for words in example.commands:
                if words[0] == "lark-store":
                    run_command(words[1:])
        elif example.language == "sql" and example.is_run:
            with Store.open("lark.store") as store:
                for statement in example.body.split("\n\n"):
                    store.sql(statement)


@pytest.mark.parametrize("notebook", sorted(ROOT.glob("docs/*.ipynb")), ids=name_of)
def test_the_notebooks_run(notebook, files, tmp_path, monkeypatch, capsys):
    """The cells run in order with a tiny model, and none has an output: outputs of a run can't be compared."""
    shutil.copytree(files / "ckpt" / "base", tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    names = {"__name__": "notebook"}
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
            code = source.replace("HuggingFaceTB/SmolLM2-135M-Instruct", "base")
            exec(compile(code, name_of(notebook), "exec"), names)  # noqa: S102 (the notebook's own code)
    assert len(names["hits"]) == 5
    assert "Aspirin lowers fever" in names["hits"]._repr_html_()
    assert len(capsys.readouterr().out.splitlines()) >= 5


def test_the_paths_of_where_to_change_what_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text.split("| change | files | where |")[1].split("\n## ")[0]
    paths = re.findall(r"`([\w/]+/[\w.]*)`", table)
    assert len(paths) > 10
    assert [path for path in paths if not (ROOT / "lark_store" / path).exists()] == []


def test_the_tests_named_in_the_documents_exist():
    names = {path.name for path in (ROOT / "tests").rglob("*.py")}
    for document in DOCUMENTS:
        named = set(re.findall(r"\btest_\w+\.py", document.read_text(encoding="utf-8")))
        assert named <= names, document


def test_recipes_are_valid(tmp_path):
    (document,) = having("toml")
    for example in examples(document):
        if example.language == "toml":
            (tmp_path / "recipe.toml").write_text(example.body, encoding="utf-8")
            recipe.read(tmp_path / "recipe.toml")


def test_every_block_is_an_example_or_prose():
    for document in having("sh", "console", "python", "sql", "toml", ""):
        languages = {each.language for each in examples(document)}
        assert languages <= PROSE | {"sh", "console", "python", "sql", "toml"}, document
        assert not re.search(r"\n\n    \S", _FENCE.sub("", document.read_text(encoding="utf-8"))), document


# --- the site ------------------------------------------------------------------------------------------------------


def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path):
    """Dead links, missing anchors, pages outside the navigation and unknown names of the API fail."""
    # not `--quiet`: it hides warnings from `--strict` too
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > len(DOCUMENTS)
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href)="?(https?://[^"\s>]+)', text)
        assert loaded == [], page.name


def test_a_docstring_s_examples_become_code_blocks():
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        from site_docstrings import fenced
    finally:
        sys.path.pop(0)
    assert fenced("Add.\n\n>>> 1 + 1  # doctest: +SKIP\n2\n\nEnd.") == "Add.\n\n```pycon\n>>> 1 + 1\n2\n```\n\nEnd."


def test_fragments_of_the_changelog_have_a_known_kind():
    towncrier = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["towncrier"]
    kinds = "|".join(kind["directory"] for kind in towncrier["type"])
    for fragment in (ROOT / "changelog.d").iterdir():
        assert fragment.name == ".gitignore" or re.fullmatch(rf"[+\w.-]+\.({kinds})\.md", fragment.name), fragment.name
