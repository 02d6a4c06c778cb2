"""Interactive commands import no heavy library: neither those for gradients nor those for writing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version

import pytest
from helpers.stores import store_label

HEAVY = {
    "torch",
    "transformers",
    "lancedb",
    "lance_namespace",
    "datasets",
    "numba",
    "alembic",
    "scipy",
    "pandas",
    "statsmodels",
}
RUN = """
import json, sys
from lark_store.cli.app import app
from lark_store.core.arrow import set_command_line
set_command_line()
loaded = {}
for line in json.loads(sys.argv[1]):
    app(line.split(), standalone_mode=False)
    loaded[line] = sorted(set(json.loads(sys.argv[2])) & sys.modules.keys())
print(json.dumps(loaded), file=sys.stderr)
"""
ANSWERS = [
    "sql FROM/**/samples",
    "show",
    "db status",
    "top q100 -c base --sketcher small",
    "top finetune/q0 -c base -c epoch-1",
    "sample show finetune/q0",
    "sample list finetune",
    "source list",
    "ft-pt -c base --sketcher small",
    "groups -c base --sketcher small",
    "trajectory q100 q0 --sketcher small",
    "trajectory q100 q0 --query-checkpoint epoch-1 --sketcher small",
    "ft-pt -c base --query-checkpoint epoch-1 --sketcher small",
    "db check",
    *(["doctor"] if version("torch").endswith("+cpu") else []),
    "metrics --sketcher small",
]


def loaded_by(lines, path, heavy):
    """Run commands in one process; return the heavy modules loaded after each."""
    environment = os.environ | {"LARK_STORE": store_label(path)}
    command = [sys.executable, "-c", RUN, json.dumps(lines), json.dumps(sorted(heavy))]
    completed = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert completed.returncode == 0, completed.stderr
    return json.loads(completed.stderr.splitlines()[-1])


@pytest.mark.folder
def test_read_commands_import_no_heavy_library(scored_path):
    loaded = loaded_by(ANSWERS, scored_path, HEAVY)
    assert [line for line, names in loaded.items() if names] == []


@pytest.mark.folder
def test_init_imports_no_heavy_library_except_alembic(tmp_path):
    loaded = loaded_by(["init"], tmp_path / "lark.store", HEAVY | {"polars", "duckdb"})
    assert loaded == {"init": ["alembic"]}


PANDAS = """
from lark_store.core.arrow import set_command_line, skip_pandas, use_pandas
set_command_line()
skip_pandas()
import pandas, pyarrow
values = pandas.Series([1.0, float("nan")])
before = pyarrow.array(values).null_count
use_pandas()
print(before, pyarrow.array(values).null_count)
"""


def test_pyarrow_recognises_pandas_again_for_libraries_that_need_it():
    completed = subprocess.run([sys.executable, "-c", PANDAS], capture_output=True, text=True, check=False)
    assert (completed.stdout, completed.stderr) == ("0 1\n", "")
