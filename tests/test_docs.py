"""What the docs say is what the program does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from lark_store.query.sql.reference import renewed
from lark_store.query.sql.views import VIEWS

ROOT = Path(__file__).parent.parent


def test_the_command_reference_is_fresh(tmp_path):
    typer = Path(sys.executable).with_name("typer")
    made = tmp_path / "cli.md"
    command = [typer, "lark_store.cli.app", "utils", "docs", "--name", "lark-store", "--output", made]
    subprocess.run(command, check=True, capture_output=True)
    golden = ROOT / "docs" / "reference" / "cli.md"
    assert made.read_text(encoding="utf-8") == golden.read_text(encoding="utf-8"), "run `make docs`"


def test_the_sql_reference_is_fresh():
    text = (ROOT / "docs" / "reference" / "sql.md").read_text(encoding="utf-8")
    assert renewed(text) == text, "run `make docs`"


def test_the_sql_reference_names_every_view_and_its_columns(scored):
    text = (ROOT / "docs" / "reference" / "sql.md").read_text(encoding="utf-8")
    sections = re.findall(r"^### `(\w+)`\n(.*?)(?=^### |^<!--)", text, re.MULTILINE | re.DOTALL)
    documented = {name: re.findall(r"^\| (\w+) \| [A-Z]", section, re.MULTILINE) for name, section in sections}
    assert documented == {name: scored.sql(f"select * from {name} limit 0").columns for name in VIEWS}


def test_the_examples_of_the_sql_reference_run(scored):
    text = (ROOT / "docs" / "reference" / "sql.md").read_text(encoding="utf-8")
    examples = re.findall(r"(?:^    .*\n)+", text.split("## Examples")[1], re.MULTILINE)
    assert len(examples) == 3
    for example in examples:
        scored.sql(example)


def test_the_links_between_the_documents_lead_somewhere():
    for document in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]:
        for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name}: {target}"
