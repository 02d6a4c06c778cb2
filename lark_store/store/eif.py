"""`Store`, measured influence."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lark_store.specs import Compute, EifReportSpec, EifSpec, build
from lark_store.store.base import Part, keywords

if TYPE_CHECKING:
    from typing import Unpack

    import polars as pl

    from lark_store.results import EifReport, OnProgress
    from lark_store.specs import EifOptions, EifReportOptions


class EifMethods(Part):
    """The methods of measured influence (EIF)."""

    @keywords(EifSpec, Compute)
    def eif(
        self, checkpoint: str, source: str, *, on_progress: OnProgress | None = None, **options: Unpack[EifOptions]
    ) -> EifReport:
        """Measure the influence of each sample of a source on each query, by training on the sample alone.

        EIF is the query's loss before less its loss after, in nats per target token; above 0, the sample helps. It
        trains on one sample for `steps` steps of `optimizer` (`sgd`, or `adamw` without weight decay), without dropout,
        and restores the model. With `in_context` the sample stands before the query in one context instead, and the
        query's own tokens alone count.

        `queries` is any source, also the same one. Targets predicted by the model are refused for queries: add a
        variant with `targets="text"` for plain texts. With `by_draw`, samples meet the queries of their own `draw` in
        the metadata, and each draw is a matrix of its own (see `lark_store.make_domain`). `max_samples` are drawn with
        `seed`, the same ones as by `evaluate`; `max_queries` are the first ones.

        `sweep="1e-6:1e-2"` measures at several learning rates, two per decade, and the report's `sweep` names the
        plateau: the longest range of rates whose matrices have a rank agreement of at least 0.95 with the next one and
        a signal of 10 times the rounding error. `plan` only counts forward and backward passes.

        The rows are in the SQL views `eif`, `eif_pairs` and `eif_runs`. Resumable: each sample's rows are on disk
        before the next step. Measuring again adds the missing pairs to the same run.

        Raises
        ------
        NameUnknownError, InputError, CheckpointError, CheckpointChangedError, StoreBusyError
        """
        from lark_store.eif.run import measure

        spec = build(EifSpec, options, checkpoint=checkpoint, source=source, compute=build(Compute, options))
        return measure(self._db if spec.plan else self._writable, spec, on_progress)

    @keywords(EifReportSpec)
    def eif_report(self, checkpoint: str, **options: Unpack[EifReportOptions]) -> pl.DataFrame:
        """Return what measured influence in synthetic domains shows, a row per domain, desideratum and mode.

        Takes the matrices measured with `by_draw` at a checkpoint, of `sources` (default: all). Desiderata are: a
        statement helps itself over the others; the contrasts of the domain, such as the conclusion over its reversal
        after both premises; an unrelated sentence has no influence; the density of influence; its asymmetry
        ‖M − Mᵀ‖ / ‖M + Mᵀ‖ (0 is symmetric).

        Columns: source, family (the domain), desideratum, mode (`finetune`, `context`, or their difference), optimizer,
        learning_rate, value (mean over draws; in nats per target token, or a ratio or share), low, high (95% bootstrap
        interval over draws), p_value (permutation of signs; null without a contrast), relative (the value in units of
        the mean size of the influence between different related statements), share (of draws above 0) and n_draws. The
        difference `context − finetune` is of relative values, draw by draw.

        Raises
        ------
        NameUnknownError, NothingToScoreError
        """
        from lark_store.query.answers.desiderata import report

        return report(self._db, checkpoint, build(EifReportSpec, options))
