"""What all pages share: the open store, the templates, and the one background job."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.responses import HTMLResponse

from lark_store.ui.tables import visible

if TYPE_CHECKING:
    from starlette.requests import Request

    from lark_store.store import Store
    from lark_store.ui.equivalent import Lines
    from lark_store.ui.jobs import Jobs

_TEMPLATES = Path(__file__).parent / "templates"
PAGES = {
    "/": "Store",
    "/queries": "Queries",
    "/map": "Map",
    "/dominance": "Dominance",
    "/ask": "Ask",
    "/compare": "Compare",
    "/sql": "SQL",
}


@dataclass(frozen=True)
class Explorer:
    """The store behind the pages, the snapshot of it that is shown, and its jobs."""

    store: Store
    jobs: Jobs
    snapshot: str | None = None

    @cached_property
    def templates(self) -> Environment:
        """The pages' templates. All values are escaped, and without control characters but after the filter `e`."""
        return Environment(
            loader=FileSystemLoader(_TEMPLATES),
            autoescape=True,
            finalize=lambda value: visible(value) if type(value) is str else value,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )

    @property
    def title(self) -> str:
        """The store's location, and the snapshot that is shown."""
        return self.store.place if self.snapshot is None else f"{self.store.place}, snapshot {self.snapshot}"


def explorer_of(request: Request) -> Explorer:
    """Return the explorer that serves a request."""
    found: Explorer = request.app.state.explorer
    return found


def page(
    request: Request, template_name: str, title: str, /, *, lines: Lines | None = None, status: int = 200, **values: Any
) -> HTMLResponse:
    """Return a page made by a template; `lines` are the command and the Python line with the same answer."""
    explorer = explorer_of(request)
    template = explorer.templates.get_template(f"{template_name}.html")
    shared = {"title": title, "place": explorer.title, "pages": PAGES, "path": request.url.path, "lines": lines}
    return HTMLResponse(template.render(**shared, **values), status)
