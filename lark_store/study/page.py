"""A study's report: one self-contained HTML file, and its tables as CSV."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lark_store.charts.numbers import rate_text
from lark_store.core.atomic_files import writing
from lark_store.report import page
from lark_store.study.charts import figures
from lark_store.study.explorer import explorer
from lark_store.study.presentation import FIGURES, sheets

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lark_store.store import Store
    from lark_store.study.conclusions import Finding
    from lark_store.study.recipe import Recipe
    from lark_store.study.results import Results

_KICKER = "Training-data attribution study"
_LEDE = (
    "Which training samples drive this model’s answers, epoch by epoch, "
    "and did they come from fine-tuning or from pretraining?"
)
_HINTS = {
    "figures": "Numbered as in the reference experiment; hover over a mark to read its values.",
    "queries": "Every query, its course over the epochs, and its top samples.",
    "top": "The number is the cosine at the checkpoint; the line shows it over all checkpoints.",
}
_SECTIONS = ("findings", "tables", "figures", "queries", "recipe")


def write(results: Results, findings: Sequence[Finding], store: Store, path: Path) -> Path:
    """Write the report to `path`; `store` provides the texts and scores of its samples.

    Raises
    ------
    InputError
        The file can't be written.
    """
    return page.write(render(results, findings, store), path)


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
    sections = [*_SECTIONS, *(["notes"] if results.notes else [])]
    return page.render(
        "page.html.jinja",
        Path(__file__).parent,
        figures(results),
        FIGURES,
        explorer(results, store),
        title=results.recipe.title,
        kicker=_KICKER,
        lede=_LEDE,
        nav=[(name, name.capitalize()) for name in sections],
        hints=_HINTS,
        notes=results.notes,
        results=results,
        facts=_facts(results),
        findings=findings,
        sheets=sheets(results),
        recipe_text=recipe_toml(results.recipe),
        environment={name: _as_text(value) for name, value in results.environment.items()},
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


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
