"""Queries of a damaged store and their outcomes: the same answer, an error of ours, or worse."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import polars as pl
import polars.selectors as cs
import polars.testing

from lark_store import Store
from lark_store.errors import LarkStoreError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Answer = pl.DataFrame | str
_OF_RUNS = {"sql ingest_runs", "sql score_runs"}
_AT = {"sketcher": "small", "queries": "test"}
# Times and run numbers change when something is rebuilt.
_CHANGING = ("ingest_run", "score_run", "run", "id", "started_at", "finished_at", "created_at", "seconds", "versions",
             "lance_version", "recipe", "n_existing", "error", "status")  # fmt: skip


# The views of the catalog alone are asked as one; coverage and self_influence have methods.
_CATALOG = ("checkpoints", "checkpoint_metrics", "sources", "variants", "sketchers", "corrections", "studies")
_VIEWS = ("samples", "ingest_runs", "score_runs", "sketches", "failures", "influence", "source_influence")


def _catalog(store: Store) -> pl.DataFrame:
    rows = (f"SELECT '{name}' AS view, CAST(to_json(t) AS VARCHAR) AS row FROM {name} t" for name in _CATALOG)
    return store.sql(f"{' UNION ALL '.join(rows)} ORDER BY ALL")


def _view(store: Store, name: str) -> pl.DataFrame:
    return store.sql(f"SELECT * FROM {name} ORDER BY ALL")


def _metrics(store: Store, view: str) -> pl.DataFrame:
    return store.metrics(view=view, sketcher="small").sort(cs.string())


def _snapshot(path: Path) -> pl.DataFrame:
    with Store.open(path, snapshot="then") as store:
        return _view(store, "source_influence")


def _status(path: Path) -> pl.DataFrame:
    return Store.db_status(path).tables.select("table", "rows")


# Queries of an open store, and of a store by its path.
QUESTIONS: dict[str, Callable[[Store], pl.DataFrame]] = {
    "top": lambda s: s.top("q100", checkpoint="tuned", k=50, **_AT).frame,
    "top one source": lambda s: s.top("q101", checkpoint="base", sources=["songs"], variants=["raw"], k=3, **_AT).frame,
    "top where": lambda s: s.top("q100", checkpoint="tuned", where="label = 'yes' OR topic = 'q1'", **_AT).frame,
    "top approximate": lambda s: s.top("q102", checkpoint="base", approximate=True, k=4, **_AT).frame,
    "top bm25": lambda s: s.top("q100", checkpoint="tuned", method="bm25", k=5, **_AT).frame,
    "top summed": lambda s: s.top("q100", checkpoint=["base", "tuned"], method="dot", over_checkpoints="lr-weighted",
                                  **_AT).frame,
    "ft-pt": lambda s: s.ft_pt("base", **_AT),
    "trajectory": lambda s: s.trajectory("q100", "q2", source="finetune", **_AT),
    "self-influence": lambda s: s.self_influence(checkpoints=["base", "tuned"], k=5, sketcher="small"),
    "coverage": lambda s: s.coverage(),
    "similar text": lambda s: s.similar_text(text="the night train", k=3),
    "metrics": lambda s: _metrics(s, "all"),
    "metrics influence": lambda s: _metrics(s, "influence"),
    "show": lambda s: pl.concat([pl.DataFrame({"name": f["name"].cast(str)}) for f in vars(s.show()).values()
                                 if isinstance(f, pl.DataFrame) and "name" in f.columns]),
    "count one source": lambda s: s.sql("SELECT count(*) AS n FROM sketches WHERE source = 'finetune'"),
    "sql catalog": _catalog,
    **{f"sql {name}": partial(_view, name=name) for name in _VIEWS},
}  # fmt: skip
OF_PATH: dict[str, Callable[[Path], pl.DataFrame]] = {"snapshot": _snapshot, "status": _status}


def ask(path: Path) -> dict[str, Answer | BaseException]:
    """Ask a store everything; an error is its answer. The store is opened anew, so nothing is remembered."""
    results: dict[str, Answer | BaseException] = {name: _answer(partial(one, path)) for name, one in OF_PATH.items()}
    opened = _answer(partial(Store.open, path))
    if isinstance(opened, BaseException):
        return results | dict.fromkeys(QUESTIONS, opened)
    with opened as store:
        return results | {name: _answer(partial(one, store)) for name, one in QUESTIONS.items()}


def _answer(one: Callable[[], Any]) -> Any:
    try:
        return one()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001  a panic of Rust is no Exception
        return error


def is_clear(error: BaseException) -> bool:
    """Tell whether an error is one of ours, and not a traceback."""
    return isinstance(error, LarkStoreError) and error.hint is not None


def same(left: pl.DataFrame, right: pl.DataFrame, *, made_again: bool) -> bool:
    """Compare answers; after a repair, without values which rebuilding changes."""
    if made_again:
        left, right = (frame.drop([c for c in _CHANGING if c in frame.columns]) for frame in (left, right))
        left, right = (frame.sort(cs.string() | cs.integer()) for frame in (left, right))
    try:
        polars.testing.assert_frame_equal(
            left, right, check_exact=not made_again, rel_tol=1e-2, abs_tol=1e-3, check_row_order=True
        )
    except AssertionError:
        return False
    return True


def outcomes(
    intact: dict[str, Any], result: dict[str, Answer | BaseException], *, made_again: bool = False
) -> dict[str, str]:
    """Return for each question `equal`, `error`, `WRONG` or `TRACEBACK`."""
    answers = {}
    for name, answer in result.items():
        if isinstance(answer, BaseException):
            answers[name] = "error" if is_clear(answer) else "TRACEBACK"
        elif made_again and name in _OF_RUNS:  # other runs rebuilt the missing rows
            answers[name] = "equal"
        else:
            answers[name] = "equal" if same(intact[name], answer, made_again=made_again) else "WRONG"
    return answers
