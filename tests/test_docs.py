"""The docs match the program."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from lark_store.modeling.forms.reference import renewed as renewed_forms
from lark_store.query.sql.reference import renewed
from lark_store.query.sql.views import VIEWS

ROOT = Path(__file__).parent.parent


def test_command_reference_is_up_to_date(tmp_path):
    typer = Path(sys.executable).with_name("typer")
    page = tmp_path / "cli.md"
    command = [typer, "lark_store.cli.app", "utils", "docs", "--name", "lark-store", "--output", page]
    subprocess.run(command, check=True, capture_output=True)
    golden = ROOT / "docs" / "reference" / "cli.md"
    assert page.read_text(encoding="utf-8") == golden.read_text(encoding="utf-8"), "run `make docs`"


def test_sql_reference_is_up_to_date():
    text = (ROOT / "docs" / "reference" / "sql.md").read_text(encoding="utf-8")
    assert renewed(text) == text, "run `make docs`"


def test_table_of_forms_is_up_to_date():
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    assert renewed_forms(text) == text, "run `make docs`"


def test_the_sql_reference_names_every_view_and_its_columns(scored):
    text = (ROOT / "docs" / "reference" / "sql.md").read_text(encoding="utf-8")
    sections = re.findall(r"^### `(\w+)`\n(.*?)(?=^### |^<!--)", text, re.MULTILINE | re.DOTALL)
    documented = {name: re.findall(r"^\| (\w+) \| [A-Z]", section, re.MULTILINE) for name, section in sections}
    assert documented == {name: scored.sql(f"select * from {name} limit 0").columns for name in VIEWS}


def test_links_between_documents_resolve():
    for document in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]:
        for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name}: {target}"
