"""The soak of `benchmarks/soak.py`, a few rounds of it: what an hour shows is in docs/reliability.md."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SOAK = Path(__file__).parent.parent / "benchmarks" / "soak.py"


def test_a_short_soak_ends_with_a_clean_store_and_its_table(tmp_path):
    command = [sys.executable, SOAK, tmp_path / "out", "--minutes", "0.3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=570)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the reader met no error\ndb check found nothing" in done.stdout
    seen = json.loads((tmp_path / "out" / "soak.json").read_text(encoding="utf-8"))
    first, last = seen["samples"][0], seen["samples"][-1]
    assert f"{first['files']:>10.1f}" in done.stdout
    assert seen["summary"]["rounds"] >= last["round"] > 1
    assert last["fds"] <= first["fds"] + 8  # none is left open in a round
