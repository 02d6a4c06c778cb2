"""Survival analysis of the events of facts: curves by group, and hazard ratios of covariates."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from lark_store.core.text import coded, joined
from lark_store.errors import InputError, NothingToScoreError
from lark_store.query.answers.fact_events import EVENTS, followed
from lark_store.query.sql.columns import SURVIVAL, frame_schema
from lark_store.query.sql.connection import ask
from lark_store.results import SurvivalReport
from lark_store.stats.survival import check_installed, cox, discrete_hazard, kaplan_meier, log_rank

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lark_store.schema.database import Database
    from lark_store.specs import SurvivalSpec

LEARNING = "learning"
_TIMES = 8  # of numbers at risk
_OF_SCORES = ("phi_pt", "best_driver", "self_influence")
_OF_PROBES = {"latent": "is_latent", "p": "p", "logprob": "answer_logprob", "n_tokens": "n_tokens", "seen": "seen"}
_SCORES = """
SELECT i.query_id AS sample_id, max(i.max) FILTER (s.stage = 'pretrain') AS phi_pt,
       max(i.max) FILTER (s.stage = 'finetune') AS best_driver,
       string_agg(DISTINCT i.method || ' by ' || i.sketcher || ' as ' || i.query_variant, '; ') AS how
FROM source_influence i JOIN sources s ON s.name = i.source
WHERE i.checkpoint = $checkpoint AND i.query_checkpoint = $checkpoint AND i.queries = $source
  AND i.over_checkpoints IS NULL
  AND ($method IS NULL OR i.method = $method) AND ($sketcher IS NULL OR i.sketcher = $sketcher)
GROUP BY 1"""
_SELF = """
SELECT sample_id, max(self_influence) AS self_influence, string_agg(DISTINCT sketcher, '; ') AS how
FROM self_influence
WHERE checkpoint = $checkpoint AND source = $source AND variant = $variant
  AND ($sketcher IS NULL OR sketcher = $sketcher)
GROUP BY 1"""
_CURVES = {
    "group": pl.String,
    "time": pl.Float64,
    "n_risk": pl.Int64,
    "n_events": pl.Int64,
    "survival": pl.Float64,
    "low": pl.Float64,
    "high": pl.Float64,
}


def survival(db: Database, spec: SurvivalSpec) -> SurvivalReport:
    """Analyse the times to an event; see `Store.survival`."""
    check_installed()
    events, recall = followed(db, spec)
    events = chosen_events(events, spec.event)
    names = list(dict.fromkeys(spec.covariates)) or (["latent"] if events["is_latent"].null_count() == 0 else [])
    values = {name: covariate(db, events, name, spec) for name in names}
    by = spec.by or ("latent" if events["is_latent"].null_count() == 0 else None)
    groups = _groups(db, events, by, spec)
    curves, tests = _curves(events, groups, by)
    return SurvivalReport(
        _effects(events, values, spec.event), curves, tests, recall, events.with_columns(group=pl.Series(groups)), by
    )


def draw(report: SurvivalReport, event: str, folder: Path) -> list[Path]:
    """Write the figures of a report as SVG files; see `Store.survival`."""
    from lark_store.charts.files import save
    from lark_store.charts.survival import hazard_ratios, recall, survival_curves

    start, n = report.events["baseline"][0], len(report.events)
    about = f"{n} facts at risk from {start} on"
    p = report.tests["p_value"].item()
    test = [] if p is None else [f"log-rank test by {report.by}: p = {p:.3g}"]
    figures = {
        "curves": survival_curves(report.curves, _at_risk(report), event, about, *test),
        "recall": recall(report.recall, "correct greedy answers; bands are 95% intervals"),
    }
    if report.effects["hazard_ratio"].drop_nulls().len():
        scale = "per unit of 0 or 1, or per standard deviation; whiskers are 95% intervals"
        figures["hazards"] = hazard_ratios(report.effects, event, about, scale)
    folder.mkdir(parents=True, exist_ok=True)
    return [path for name, figure in figures.items() for path in save(figure, folder, name, ["svg"])]


def _at_risk(report: SurvivalReport) -> pl.DataFrame:
    """Return the number of facts at risk in each group, at a few times."""
    times = report.curves["time"].unique().sort()
    times = times.gather_every(max(1, -(-len(times) // _TIMES)))
    rows = [
        (group, time, report.events.filter(pl.col("group") == group, pl.col("time") >= time).height)
        for group in report.curves["group"].unique(maintain_order=True)
        for time in times
    ]
    return pl.DataFrame(rows, schema={"group": pl.String, "time": pl.Float64, "n": pl.Int64}, orient="row")


def chosen_events(events: pl.DataFrame, event: str) -> pl.DataFrame:
    """Return the rows of an event.

    Raises
    ------
    InputError, NothingToScoreError
    """
    if event not in (*EVENTS, LEARNING):
        raise InputError(f"there is no event `{event}`", f"the events are {joined(coded([*EVENTS, LEARNING]), 'and')}")
    kinds = EVENTS[:2] if event == LEARNING else (event,)
    rows = events.filter(pl.col("event").is_in(kinds))
    if rows.is_empty():
        counts = ", ".join(f"{n} of {kind}" for kind, n in events["event"].value_counts(sort=True).iter_rows())
        raise NothingToScoreError(f"no fact is at risk of {event}", f"the facts are at risk: {counts}")
    return rows


def covariate(db: Database, events: pl.DataFrame, name: str, spec: SurvivalSpec) -> pl.Series:
    """Return a covariate of each fact at the baseline, as numbers; null where it is unknown.

    Raises
    ------
    InputError
        No fact has it.
    """
    if name in _OF_PROBES:
        column = events[_OF_PROBES[name]]
        hint = "sample answers at the baseline with `lark-store probe --samples 20`"
    elif name in _OF_SCORES:
        column = _influence(db, events, name, spec)
        hint = "run `lark-store ingest` and `lark-store attribute` with these facts as queries at the baseline"
    else:
        column = pl.Series([_number(json.loads(meta).get(name)) for meta in events["meta"]], dtype=pl.Float64)
        hint = f"covariates are {joined(coded([*_OF_PROBES, *_OF_SCORES]), 'or')}, or a key of the metadata"
    if column.null_count() == len(column):
        raise InputError(f"no fact has the covariate `{name}`", hint)
    return column.cast(pl.Float64)


def _number(value: Any) -> float | None:
    try:
        return None if value is None or isinstance(value, list | dict) else float(value)
    except ValueError:
        return None


def _influence(db: Database, events: pl.DataFrame, name: str, spec: SurvivalSpec) -> pl.Series:
    """Return the store's own influence on each fact at the baseline."""
    asked = {"checkpoint": events["baseline"][0], "source": events["source"][0], "sketcher": spec.sketcher}
    query = _SELF if name == "self_influence" else _SCORES
    asked |= {"variant": events["variant"][0]} if name == "self_influence" else {"method": spec.method}
    rows = ask(db, query, asked)
    ways = sorted({way for text in rows["how"].drop_nulls() for way in text.split("; ")})
    if len(ways) > 1:
        raise InputError(
            f"facts have scores of several kinds: {', '.join(ways)}", "choose with `--method` or `--sketcher`"
        )
    return events.select("sample_id").join(rows, on="sample_id", how="left", maintain_order="left")[name]


