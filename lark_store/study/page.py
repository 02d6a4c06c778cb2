"""A study's report: one self-contained HTML file, and its tables as CSV.

Sample texts are untrusted, so the page's Content-Security-Policy forbids all requests and foreign scripts.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import vl_convert
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from lark_store.charts.files import svg
from lark_store.charts.numbers import rate_text
from lark_store.core.atomic_files import writing
from lark_store.errors import InputError
from lark_store.study.charts import figures
from lark_store.study.explorer import explorer
from lark_store.study.presentation import FIGURES, sheets

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lark_store.store import Store
    from lark_store.study.conclusions import Finding
    from lark_store.study.recipe import Recipe
    from lark_store.study.results import Results

HERE = Path(__file__).parent


def write(results: Results, findings: Sequence[Finding], store: Store, path: Path) -> Path:
    """Write the report to `path`; `store` provides the texts and scores of its samples.

    Raises
    ------
    InputError
        The file can't be written.
    """
    page = render(results, findings, store)
    try:
        with writing(path) as draft:
            draft.write_text(page, encoding="utf-8")
    except OSError as error:
        raise InputError(f"`{path}` can't be written: {error.strerror}", "choose another location") from error
    return path


def save_tables(results: Results, folder: Path) -> list[Path]:
    """Write each non-empty table as NAME.csv, remove the files of empty ones, and return the paths."""
    paths = {folder / f"{name}.csv": frame for name, frame in results.tables().items()}
    for path, frame in paths.items():
        with writing(path) as draft:
            frame.write_csv(draft)
    for field in fields(results):
        if field.name not in results.tables():
            (folder / f"{field.name}.csv").unlink(missing_ok=True)
    return list(paths)


def render(results: Results, findings: Sequence[Finding], store: Store) -> str:
    """Return the report's HTML."""
    specs = {name: chart.to_dict() for name, chart in figures(results).items()}
    scripts = {"vega": vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"), "page": _read_asset("page.js")}
    data = {"charts": {name: _bare(spec) for name, spec in specs.items()}, "study": explorer(results, store)}
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["marked"] = _marked
    return environment.get_template("page.html.jinja").render(
        recipe=results.recipe,
        results=results,
        date=datetime.now(UTC).date().isoformat(),
        facts=_facts(results),
        findings=findings,
        sheets=sheets(results),
        figures=[_figure(name, spec) for name, spec in specs.items()],
        recipe_text=recipe_toml(results.recipe),
        environment={name: _as_text(value) for name, value in results.environment.items()},
        style=Markup(_read_asset("page.css")),  # noqa: S704 - our own file
        scripts={name: Markup(text) for name, text in scripts.items()},  # noqa: S704 - ours and Vega's
        policy=_policy(list(scripts.values())),
        data={name: _json(value) for name, value in data.items()},
    )


def recipe_toml(recipe: Recipe) -> str:
    """Return a recipe as TOML, with every non-null key."""
    values = recipe.model_dump(mode="json", exclude_none=True)
    many = [(f"[[{name}]]", part) for name in ("variant", "source") for part in values.pop(name)]
    parts = {k: values.pop(k) for k in list(values) if isinstance(values[k], dict)}
    blocks = [("", values), *((f"[{name}]", part) for name, part in parts.items()), *many]
    lines = [[head, *(f"{k} = {_toml(v)}" for k, v in part.items() if v != {})] for head, part in blocks]
    return "\n\n".join("\n".join(block).lstrip() for block in lines)


def _toml(value: Any) -> str:
    """Return a value as TOML; strings, numbers and lists are written as in JSON."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(k)} = {_toml(v)}" for k, v in value.items()) + " }" if value else "{}"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _facts(results: Results) -> dict[str, str]:
    """Return the facts at the top of the page."""
    recipe = results.recipe
    rates = list(dict.fromkeys(rate_text(rate) for rate in recipe.finetune.learning_rates))
    return {
        "Model": recipe.model_name,
        "Fine-tuned on": f"{recipe.tuning.name}, {recipe.epochs} epochs at {', then '.join(rates)}",
        "Pretraining sources": ", ".join(source.name for source in recipe.pretraining),
        "Queries": f"{results.queries['query_id'].n_unique():,} ({recipe.queries.name})",
        "Sketch": f"{recipe.sketch.k:,} bins, seed {recipe.sketch.seed}, correction `{recipe.sketch.correction}`",
    }


def _figure(name: str, spec: dict[str, Any]) -> dict[str, Any]:
    """Return a figure: number, caption, and a static drawing for print and for browsers without JavaScript."""
    number, caption = FIGURES[name]
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


def _marked(text: str) -> Markup:
    """Return a text as HTML, with backticks as code."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))  # noqa: S704 - escaped before


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _policy(scripts: list[str]) -> str:
    """Return the page's policy: no requests, only these scripts."""
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    rules = ("default-src 'none'", f"script-src {allowed}", "style-src 'unsafe-inline'", "img-src data: blob:")
    return "; ".join((*rules, "base-uri 'none'", "form-action 'none'"))
