"""Plots of any store: the kinds, each a subclass of `Plot`, and their registry.

To add one, write a subclass in a module here, draw in a module of `lark_store.charts`, and list it in `PLOTS`. The help
of the command is generated from the registry. Nothing here imports altair before it draws.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from lark_store.core.text import coded, joined
from lark_store.errors import InputError
from lark_store.query.plots.base import Asked, Plot
from lark_store.query.plots.of_eif import EifMatrices, EifSweep
from lark_store.query.plots.of_groups import Heatmap, Trajectory
from lark_store.query.plots.of_queries import Dominance, Histogram, HitsPlot, Influence
from lark_store.specs import GroupsSpec, PlotSpec, RankSpec, build, fields_named

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from lark_store.charts.style import Figure
    from lark_store.schema.database import Database

PLOTS: dict[str, Plot] = {
    plot.name: plot
    for plot in (
        Trajectory(),
        Dominance(),
        Influence(),
        HitsPlot(),
        Heatmap(),
        Histogram(),
        EifMatrices(),
        EifSweep(),
    )
}
_LOG = logging.getLogger(__name__)


def plot(
    db: Database, kind: str, queries: list[str], checkpoints: list[str], options: Mapping[str, Any], output: Path | None
) -> Figure | Path:
    """Draw a plot, and write it if there is an output; see `Store.plot`."""
    if kind not in PLOTS:
        raise InputError(f"there is no plot `{kind}`", f"the plots are {', '.join(coded(PLOTS))}")
    drawn = PLOTS[kind]
    _check_options(drawn, options)
    if output is not None:
        from lark_store.charts.files import check_format

        check_format(output)
    figure, notes = drawn.draw(Asked(db, queries, checkpoints, build(PlotSpec, options), options))
    for note in notes:
        _LOG.warning(note)
    if output is None:
        return figure
    from lark_store.charts.files import write

    return write(figure, output)


def _check_options(drawn: Plot, options: Mapping[str, Any]) -> None:
    """Refuse the options that a plot does not use; a default may be given."""
    from lark_store.specs import Compute, SearchSpec

    specs = (PlotSpec, SearchSpec, RankSpec, GroupsSpec, Compute)
    for field in fields_named(options, specs):
        value = options[field.name]
        is_default = value in (field.default, None) or (isinstance(value, list) and tuple(value) == field.default)
        if field.name not in drawn.uses and not is_default:
            flag = field.metadata["option"].flags or (f"--{field.name.replace('_', '-')}",)
            raise InputError(f"`{drawn.name}` does not use `{flag[0]}`", "leave it out")


def plots_help() -> str:
    """Return the help of the kind: all names with their meanings."""
    return f"{joined((f'`{plot.name}` ({plot.meaning})' for plot in PLOTS.values()), 'or')}."