def _groups(db: Database, events: pl.DataFrame, by: str | None, spec: SurvivalSpec) -> list[str]:
    """Return each fact's group."""
    if by is None:
        return ["all"] * len(events)
    if by in {"latent", "seen"}:
        words = {"latent": ("latent", "not latent"), "seen": ("seen", "withheld")}[by]
        values = covariate(db, events, by, spec)
        return ["unknown" if v is None else words[0] if v else words[1] for v in values]
    found = [json.loads(meta).get(by) for meta in events["meta"]]
    if all(value is None for value in found):
        raise InputError(f"no fact has `{by}` in its metadata", "curves are by `latent`, `seen` or a metadata key")
    return [f"(no {by})" if value is None else str(value) for value in found]


def _curves(events: pl.DataFrame, groups: Sequence[str], by: str | None) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return the curve of each group, and the log-rank test of all."""
    time_N, event_N, group_N = events["time"].to_numpy(), events["observed"].to_numpy(), np.array(groups)
    frames = []
    for group in sorted(set(groups)):
        of = group_N == group
        curve = kaplan_meier(time_N[of], event_N[of])
        columns = {name: getattr(curve, name) for name in _CURVES if name != "group"}
        frames.append(pl.DataFrame({"group": [group] * len(curve.time), **columns}, schema=_CURVES).fill_nan(None))
    chi2, p = log_rank(time_N, event_N, groups)
    test = {"by": [by], "n_groups": [len(frames)], "chi2": [chi2], "p_value": [p]}
    schema = {"by": pl.String, "n_groups": pl.Int64, "chi2": pl.Float64, "p_value": pl.Float64}
    return pl.concat(frames), pl.DataFrame(test, schema=schema).fill_nan(None)


def _effects(events: pl.DataFrame, values: dict[str, pl.Series], event: str) -> pl.DataFrame:
    """Return the hazard ratio of each covariate, given the others; numbers are in standard deviations."""
    schema = frame_schema(SURVIVAL)
    if not values:
        return pl.DataFrame(schema=schema)
    x = pl.DataFrame(values)
    is_known = x.select(pl.all_horizontal(pl.all().is_not_null() & pl.all().is_not_nan())).to_series()
    x, rows = x.filter(is_known), events.filter(is_known)
    scales = [1.0 if set(column) <= {0.0, 1.0} else float(column.std() or 0.0) or 1.0 for column in x]  # type: ignore[arg-type]
    x_NC = x.to_numpy() / np.array(scales) if len(x) else np.empty((0, len(values)))
    time_N, event_N = rows["time"].to_numpy(), rows["observed"].to_numpy()
    fits = [fit(time_N, event_N, x_NC - x_NC.mean(axis=0)) if len(rows) else None for fit in (cox, discrete_hazard)]
    table = []
    for c, (name, scale) in enumerate(zip(values, scales, strict=True)):
        row: dict[str, Any] = {"event": event, "covariate": name, "scale": scale}
        row |= {"n": len(rows), "n_events": int(event_N.sum())}
        for prefix, fit in zip(("", "discrete_"), fits, strict=True):
            if fit is not None:
                low, high = fit.interval()
                found = {
                    "hazard_ratio": np.exp(fit.log_hr[c]),
                    "low": low[c],
                    "high": high[c],
                    "p_value": fit.p_value[c],
                }
                row |= {f"{prefix}{key}": float(value) for key, value in found.items()}
        if fits[0] is not None:
            row["zph_p_value"] = float(fits[0].zph_p_value[c])
        table.append(row)
    return pl.DataFrame(table, schema=schema).fill_nan(None)
