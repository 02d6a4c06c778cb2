"""`Store`, the main job: plan, ingest, verify, attribute."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lark_store.schema.locks import scoring
from lark_store.store.choose import Candidates
from lark_store.store.distance import distance_note
from lark_store.store.part import Part

if TYPE_CHECKING:
    from collections.abc import Sequence

    import polars as pl

    from lark_store.schema.records import CorrectionInfo, IngestReport, OnProgress, PlanReport


class Work(Part):
    """The methods that compute."""

    def correction_fit(
        self,
        checkpoint: str,
        *,
        kind: str = "adam",
        sources: Sequence[str] = (),
        variant: str = "chatml",
        samples: int = 500,
        seed: int = 0,
        from_optimizer: str | Path | None = None,
        device: str = "auto",
        precision: str = "auto",
        on_progress: OnProgress | None = None,
    ) -> CorrectionInfo:
        """Fit the factors that sketchers with a correction need at a checkpoint.

        `kind` is `adam` (or `adam2`: the second moments of gradients, as means over each matrix's rows and columns),
        `kfac` or `ekfac` (the curvature, layer by layer, with labels that the model draws by this `seed`). They are
        measured on `samples` samples drawn by the `seed` from the sources (default: all of stage `finetune`), rendered
        in a variant; or second moments are taken from the optimizer that the Trainer saved, `from_optimizer` a file
        `optimizer.pt` or its folder.

        Fitting in the same way again is harmless. Others take their place only while no sketch was made with them. A
        fit that is killed goes on from a draft that is at most a minute or so old; `ingest` fits what is missing by
        itself.

        Raises
        ------
        NameUnknownError, InputError, CheckpointError, CheckpointChangedError, StoreBusyError
        """
        from lark_store.ingest.fits import Wanted, fit, fit_from_optimizer

        if from_optimizer is not None:
            return fit_from_optimizer(self._writable, checkpoint, kind, Path(from_optimizer))
        how = (checkpoint, kind, tuple(sources), variant, samples, seed, device, precision)
        return fit(self._writable, Wanted(*how), on_progress)

    def ingest(
        self,
        checkpoints: Sequence[str],
        sources: Sequence[str],
        variants: Sequence[str],
        *,
        sketcher: str | None = None,
        limit: int | None = None,
        device: str = "auto",
        precision: str = "auto",
        batch_tokens: int | None = None,
        gradient_checkpointing: bool = False,
        candidates: int | None = None,
        by: str | None = None,
        queries: str | None = None,
        encoder: str | Path | None = None,
        on_progress: OnProgress | None = None,
    ) -> IngestReport:
        """Sketch the loss gradient of every sample that is not sketched yet.

        Idempotent and resumable: killed at any moment and run again, it goes on where it stopped. `limit` takes the
        first samples of each source; `precision` is the model's (`auto`: as saved on a GPU, float32 elsewhere).

        Samples of like length go through the model together, at most `batch_tokens` tokens with their padding (default:
        1,024 on a CPU, 8,192 on CUDA); a batch that does not fit into memory is halved. `gradient_checkpointing` takes
        less memory and more time. A model with layers that can't be batched goes one sample at a time,
        and the report's `notes` say so. A sketcher whose correction has factors gets them fitted where the checkpoint
        has none, to 500 samples of the sources of stage `finetune` (without one: of those given).

        With `candidates`, of each source that is no query only the samples nearest to the `queries` (a source of stage
        `query`, needed where there are several) are taken: for each query that many, by `bm25` (the default; samples
        without a common word are left out) or by `embedding`, the cosine of the vectors of an `encoder` (a folder or
        hub name; mean pooling, or what its own files say). Embeddings are kept in the store. The runs' recipes, `top`
        and `coverage` say that the rest was never looked at; a larger number, other queries or an ingest without
        `candidates` add what is missing.

        Under `torchrun` the samples are shared out among the processes, all of which must call it.

        Raises
        ------
        NameUnknownError, CheckpointChangedError, CheckpointError, StoreBusyError, InputError
        """
        from lark_store.ingest.run import Request, ingest

        db = self._writable
        wanted = Candidates(candidates, by, queries, None if encoder is None else str(encoder))
        choose = wanted.choice(db, sources, limit=limit, device=device, keep=True, on_progress=on_progress)
        names = (list(checkpoints), list(sources), list(variants), self._sketcher(sketcher))
        request = Request(*names, limit, device, precision, batch_tokens, gradient_checkpointing, choose)
        return ingest(db, request, on_progress)

    def plan(
        self,
        checkpoints: Sequence[str],
        sources: Sequence[str],
        variants: Sequence[str],
        *,
        sketcher: str | None = None,
        limit: int | None = None,
        device: str = "auto",
        precision: str = "auto",
        batch_tokens: int | None = None,
        gradient_checkpointing: bool = False,
        candidates: int | None = None,
        by: str | None = None,
        queries: str | None = None,
        encoder: str | Path | None = None,
        on_progress: OnProgress | None = None,
    ) -> PlanReport:
        """Say what an `ingest` with the same arguments would take: sketches, bytes, time and memory.

        Nothing is written and no weights are loaded: a few batches of the samples' lengths are run through a model of
        the checkpoint's config. To choose candidates by embedding, the encoder makes those that are not kept yet: that
        takes the time that the ingest's first step will take.

        Raises
        ------
        NameUnknownError, CheckpointChangedError, CheckpointError, InputError
        """
        from lark_store.ingest.plan import plan
        from lark_store.ingest.run import Request

        wanted = Candidates(candidates, by, queries, None if encoder is None else str(encoder))
        choose = wanted.choice(self._db, sources, limit=limit, device=device, keep=False, on_progress=on_progress)
        names = (list(checkpoints), list(sources), list(variants), self._sketcher(sketcher))
        request = Request(*names, limit, device, precision, batch_tokens, gradient_checkpointing, choose)
        return plan(self._db, request, on_progress)

    def verify(
        self,
        *,
        sketches: int = 20,
        sketcher: str | None = None,
        checkpoint: str | None = None,
        device: str = "auto",
        precision: str = "auto",
        on_progress: OnProgress | None = None,
    ) -> pl.DataFrame:
        """Compute stored sketches again, each sample alone, and compare.

        Takes `sketches` rows at random (always the same ones) of the sketcher and checkpoint asked for (default: of
        all). Returns a row each: sketcher, checkpoint, source, variant, sample_id, cosine, norm_ratio (new / stored),
        limit and ok. The limit is a cosine of 0.9999 for gradients made in float32, 0.999 for half precision.

        Raises
        ------
        NameUnknownError, CheckpointChangedError, CheckpointError, InputError
        """
        from lark_store.ingest.verify import verify

        return verify(self._db, sketches, sketcher, checkpoint, device, precision, on_progress)

    def attribute(
        self,
        checkpoints: Sequence[str],
        *,
        queries: str | None = None,
        sources: Sequence[str] = (),
        query_checkpoint: str | None = None,
        query_variant: str | None = None,
        sketcher: str | None = None,
        method: str | None = None,
        over_checkpoints: str | None = None,
        hits: int = 100,
        device: str = "auto",
        memory: int = 1 << 30,
        on_progress: OnProgress | None = None,
    ) -> pl.DataFrame:
        """Score queries against sources, group by group, where sketches were added since the last time.

        Writes the tables `influence` (the best `hits` samples per query and group) and `source_influence`. Influence is
        signed: above 0, training on the sample lowers the query's loss. All groups of a checkpoint are scored in one
        pass over its sketches; as many queries at a time as fit into `memory` bytes.

        `method` is one of `top`'s. Each checkpoint is scored by itself, or with `over_checkpoints` (`sum`, or
        `lr-weighted` by learning rate) their scores are summed and kept under the last of them, as `cosine-sum` and so
        on; `tracin` is `dot-lr-weighted`. `dot` is the default when the queries' sketches come from another checkpoint,
        the two-stage dot product of the multi-stage literature. Returns a row per group: scored, or current already;
        `scored_by` names the score, `note` warns of an overfitted checkpoint and says how far the queries' is from it.

        Raises
        ------
        NameUnknownError, NothingToScoreError, InputError, StoreBusyError
        """
        from lark_store.query.attribute import attribute
        from lark_store.query.groups import Wanted, ask
        from lark_store.query.methods import Method

        is_sum = Method.of(method, over_checkpoints).over is not None
        passes = [list(checkpoints)] if is_sum else [[name] for name in checkpoints]
        of = (query_checkpoint, query_variant, method, over_checkpoints)
        db, sketcher = self._writable, self._sketcher(sketcher)
        with scoring(db.location):  # nothing is removed meanwhile
            questions = [
                question for names in passes for question in ask(db, Wanted(names, sketcher, queries, sources, (), *of))
            ]
            report = attribute(db, questions, hits=hits, memory=memory, device=device, on_progress=on_progress)
        return report if query_checkpoint is None else self._with_distances(report, query_checkpoint)

    def _with_distances(self, report: pl.DataFrame, query_checkpoint: str) -> pl.DataFrame:
        """Say in the notes how far the queries' checkpoint is from each other one."""
        import polars as pl

        far = {name: distance_note(self._db, query_checkpoint, [name]) for name in report["checkpoint"].unique()}
        said = pl.col("checkpoint").replace_strict(far, return_dtype=pl.String)
        return report.with_columns(
            note=pl.when(said.is_null())
            .then("note")
            .otherwise(pl.concat_str("note", said, separator="\nnote: ", ignore_nulls=True))
        )
