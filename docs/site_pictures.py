"""Take the pictures of docs/ui.md: screenshots of the explorer on the demo's store, by Debian's chromium.

make demo && .venv/bin/python docs/site_pictures.py
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.parse import urlencode

ROOT = Path(__file__).parent.parent
STORE = "demo/.work/lark.store"
PICTURES = ROOT / "docs" / "pictures"
_QUERY = """
SELECT query_id FROM source_influence WHERE query_checkpoint = checkpoint ORDER BY max DESC, query_id LIMIT 1"""
_SQL = (
    "SELECT checkpoint, source, variant, avg(max) AS mean_max_influence\n"
    "FROM source_influence WHERE query_checkpoint = checkpoint GROUP BY ALL ORDER BY ALL"
)


def main() -> None:
    """Serve the store, and take a picture of each page."""
    from lark_store import Store

    with Store.open(ROOT / STORE) as store:
        query = store.sql(_QUERY).item()
    pages = {
        "query": (f"/query/{query}", "1200,1250"),
        "map": ("/map", "1200,760"),
        "sql": (f"/sql?{urlencode({'query': _SQL})}", "1200,900"),
    }
    PICTURES.mkdir(exist_ok=True)
    command = [Path(sys.executable).with_name("lark-store"), "ui", "--store", STORE]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)  # noqa: S603
    assert server.stdout is not None
    address, token = server.stdout.readline().strip().split("/?")
    try:
        for name, (path, size) in pages.items():
            take(f"{address}{path}{'&' if '?' in path else '?'}{token}", PICTURES / f"{name}.png", size)
    finally:
        server.terminate()
        server.wait()


def take(address: str, picture: Path, size: str) -> None:
    """Save a page as a picture."""
    with tempfile.TemporaryDirectory() as profile:
        switches = ["--headless=new", "--no-sandbox", "--hide-scrollbars", f"--user-data-dir={profile}"]
        options = [f"--window-size={size}", f"--screenshot={picture}", "--virtual-time-budget=20000"]
        subprocess.run(["chromium", *switches, *options, address], check=True, capture_output=True)  # noqa: S603, S607


if __name__ == "__main__":
    main()
