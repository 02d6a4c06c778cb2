"""`eif-report`: what measured influence in a synthetic domain shows, over its draws.

Each question is a number per draw; the figure is their mean, with a bootstrap interval over draws, and for contrasts a
permutation test of signs. Training and context are compared draw by draw, in units of the mean size of the influence
between different related statements, since the two have different scales.

Shape letters: D draws, N statements.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from lark_store.domains import DOMAINS
from lark_store.domains.templates import UNRELATED
from lark_store.errors import NothingToScoreError
from lark_store.query.sql.connection import ask
from lark_store.schema.catalog import Checkpoint, Source
from lark_store.schema.database import find
from lark_store.stats.bootstrap import Figure, evaluate
from lark_store.stats.influence_matrix import asymmetry, density, related_pairs, self_over_others, unrelated_pairs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from lark_store.domains import Domain
    from lark_store.schema.database import Database
    from lark_store.specs import EifReportSpec

    Floats = NDArray[np.float64]

_ROWS = """
    SELECT e.source, s.family, e.mode, e.optimizer, e.learning_rate, e.draw, e.eif_run, e.variant, s.role AS role,
           q.role AS query_role, e.value
    FROM eif e JOIN _role s ON s.source = e.source AND s.sample_id = e.sample_id
    JOIN _role q ON q.source = e.queries AND q.sample_id = e.query_id
    WHERE e.checkpoint = $checkpoint AND e.draw IS NOT NULL AND s.family = q.family
      AND ($sources IS NULL OR list_contains($sources::VARCHAR[], e.source))
      AND (e.mode = 'context' OR $optimizer IS NULL OR e.optimizer = $optimizer)
      AND (e.mode = 'context' OR $rate IS NULL OR e.learning_rate = $rate)
    ORDER BY ALL"""
ROLES = """
    WITH _role AS (
        SELECT source, sample_id, meta->>'role' AS role, meta->>'family' AS family FROM samples
        WHERE meta->>'role' IS NOT NULL)"""
SETTING = ["source", "family", "mode", "optimizer", "learning_rate"]
_SELF, _RELATED = "self over others", "related over unrelated, in size"
_NAMES = dict.fromkeys(("source", "family", "desideratum", "mode", "optimizer"), pl.String)
_FLOATS = ("learning_rate", "value", "low", "high", "p_value", "relative", "share")
SCHEMA = _NAMES | dict.fromkeys(_FLOATS, pl.Float64) | {"n_draws": pl.Int64}


@dataclass(frozen=True)
class _Answer:
    """A question's values over draws, (D,), and relative to the influence's size; `is_contrast`: 0 is no effect."""

    values: Floats
    relative: Floats
    is_contrast: bool


def report(db: Database, checkpoint: str, spec: EifReportSpec) -> pl.DataFrame:
    """Return a row per source, desideratum and mode; see `Store.eif_report`."""
    with db.session() as session:
        find(session, Checkpoint, checkpoint)
        for name in spec.sources:
            find(session, Source, name)
    rows = matrices(db, checkpoint, spec)
    if rows.is_empty():
        raise NothingToScoreError(
            f"no influence of a domain is measured at `{checkpoint}`",
            "add statements of `domain make` as a source, and measure them with `lark-store eif --by-draw`",
        )
    answers: dict[tuple[Any, ...], dict[str, dict[int, tuple[float, float, bool]]]] = {}
    for key, of_draw in rows.group_by(*SETTING, "draw", maintain_order=True):
        setting = answers.setdefault(key[:-1], {})
        for question, value, scale, is_contrast in _questions(of_draw, DOMAINS[str(key[1])]):
            setting.setdefault(question, {})[int(str(key[-1]))] = (value, value / scale, is_contrast)
    return _tabulated(answers)


def matrices(db: Database, checkpoint: str, spec: EifReportSpec) -> pl.DataFrame:
    """Return the stored influence between statements of known domains, a row per pair.

    Columns: source, family, mode, optimizer, learning_rate, draw, eif_run, variant, role, query_role, value. Where
    several runs have one setting and draw, such as two variants, the last one counts.
    """
    chosen = {"sources": list(spec.sources) or None, "optimizer": spec.optimizer, "rate": spec.learning_rate}
    rows = ask(db, ROLES + _ROWS, {"checkpoint": checkpoint, **chosen})
    last = pl.col("eif_run") == pl.col("eif_run").max().over([*SETTING, "draw"])
    return rows.filter(last & pl.col("family").is_in(list(DOMAINS)))


def _questions(rows: pl.DataFrame, domain: Domain) -> Iterator[tuple[str, float, float, bool]]:
    """Yield each question to the matrix of a draw: its name, value, the matrix's scale, and whether it's a contrast."""
    roles = [role for role in domain.statements if role in set(rows["role"]) & set(rows["query_role"])]
    number = {role: n for n, role in enumerate(roles)}
    matrix = np.full((len(roles), len(roles)), np.nan)
    for role, query_role, value in rows.select("role", "query_role", "value").iter_rows():
        if role in number and query_role in number:
            matrix[number[role], number[query_role]] = value
    if len(roles) < 2 or np.isnan(matrix).any():
        return
    is_unrelated = np.array([role == UNRELATED for role in roles])
    scale = float(np.abs(related_pairs(matrix, is_unrelated)).mean())
    yield _SELF, self_over_others(matrix), scale, True
    for contrast in domain.contrasts:
        if {*contrast.larger, *contrast.smaller} <= number.keys():
            larger, smaller = (matrix[number[z], number[x]] for z, x in (contrast.larger, contrast.smaller))
            yield contrast.name, float(larger - smaller), scale, True
    if is_unrelated.any() and not is_unrelated.all():
        unrelated = unrelated_pairs(matrix, is_unrelated)
        yield "an unrelated sentence, signed", float(unrelated.mean()), scale, True
        yield _RELATED, scale - float(np.abs(unrelated).mean()), scale, True
        yield "density: share above the noise of unrelated sentences", density(matrix, is_unrelated), 1.0, False
    yield "asymmetry", asymmetry(matrix), 1.0, False
    yield "asymmetry without the diagonal", asymmetry(matrix, diagonal=False), 1.0, False


def _tabulated(answers: dict[tuple[Any, ...], dict[str, dict[int, tuple[float, float, bool]]]]) -> pl.DataFrame:
    figures: list[Figure] = []
    extra: list[dict[str, Any]] = []

    def add(setting: tuple[Any, ...], question: str, answer: _Answer) -> None:
        source, family, mode, optimizer, rate = setting
        names = {"source": source, "family": family, "desideratum": question, "mode": mode, "optimizer": optimizer}
        difference = answer.values if answer.is_contrast else None
        figures.append(Figure(names | {"learning_rate": rate}, answer.values, difference=difference))
        share = float((answer.values > 0).mean()) if answer.is_contrast else np.nan
        extra.append({"relative": float(answer.relative.mean()) if answer.is_contrast else np.nan, "share": share})

    for setting, questions in answers.items():
        for question, by_draw in questions.items():
            add(setting, question, _answer(by_draw))
            other = answers.get((*setting[:2], "context", None, None), {}).get(question)
            if setting[2] != "context" and other is not None:
                both = sorted(by_draw.keys() & other.keys())
                gap = np.array([other[draw][1] - by_draw[draw][1] for draw in both])
                add((*setting[:2], "context − finetune", *setting[3:]), question, _Answer(gap, gap, is_contrast=True))
    rows = [row | more for row, more in zip(evaluate(figures), extra, strict=True)]
    frame = pl.DataFrame([row | {"n_draws": row["n_queries"]} for row in rows], SCHEMA)
    order = {name: n for n, name in enumerate(dict.fromkeys(q for each in answers.values() for q in each))}
    rank = pl.col("desideratum").replace_strict(order, return_dtype=pl.Int64)
    modes = pl.col("mode").replace_strict({"finetune": 0, "context": 1, "context − finetune": 2})
    return frame.with_columns(pl.col(pl.Float64).fill_nan(None)).sort("source", "family", rank, modes, "learning_rate")


def _answer(by_draw: dict[int, tuple[float, float, bool]]) -> _Answer:
    values, relative, is_contrast = zip(*(by_draw[draw] for draw in sorted(by_draw)), strict=True)
    return _Answer(np.array(values), np.array(relative), all(is_contrast))
