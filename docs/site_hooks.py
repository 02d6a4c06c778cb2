"""Hooks of mkdocs: documents outside docs/ and notebooks become pages, and links between documents lead to pages."""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mkdocs.structure.files import File

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
OUTSIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmark-scripts.md",
}
_DOCUMENTS = {page: document for document, page in OUTSIDE.items()}
_LINK = re.compile(r"(?<=\]\()([^)#:\s]+)")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the documents outside docs/ and the notebooks to the pages."""
    for notebook in sorted((ROOT / "docs").glob("*.ipynb")):
        files.append(File.generated(config, f"{notebook.stem}.md", content=as_markdown(notebook)))
    for document, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / document).read_text(encoding="utf-8")))
    return files


def as_markdown(notebook: Path) -> str:
    """Return a notebook's cells as a page, with a link to the file."""
    parts = [f"[Download this notebook]({notebook.name})"]
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
    return "\n\n".join([parts[1], parts[0], *parts[2:]])


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    """Turn links between documents into links between pages."""
    name = page.file.src_uri
    document = _DOCUMENTS.get(name, f"docs/{name}")

    def relink(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(document), match[1]))
        place = OUTSIDE.get(target, target.removeprefix("docs/"))
        return posixpath.relpath(place, posixpath.dirname(name) or ".")

    return _LINK.sub(relink, markdown)
