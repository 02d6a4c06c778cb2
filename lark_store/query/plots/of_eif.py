"""`eif` and `eif-sweep`: measured influence as matrices, and over learning rates."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from lark_store.core.text import coded, joined
from lark_store.errors import InputError, NothingToScoreError
from lark_store.query.plots.base import Asked, Plot

if TYPE_CHECKING:
    import polars as pl

    from lark_store.charts.style import Figure

_MOST = 40  # samples and queries in a matrix
_ROWS = """
    SELECT e.eif_run, e.source, e.queries, e.mode, e.optimizer, e.learning_rate, e.draw, e.sample_id, e.query_id,
           e.value, s.meta->>'role' AS role, q.meta->>'role' AS query_role, s.meta->>'family' AS family
    FROM eif e JOIN samples s ON s.source = e.source AND s.sample_id = e.sample_id
    JOIN samples q ON q.source = e.queries AND q.sample_id = e.query_id
    WHERE e.checkpoint = $checkpoint AND e.source = $source ORDER BY ALL"""
_NOISE = """
    SELECT optimizer, learning_rate, sqrt(avg((recipe->>'noise')::DOUBLE ** 2)) AS noise FROM eif_runs
    WHERE status = 'done' AND checkpoint = $checkpoint AND source = $source AND recipe->>'noise' IS NOT NULL
    GROUP BY ALL ORDER BY ALL"""


class EifMatrices(Plot):
    """Measured influence of samples on queries, training beside context."""

    name: ClassVar[str] = "eif"
    meaning: ClassVar[str] = "measured influence of one source's samples on queries, fine-tuning beside context"
    uses: ClassVar[frozenset[str]] = frozenset({"sources"})

    def draw(self, asked: Asked) -> tuple[Figure, list[str]]:
        """Return the chart, and notes for the reader."""
        import polars as pl

        from lark_store.charts.eif import matrices
        from lark_store.charts.numbers import rate_text

        rows, noise = _read(asked)
        kept, panels = [], []
        for (mode, optimizer, rate), part in _settings(rows, noise).group_by(
            "mode", "optimizer", "learning_rate", maintain_order=True
        ):
            name = "in context" if mode == "context" else f"{optimizer}, learning rate {rate_text(float(str(rate)))}"
            panels.append(name)
            kept.append(_named(part).with_columns(panel=pl.lit(name)))
        frame = pl.concat(kept)
        order = _order(rows, frame)
        if len(order) > _MOST:
            raise InputError(f"a matrix of {len(order)} samples and queries can't be read", f"measure at most {_MOST}")
        n_draws = rows["draw"].n_unique()
        of = f"mean over {n_draws} draws" if n_draws > 1 else f"of `{rows['source'][0]}` on `{rows['queries'][0]}`"
        subtitle = f"loss before less loss after, in nats per target token; {of}; above 0: the row helps the column"
        return matrices(frame, order, "Measured influence", subtitle), []


class EifSweep(Plot):
    """A sweep of learning rates."""

    name: ClassVar[str] = "eif-sweep"
    meaning: ClassVar[str] = "a sweep of learning rates: rank agreement, and signal over rounding error"
    uses: ClassVar[frozenset[str]] = frozenset({"sources"})

    def draw(self, asked: Asked) -> tuple[Figure, list[str]]:
        """Return the chart, and notes for the reader."""
        import polars as pl

        from lark_store.charts.eif import sweep

        rows, noise = _read(asked)
        if noise.is_empty():
            raise NothingToScoreError("no sweep of learning rates is stored", "run `lark-store eif --sweep 1e-6:1e-2`")
        parts = [compared.with_columns(optimizer=pl.lit(name)) for name, compared in _compared(rows, noise).items()]
        subtitle = f"influence of `{rows['source'][0]}` on `{rows['queries'][0]}`; filled: the plateau"
        return sweep(pl.concat(parts), "Learning rates of measured influence", subtitle), []


def _read(asked: Asked) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return the stored influence of one source at one checkpoint, and the noise of each learning rate of a sweep."""
    from lark_store.query.sql.connection import connect, fetch

    asked.check_checkpoint()
    sources = list(asked.options.get("sources") or ())
    connection = connect(asked.db, query=_ROWS + _NOISE)
    try:
        if not sources:
            found = fetch(connection, "SELECT DISTINCT source FROM eif ORDER BY 1")["source"].to_list()
            if len(found) != 1:
                has = joined(coded(found), "and") if found else "none"
                raise NothingToScoreError(f"influence is measured for {has}", "choose one with `--source NAME`")
            sources = found
        if len(sources) + len(asked.checkpoints) > 2:
            raise InputError("a matrix has one source and one checkpoint", "give `--source` and `--checkpoint` once")
        names = {"checkpoint": asked.checkpoints[0], "source": sources[0]}
        rows, noise = (fetch(connection, query, names) for query in (_ROWS, _NOISE))
    finally:
        connection.close()
    if rows.is_empty():
        raise NothingToScoreError(
            f"no influence of `{sources[0]}` is measured at `{asked.checkpoints[0]}`",
            "measure it with `lark-store eif`",
        )
    return rows, noise


def _compared(rows: pl.DataFrame, noise: pl.DataFrame) -> dict[str, pl.DataFrame]:
    """Return the comparison of learning rates of each optimizer with a sweep."""
    from lark_store.stats.sweep import compare_rates

    result = {}
    for (optimizer,), of_optimizer in noise.group_by("optimizer", maintain_order=True):
        noises = dict(of_optimizer.select("learning_rate", "noise").iter_rows())
        result[str(optimizer)] = compare_rates(rows.filter(optimizer=optimizer), noises)
    return result


def _settings(rows: pl.DataFrame, noise: pl.DataFrame) -> pl.DataFrame:
    """Return the rows in context, and those of one learning rate of each optimizer: a sweep's choice, or the last."""
    import polars as pl

    compared = _compared(rows, noise)
    kept: list[pl.DataFrame] = []
    for (mode, optimizer), part in rows.group_by("mode", "optimizer", maintain_order=True):
        best = compared[str(optimizer)].filter("is_chosen") if str(optimizer) in compared else pl.DataFrame()
        last = part.sort("eif_run")["learning_rate"][-1]
        rate = best["learning_rate"][0] if len(best) else last
        kept.append(part if mode == "context" else part.filter(learning_rate=rate))
    return pl.concat(sorted(kept, key=lambda part: part["mode"][0] == "context"))


def _named(rows: pl.DataFrame) -> pl.DataFrame:
    """Return sample, query and value: by role and averaged over draws in a domain, else by id."""
    import polars as pl

    is_domain = not rows["role"].null_count() and not rows["query_role"].null_count()
    names = ("role", "query_role") if is_domain else ("sample_id", "query_id")
    keys = [pl.col(names[0]).alias("sample"), pl.col(names[1]).alias("query")]
    return rows.group_by(keys, maintain_order=True).agg(pl.col("value").mean())


def _order(rows: pl.DataFrame, frame: pl.DataFrame) -> list[str]:
    """Return the samples and queries in order: statements as their domain lists them, the last one unrelated."""
    from lark_store.domains import DOMAINS

    names = sorted({*frame["sample"], *frame["query"]})
    domain = DOMAINS.get(rows["family"][0] or "")
    known = [role for role in domain.statements if role in names] if domain else []
    return [*known, *(name for name in names if name not in known)]
