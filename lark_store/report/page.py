"""The page of a report: one self-contained HTML file.

Sample texts are untrusted, so the page's Content-Security-Policy forbids all requests and foreign scripts.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import vl_convert
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from lark_store.charts.files import svg
from lark_store.charts.readable import visible_spec
from lark_store.core.atomic_files import writing
from lark_store.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lark_store.charts.style import Figure

HERE = Path(__file__).parent


def check_name(path: Path) -> None:
    """Check that a page's file is named as one.

    Raises
    ------
    InputError
        Its suffix is another.
    """
    if path.suffix.lower() not in {".html", ".htm"}:
        raise InputError(f"`{path}` is no .html file", "end its name with `.html`")


def write(page: str, path: Path) -> Path:
    """Write a page to `path`.

    Raises
    ------
    InputError
        The file can't be written.
    """
    try:
        with writing(path) as draft:
            draft.write_text(page, encoding="utf-8")
    except OSError as error:
        raise InputError(f"`{path}` can't be written: {error.strerror}", "choose another location") from error
    return path


def render(
    template: str,
    folder: Path,
    charts: Mapping[str, Figure],
    captions: Mapping[str, tuple[int | None, str]],
    queries: dict[str, Any],
    **more: Any,
) -> str:
    """Return the HTML of a template of a folder, which extends `base.html.jinja`.

    `captions` has a number, or None, and a caption for each chart. `queries` is the data of the page's
    script: see `lark_store.report.queries`. `more` are further variables of the templates.
    """
    specs = {name: chart.to_dict() for name, chart in charts.items()}
    scripts = {"vega": vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"), "page": _read_asset("page.js")}
    data = {"charts": {name: _bare(visible_spec(spec)) for name, spec in specs.items()}, "study": queries}
    environment = Environment(
        loader=FileSystemLoader([folder, HERE]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["marked"] = marked
    return environment.get_template(template).render(
        date=datetime.now(UTC).date().isoformat(),
        figures=[_figure(name, spec, *captions[name]) for name, spec in specs.items()],
        style=Markup(_read_asset("page.css")),  # noqa: S704 - our own file
        scripts={name: Markup(text) for name, text in scripts.items()},  # noqa: S704 - ours and Vega's
        policy=_policy(list(scripts.values())),
        data={name: _json(value) for name, value in data.items()},
        **more,
    )


def _figure(name: str, spec: dict[str, Any], number: int | None, caption: str) -> dict[str, Any]:
    """Return a figure: number, caption, and a static drawing for print and for browsers without JavaScript."""
    drawing = Markup(svg(_bare(spec), name))  # noqa: S704 - Vega escapes its text
    title = spec["title"]
    words = {"title": title["text"], "under": " ".join(title.get("subtitle", []))}
    return {"name": name, "number": number, "caption": caption, "svg": drawing, **words}


def _bare(spec: dict[str, Any]) -> dict[str, Any]:
    """Return a chart without background, title (the page has it) and schema address."""
    parts = {key: value for key, value in spec.items() if key not in {"$schema", "title"}}
    return parts | {"config": spec["config"] | {"background": "transparent"}}


def _read_asset(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def _json(value: Any) -> Markup:
    """Return JSON which is safe inside a script element and means the same in JavaScript."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=str)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)  # noqa: S704 - all HTML characters are escaped


def marked(text: str) -> Markup:
    """Return a text as HTML, with backticks as code."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))  # noqa: S704 - escaped before


def _policy(scripts: list[str]) -> str:
    """Return the page's policy: no requests, only these scripts."""
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    rules = ("default-src 'none'", f"script-src {allowed}", "style-src 'unsafe-inline'", "img-src data: blob:")
    return "; ".join((*rules, "base-uri 'none'", "form-action 'none'"))
