"""`Store`, measured influence."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lark_store.specs import Compute, EifSpec, build
from lark_store.store.base import Part, keywords

if TYPE_CHECKING:
    from typing import Unpack

    from lark_store.results import EifReport, OnProgress
    from lark_store.specs import EifOptions


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
        the metadata, and each draw is a matrix of its own (see `lark_store.make_domain`). `max_samples` and
        `max_queries` are drawn with `seed`.

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
