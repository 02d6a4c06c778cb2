"""The parts of a study's charts that know its recipe: colours of its sources, the axis of its epochs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import altair as alt

from lark_store.charts.style import OTHERS, TUNING

if TYPE_CHECKING:
    from lark_store.study.results import Results

EPOCHS = "epoch of fine-tuning"
EPOCH = "isValid(datum.value) && datum.value === 0 ? 'base' : format(datum.value, '~g')"


def source_colours(results: Results) -> dict[str, str]:
    """Return each source's colour, the same in all charts."""
    names = [source.name for source in results.recipe.pretraining]
    colours = {name: OTHERS[i % len(OTHERS)] for i, name in enumerate(names)}
    return {results.recipe.tuning.name: TUNING} | colours


def epoch_axis(results: Results) -> alt.X:
    """Return the axis of epochs: one tick per checkpoint, 0 for the base."""
    epochs = [float(e) for e in results.checkpoints["epoch"].unique().sort().drop_nulls()]
    domain = [min(epochs, default=0) - 0.4, max(epochs, default=0) + 0.4]
    scale = alt.Scale(domain=domain, nice=False, zero=False)
    axis = alt.Axis(values=epochs, labelExpr=EPOCH, grid=False)
    return alt.X("epoch:Q", title=EPOCHS, scale=scale, axis=axis)
