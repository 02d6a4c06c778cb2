"""Damage any file or value of a store: no traceback, no wrong answer undetected by `db check --deep`.

`LARK_DAMAGES=500 LARK_SEED=3 pytest tests/reliability/test_damage.py -s` damages as often and prints the outcomes;
`LARK_KIND=catalog` damages that kind of file alone.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import polars as pl
import pytest
from damage import Damage, damages, linked, make_store, score
from questions import _answer, ask, is_clear, outcomes

from lark_store import Store

if TYPE_CHECKING:
    from pathlib import Path

DAMAGES = int(os.environ.get("LARK_DAMAGES", "5"))
SEED = int(os.environ.get("LARK_SEED", "0"))
KIND = os.environ.get("LARK_KIND")


@dataclass
class Case:
    """One damage: outcomes before and after the repair, findings, and faults.

    `faults`: `traceback`, `wrong and not found`, `error and not found`, `not whole after repair`.
    """

    damage: Damage
    before: dict[str, str] = field(default_factory=dict)
    after: dict[str, str] = field(default_factory=dict)
    found: Any = None
    left: Any = None
    is_closed: bool = False  # the store can't be opened at all
    tracebacks: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def note(self, kind: str, answer: Any) -> Any:
        """Keep the traceback of a command; returns the answer."""
        if isinstance(answer, BaseException) and not is_clear(answer):
            self.tracebacks.append(f"{kind}: {type(answer).__name__}: {str(answer).splitlines()[:1]}")
        return answer

    def take(self, answers: dict[str, Any], outcome: dict[str, str]) -> dict[str, str]:
        """Keep the tracebacks among the answers to questions; returns the outcomes."""
        for name, outcome_name in outcome.items():
            if outcome_name == "TRACEBACK":
                self.note(name, answers[name])
        return outcome


def _errors(findings: Any, *severities: str) -> bool:
    """Tell whether a check found something of a severity, or ended with an error of ours itself."""
    return isinstance(findings, BaseException) or bool(findings["severity"].is_in(severities).any())


def _on(path: Path, act: Any) -> Any:
    def opened() -> Any:
        with Store.open(path) as store:
            return act(store)

    return _answer(opened)


def run(damage: Damage, intact: Path, answers: dict[str, Any], path: Path, *, deep: bool) -> Case:
    """Damage a copy of the intact store, and ask, check, repair and ask again.

    A check that finds nothing wrong with a store that answers otherwise is followed by a deep one.
    """
    case = Case(damage)
    linked(intact, path)
    damage.act(path)
    answer = ask(path)
    case.before = case.take(answer, outcomes(answers, answer))
    case.is_closed = isinstance(_answer(partial(Store.open, path)), BaseException)
    case.found = case.note("check", _on(path, lambda s: s.db_check()))
    if deep or (set(case.before.values()) != {"equal"} and not _errors(case.found, "error", "warning")):
        case.found = case.note("check", _on(path, lambda s: s.db_check(deep=4)))
    report = case.note("repair", _on(path, lambda s: s.db_repair()))
    case.left = report if isinstance(report, BaseException) else report.left
    if set(case.before.values()) == {"equal"} and not isinstance(report, BaseException) and report.mended.is_empty():
        case.after = case.before  # nothing was changed
        case.faults = list(_faults(case, None))
        return case
    again = case.note("score", _on(path, score))
    answer = ask(path)
    case.after = case.take(answer, outcomes(answers, answer, made_again=True))
    case.faults = list(_faults(case, again))
    return case


def _faults(case: Case, again: Any) -> Any:
    if case.tracebacks:
        yield "traceback"
    if any(isinstance(answers, BaseException) for answers in (case.found, case.left)) and not case.is_closed:
        yield "check ends with an error"
    for kind, label in (("wrong", "WRONG"), ("error", "error")):
        if label in case.before.values() and not _errors(case.found, "error", "warning"):
            yield f"{kind} and not found"
    whole = set(case.after.values()) == {"equal"} and not isinstance(again, BaseException)
    if not whole and not _errors(case.left, "error", "warning"):
        yield "not whole after repair"


def table(cases: list[Case]) -> pl.DataFrame:
    """Count the outcomes of damages by kind."""
    rows = []
    for kind in sorted({case.damage.kind for case in cases}):
        subset = [case for case in cases if case.damage.kind == kind]
        row: dict[str, Any] = {"damaged": kind, "times": len(subset)}
        row["answers the same"] = sum(set(case.before.values()) == {"equal"} for case in subset)
        row["errors"] = sum("error" in case.before.values() for case in subset)
        row["wrong answers"] = sum("WRONG" in case.before.values() for case in subset)
        row["found"] = sum(_errors(case.found, "error", "warning") for case in subset)
        row["whole after repair"] = sum(set(case.after.values()) == {"equal"} for case in subset)
        for fault in ("wrong and not found", "error and not found", "not whole after repair", "traceback"):
            row[fault] = sum(fault in case.faults for case in subset)
        rows.append(row)
    return pl.DataFrame(rows)


def tell(case: Case) -> str:
    """Return a case in words."""
    lines = [f"{case.damage.kind} {case.damage.how}: {case.damage.where}: {case.faults}"]
    for when, outcome in (("before", case.before), ("after", case.after)):
        lines.append(
            f"  {when}: " + ", ".join(f"{n} {label}" for n, label in outcome.items() if label != "equal")[:300]
        )
    lines += [f"  {line}" for line in sorted(set(case.tracebacks))[:6]]
    for when, answer in (("found", case.found), ("left", case.left)):
        text = str(answer) if isinstance(answer, BaseException) else str(answer.select(pl.exclude("repair")).rows()[:4])
        lines.append(f"  {when}: {text[:500]}")
    return "\n".join(lines)


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The damaged store."""
    return make_store(tmp_path_factory.mktemp("intact"))


def test_damage_gives_no_traceback_or_undetected_wrong_answer(intact, tmp_path):
    answers: dict[str, Any] = ask(intact)
    assert not [name for name, answer in answers.items() if isinstance(answer, BaseException)]
    assert set(outcomes(answers, ask(linked(intact, tmp_path / "same"))).values()) == {"equal"}
    say, cases = partial(print, flush=True), []
    drawn = damages(intact, SEED, flips=DAMAGES if KIND else max(1, DAMAGES // 40))
    drawn = [damage for damage in drawn if KIND in {None, damage.kind}]
    for number, damage in enumerate(drawn[:DAMAGES]):
        case = run(damage, intact, answers, tmp_path / str(number), deep=number % 8 == 0)
        shutil.rmtree(tmp_path / str(number))
        cases.append(case)
        counts = {label: list(case.before.values()).count(label) for label in ("equal", "error", "WRONG")}
        say(number, tell(case) if case.faults else f"{damage.kind} {damage.how}: {damage.where}: {counts}")
    with pl.Config(tbl_rows=-1, tbl_cols=-1, tbl_width_chars=250):
        say(table(cases))
    assert [tell(case) for case in cases if case.faults] == []
