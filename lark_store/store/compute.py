"""`Store`, computation: fit corrections, plan, ingest, verify, attribute."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lark_store.schema.locks import scoring
from lark_store.specs import AttributeSpec, Compute, FitSpec, IngestSpec, VerifySpec, build
from lark_store.store.base import Part, keywords, named
from lark_store.store.candidates import chooser
from lark_store.store.distance_notes import distance_note

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Unpack

    import polars as pl

    from lark_store.results import CorrectionInfo, IngestReport, OnProgress, PlanReport
    from lark_store.specs import AttributeOptions, FitOptions, IngestOptions, VerifyOptions


class ComputeMethods(Part):
    """The methods that compute gradients and scores."""

    @keywords(FitSpec, Compute)
    def correction_fit(
        self, checkpoint: str, *, on_progress: OnProgress | None = None, **options: Unpack[FitOptions]
    ) -> CorrectionInfo:
        """Fit the factors needed by sketchers with a correction, at a checkpoint.

        `kind` is `adam` (also used by `adam2`: second moments of gradients, as means over each matrix's rows and
        columns), `kfac` or `ekfac` (the curvature, layer by layer, with labels drawn from the model by `seed`). Factors
        are estimated on `samples` samples drawn by `seed` from the sources (default: all of stage `finetune`), rendered
        in a variant. Alternatively second moments come from the optimizer saved by Trainer: `from_optimizer` is a file
        `optimizer.pt` or its folder. An optimizer of another step than the checkpoint's, or saved with other weights,
        is refused; `notes` list what could not be compared.

        Fitting again with the same arguments is harmless. Other factors replace these only if no sketch uses them yet.
        A killed fit resumes from a draft at most a minute or so old; `ingest` fits missing factors itself.

        Raises
        ------
        NameUnknownError, InputError, CheckpointError, CheckpointChangedError, StoreBusyError
        """
        from lark_store.ingest.fit_corrections import fit

        spec = build(FitSpec, options, checkpoint=checkpoint, compute=build(Compute, options))
        return fit(self._writable, spec, on_progress)

    @keywords(IngestSpec, Compute)
    def ingest(
        self,
        checkpoints: Sequence[str] | None = None,
        sources: Sequence[str] | None = None,
        variants: Sequence[str] | None = None,
        *,
        on_progress: OnProgress | None = None,
        **options: Unpack[IngestOptions],
    ) -> IngestReport:
        """Sketch the loss gradient of every sample that has no sketch yet.

        Without `checkpoints` or `sources`: at all of them. Without `variants`: each source in its usual ones, those it
        has sketches in (by this sketcher, else by any), or `chatml`. The report's `units` list what was taken. A source
        with sketches of candidates only is refused if `sources` and `candidates` are left out.

        Idempotent and resumable: kill it at any moment and run it again to continue. `limit` takes the first samples of
        each source. `precision` is the model's (`auto`: as saved on a GPU, float32 elsewhere), and so is
        `attention` (`auto`: as its config says, if this machine has it).

        Samples of similar length are batched, at most `batch_tokens` tokens including padding (default: 1,024 on a CPU,
        8,192 on CUDA); a batch that doesn't fit into memory is halved. `gradient_checkpointing` uses less memory and
        more time. Models with layers that can't be batched run one sample at a time, and the report's `notes` say so.
        If the sketcher's correction needs factors and the checkpoint has none, they are fitted to 500 samples of the
        sources of stage `finetune` (without one: of the given sources).

        `candidates` limits each source, except query sources, to the samples nearest to the `queries` (a source of
        stage `query`, required if there are several). It takes that many per query, by `bm25` (the default; samples
        without a common word are left out) or by `embedding`, the cosine of an `encoder`'s vectors (a folder or hub
        name; mean pooling, or as its own files specify). Embeddings are kept in the store. The runs' recipes, `top` and
        `coverage` report that the rest was not searched. A larger number, other queries or an ingest without
        `candidates` add the missing samples.

        Under `torchrun` the processes share the samples; all of them must call this method.

        Raises
        ------
        NameUnknownError, CheckpointChangedError, CheckpointError, StoreBusyError, InputError
        """
        from lark_store.ingest.run import ingest

        db, spec = self._writable, _ingest_spec(checkpoints, sources, variants, options)
        return ingest(db, spec, chooser(db, spec, keep=True, on_progress=on_progress), on_progress)

    @keywords(IngestSpec, Compute)
    def plan(
        self,
        checkpoints: Sequence[str] | None = None,
        sources: Sequence[str] | None = None,
        variants: Sequence[str] | None = None,
        *,
        on_progress: OnProgress | None = None,
        **options: Unpack[IngestOptions],
    ) -> PlanReport:
        """Estimate an `ingest` with the same arguments: sketches, bytes, time and memory.

        Writes nothing and loads no weights: it runs a few batches of the samples' lengths through a model built from
        the checkpoint's config. To choose candidates by embedding, it computes the missing embeddings, which takes as
        long as the first step of the ingest.

        Raises
        ------
        NameUnknownError, CheckpointChangedError, CheckpointError, InputError
        """
        from lark_store.ingest.plan import plan

        spec = _ingest_spec(checkpoints, sources, variants, options)
        return plan(self._db, spec, chooser(self._db, spec, keep=False, on_progress=on_progress), on_progress)

    @keywords(VerifySpec, Compute)
    def verify(
        self, *, checkpoint: str | None = None, on_progress: OnProgress | None = None, **options: Unpack[VerifyOptions]
    ) -> pl.DataFrame:
        """Recompute stored sketches, each sample alone, and compare.

        Takes `sketches` random rows (always the same ones) of the given sketcher and checkpoint (default: all). Returns
        a row each: sketcher, checkpoint, source, variant, sample_id, cosine, norm_ratio (new / stored),
        same_answer (whether a predicted answer is predicted again; null for other target rules), limit and ok.
        The limit is a cosine of 0.9999 for float32 gradients, 0.999 for half precision.

        Raises
        ------
        NameUnknownError, CheckpointChangedError, CheckpointError, InputError
        """
        from lark_store.ingest.verify import verify

        spec = build(VerifySpec, options)
        return verify(self._db, spec.sketches, spec.sketcher, checkpoint, build(Compute, options), on_progress)

    @keywords(AttributeSpec, Compute)
    def attribute(
        self, checkpoints: Sequence[str], *, on_progress: OnProgress | None = None, **options: Unpack[AttributeOptions]
    ) -> pl.DataFrame:
        """Score queries against sources, group by group, where sketches were added since the last run.

        Writes the tables `influence` (the best `hits` samples per query and group) and `source_influence`. Influence is
        signed: above 0, training on the sample lowers the query's loss. One pass over a checkpoint's sketches scores
        all its groups, with as many queries at a time as fit into `memory` bytes.

        `method` is one of `top`'s. Each checkpoint is scored separately. With `over_checkpoints` (`sum`, or
        `lr-weighted` by learning rate) the scores are summed and stored under the last checkpoint, as `cosine-sum` and
        so on; `tracin` is `dot-lr-weighted`. `dot` is the default for queries at another checkpoint, the two-stage dot
        product of the multi-stage literature. Returns a row per group, scored or current. `scored_by` names the score;
        `note` warns of an overfitted checkpoint and has the distance of the queries' checkpoint.

        Raises
        ------
        NameUnknownError, NothingToScoreError, InputError, StoreBusyError
        """
        from lark_store.query.answers.attribute import attribute
        from lark_store.query.methods import Method

        is_sum = Method.of(options.get("method"), options.get("over_checkpoints")).over is not None
        names = named(checkpoints)
        passes = [names] if is_sum else [[name] for name in dict.fromkeys(names)]
        db, query_checkpoint = self._writable, options.get("query_checkpoint")
        with scoring(db.location):  # blocks removals meanwhile
            specs = [build(AttributeSpec, options, checkpoints=part) for part in passes]
            report = attribute(db, specs, build(Compute, options), on_progress)
        return report if query_checkpoint is None else self._with_distances(report, query_checkpoint)

    def _with_distances(self, report: pl.DataFrame, query_checkpoint: str) -> pl.DataFrame:
        """Add to the notes the distance of the queries' checkpoint from each other one."""
        import polars as pl

        distances = {name: distance_note(self._db, query_checkpoint, [name]) for name in report["checkpoint"].unique()}
        note = pl.col("checkpoint").replace_strict(distances, return_dtype=pl.String)
        return report.with_columns(
            note=pl.when(note.is_null())
            .then("note")
            .otherwise(pl.concat_str("note", note, separator="\nnote: ", ignore_nulls=True))
        )


def _ingest_spec(
    checkpoints: Sequence[str] | None,
    sources: Sequence[str] | None,
    variants: Sequence[str] | None,
    options: IngestOptions,
) -> IngestSpec:
    """Return the spec of an ingest. A list that is left out stands for all; an empty one is an error."""
    return build(
        IngestSpec,
        options,
        checkpoints=() if checkpoints is None else named(checkpoints),
        sources=() if sources is None else named(sources, "source"),
        variants=() if variants is None else named(variants, "variant"),
        compute=build(Compute, options),
    )
