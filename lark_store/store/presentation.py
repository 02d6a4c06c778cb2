"""`Store`, plots and reports."""

from __future__ import annotations

from typing import TYPE_CHECKING, overload

from lark_store.specs import Compute, GroupsSpec, PlotSpec, RankSpec, ReportSpec, SearchSpec
from lark_store.store.base import Part, keywords

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from typing import Unpack

    from lark_store.charts.style import Figure
    from lark_store.results import OnProgress
    from lark_store.specs import PlotOptions, ReportOptions


class PresentationMethods(Part):
    """The methods that draw."""

    @overload
    def plot(
        self,
        kind: str,
        query: str | Sequence[str] | None = None,
        *,
        checkpoint: str | Sequence[str] | None = None,
        output: None = None,
        **options: Unpack[PlotOptions],
    ) -> Figure: ...
    @overload
    def plot(
        self,
        kind: str,
        query: str | Sequence[str] | None = None,
        *,
        checkpoint: str | Sequence[str] | None = None,
        output: str | Path,
        **options: Unpack[PlotOptions],
    ) -> Path: ...
    @keywords(PlotSpec, SearchSpec, RankSpec, GroupsSpec, Compute)
    def plot(
        self,
        kind: str,
        query: str | Sequence[str] | None = None,
        *,
        checkpoint: str | Sequence[str] | None = None,
        output: str | Path | None = None,
        **options: Unpack[PlotOptions],
    ) -> Figure | Path:
        """Draw a plot: an altair chart, which a notebook shows, or with `output` an .svg, .png or .html file.

        `kind` is one of

        - `trajectory`: the influence of groups of samples (`by`, `how`) on 1 to 12 queries over checkpoints, or with
          `measure="loss"` the queries' losses;
        - `dominance`: fine-tuning against pretraining at a checkpoint, a point per query, with FT wins;
        - `influence`: mean max influence of each source at each checkpoint with 95% intervals, from `attribute`;
        - `hits`: the `k` samples with the highest and the `k` with the lowest influence on a query; whiskers are one
          standard deviation of sketch noise;
        - `heatmap`: the influence of groups (`by`, `how`) at each checkpoint, over all queries or the given ones;
        - `histogram`: the scores of all samples for a query, with its `k` highest marked;
        - `eif`: the measured influence of one of the `sources` on its queries, fine-tuning beside context: a domain's
          statements by role, averaged over draws;
        - `eif-sweep`: the learning rates of measured influence: rank agreement, and signal over rounding error.

        `hits`, `histogram`, `dominance`, `eif` and `eif-sweep` need a checkpoint; the others show all by default,
        without those that lack sketches of queries or samples, which a note names. A group's value is the `max` (`how`)
        of its samples' scores, the source influence Φ, unless said otherwise. The other arguments are those of `top`
        and `groups`; one that the kind does not use is refused. With `output` it returns the path.

        Raises
        ------
        NameUnknownError, NothingToScoreError, InputError, QueryError
        """
        from pathlib import Path

        from lark_store.query.plots import plot

        queries, checkpoints = (
            [] if names is None else [names] if isinstance(names, str) else list(names) for names in (query, checkpoint)
        )
        return plot(self._db, kind, queries, checkpoints, options, None if output is None else Path(output))

    @keywords(ReportSpec, SearchSpec, Compute)
    def report(
        self,
        output: str | Path,
        *,
        query: Sequence[str] | None = None,
        checkpoints: Sequence[str] = (),
        on_progress: OnProgress | None = None,
        **options: Unpack[ReportOptions],
    ) -> Path:
        """Write a report: one self-contained HTML page with tables, charts and a picker of queries; return its path.

        It shows the influence of each source, fine-tuning against pretraining, the samples that drive the most queries,
        and for each query its text, losses and top `k` samples, at the given checkpoints (default: all with sketches
        of queries and samples). `output` ends in `.html`.
        The scores are exact and computed on the spot, so `attribute` need not have run.

        The tables are over all queries of one source (or the given ids); the picker holds the first `limit` of them by
        id, so the page's size is bounded: at most about 20 kB for each query and checkpoint. Long texts are shortened.
        The page makes no requests. A hit is called significant only if a q-value was computed and is at most 0.05. The
        other arguments are those of `top`.

        Raises
        ------
        NameUnknownError, NothingToScoreError, InputError, QueryError
        """
        from pathlib import Path

        from lark_store.store.report import report

        return report(self._db, query, list(checkpoints), options, Path(output), on_progress)
