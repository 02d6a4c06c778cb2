"""`metrics` as a table function: the rows of the command."""

from __future__ import annotations

import pytest

from lark_store.errors import InputError, NothingToScoreError
from lark_store.query.answers.metrics import _VIEWS
from lark_store.query.sql.columns import METRICS, frame_schema


@pytest.mark.parametrize("view", _VIEWS)
def test_the_rows_are_those_of_the_command(scored, view):
    rows = scored.sql("from metrics(view := ?, checkpoint := 'epoch-1', sketcher := 'small')", [view])
    expected = scored.metrics(view=view, checkpoint="epoch-1", sketcher="small")
    assert rows.schema == frame_schema(METRICS)
    assert rows.select(expected.columns).equals(expected.cast(dict(rows.select(expected.columns).schema)))
    assert rows.drop(expected.columns).null_count().row(0) == (len(rows),) * (len(METRICS) - len(expected.columns))


def test_it_joins_and_aggregates(scored):
    best = scored.sql(
        "select m.source, s.domain, m.value from metrics(sketcher := 'small') m join sources s on s.name = m.source "
        "where metric = 'mean_max_influence' and checkpoint = 'base' order by value desc limit 1"
    )
    frame = scored.metrics(checkpoint="base", sketcher="small").filter(metric="mean_max_influence")
    assert best["value"].item() == frame["value"].max()


def test_its_errors_are_those_of_the_command_in_sql(scored):
    with pytest.raises(InputError, match=r"^metrics have no view `most`\n\nhint: the views are `all`"):
        scored.sql("from metrics(view := 'most', sketcher := 'small')")
    with pytest.raises(InputError, match=r"^`view` is missing\n\nhint: for example `view := 'all'`"):
        scored.sql("from metrics(view := NULL)")
    with pytest.raises(NothingToScoreError, match="there are no `dot` scores of `small` sketches"):
        scored.sql("from metrics(method := 'dot', sketcher := 'small')")
