"""`doctor`: the facts for a bug report, also of a broken store, and no secrets."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version

import pytest
from helpers.program import lark

from lark_store import Store
from lark_store.errors import masked
from lark_store.schema.locks import working

SECTIONS = ["versions", "machine", "devices", "environment", "store"]


def values(report, section="store"):
    return dict(report.filter(section=section).select("name", "value").rows())


@pytest.mark.folder
def test_report_covers_versions_machine_devices_environment_and_store(scored, monkeypatch):
    monkeypatch.setenv("LARK_STORE", "somewhere")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    report = Store.doctor(scored.path)
    assert report.columns == ["section", "name", "value"]
    assert report["section"].unique(maintain_order=True).to_list() == SECTIONS
    versions = values(report, "versions")
    assert {name: versions[name] for name in ("lark-store", "torch", "lancedb", "pylance")} == {
        name: version(name) for name in ("lark-store", "torch", "lancedb", "pylance")
    }
    assert values(report, "environment")["LARK_STORE"] == "somewhere"
    assert values(report, "environment")["OMP_NUM_THREADS"] == "1"
    assert "hf_secret" not in str(report.rows())
    assert "limit of open files" in values(report, "machine")
    store = values(report)
    assert store["path"] == str(scored.path)
    assert store["schema"] == Store.db_status(scored.path).schema
    assert store["samples"].startswith("20 rows, ")
    assert store["at work"] == "nobody"
    assert "fault" not in report["name"]


def test_report_names_running_work(scored_copy):
    with working(scored_copy._db.location, "x", "ingesting base · songs · raw", {"source": ["songs"]}):
        assert values(Store.doctor(scored_copy.path))["at work"] == "ingesting base · songs · raw"


def test_works_without_a_store(tmp_path):
    report = values(Store.doctor(tmp_path / "none" / "lark.store"))
    assert "there is no lark-store at" in report["fault"]
    assert report["free disk"].endswith(" GiB")


@pytest.mark.parametrize(
    "break_it",
    [
        lambda path: (path / "catalog.sqlite").write_bytes(b"nothing"),
        lambda path: (path / "catalog.sqlite").unlink(),
        lambda path: [p.write_bytes(b"x") for p in (path / "vectors" / "samples.lance" / "_versions").iterdir()],
        lambda path: (path / "vectors").rename(path / "elsewhere"),
    ],
    ids=["a catalog that is none", "no catalog", "a table that can't be opened", "no vectors"],
)
@pytest.mark.folder
def test_works_with_a_broken_store(scored_copy, break_it):
    scored_copy.close()
    break_it(scored_copy.path)
    report = Store.doctor(scored_copy.path)
    assert report["section"].unique(maintain_order=True).to_list() == SECTIONS
    assert "fault" in values(report)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("postgresql://me:pass@host/db", "postgresql://***@host/db"),
        (
            "postgresql+psycopg://me@host:5432/db?password=x&sslmode=on",
            "postgresql+psycopg://***@host:5432/db?password=***&sslmode=on",
        ),
        ("s3://bucket/a?aws_secret_access_key=abc", "s3://bucket/a?aws_secret_access_key=***"),
        ("https://u:p%40q@h/x and https://t@h/y", "https://***@h/x and https://***@h/y"),
        ("/home/me/lark.store", "/home/me/lark.store"),
    ],
)
def test_secrets_in_urls_are_masked(text, expected):
    assert masked(text) == expected


def test_the_command_prints_text_or_rows(scored):
    text = lark("doctor", store=scored.path)
    assert (text.code, text.err) == (0, "")
    assert [line for line in text.out.splitlines() if not line.startswith(" ")] == SECTIONS
    assert f"  lark-store: {version('lark-store')}" in text.out.splitlines()
    rows = lark("doctor -f json", store=scored.path).rows
    assert {row["section"] for row in rows} == set(SECTIONS)
    assert lark("doctor -f json", store="nowhere").code == 0


def test_unimportable_package_does_not_end_it(tmp_path):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from lark_store import Store\n"
        f"print(Store.doctor({str(tmp_path / 'x')!r}).write_json())"
    )
    completed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    faults = [row for row in json.loads(completed.stdout) if row["name"] == "fault"]
    assert [row["section"] for row in faults] == ["devices", "store"]
