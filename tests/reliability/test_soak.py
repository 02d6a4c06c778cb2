"""A few rounds of the soak test `benchmarks/soak.py`; docs/reliability.md reports an hour of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SOAK = Path(__file__).parents[2] / "benchmarks" / "soak.py"


def test_short_soak_ends_with_a_clean_store_and_a_table(tmp_path):
    command = [sys.executable, SOAK, tmp_path / "out", "--minutes", "0.3"]
    completed = subprocess.run(command, capture_output=True, text=True, check=False, timeout=570)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    assert "the reader met no error\ndb check found nothing" in completed.stdout
    seen = json.loads((tmp_path / "out" / "soak.json").read_text(encoding="utf-8"))
    first, last = seen["samples"][0], seen["samples"][-1]
    assert f"{first['files']:>10.1f}" in completed.stdout
    assert seen["summary"]["rounds"] >= last["round"] > 1
    assert last["fds"] <= first["fds"] + 8  # none is left open in a round
