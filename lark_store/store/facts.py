"""`Store`, facts: probe them at checkpoints, and analyse when they are learned or lost."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lark_store.specs import Compute, ProbeSpec, SurvivalSpec, build
from lark_store.store.base import Part, keywords, named

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from typing import Unpack

    from lark_store.results import OnProgress, ProbeReport, SurvivalReport
    from lark_store.specs import ProbeOptions, SurvivalOptions


class FactMethods(Part):
    """The methods that measure what models know."""

    @keywords(ProbeSpec, Compute)
    def probe(
        self,
        sources: Sequence[str],
        checkpoints: Sequence[str] | None = None,
        *,
        on_progress: OnProgress | None = None,
        **options: Unpack[ProbeOptions],
    ) -> ProbeReport:
        """Ask every checkpoint for the answer of every fact in the sources; fills the SQL view `probes`.

        A fact is a sample with an exact answer: a prompt with its response. Its greedy answer is correct if each token
        of the answer, and then an end of answer, is the most likely one: what generation gives, in one forward pass.
        Its log-probability is that of the answer and its end. Where the `variant` puts no end after the answer, as
        `raw`, a completion only has to begin with it.

        `samples` further answers are sampled per fact at a `temperature`, with a `seed` per fact; they are correct if
        they match the answer, both in Unicode's form NFKD, with runs of white space as one space and none at the ends.

        Without `checkpoints`: at all of them. Idempotent and resumable: kill it at any moment and run it again to
        continue; failed samples are tried again. `dry_run` estimates the time of the greedy answers and writes nothing.

        Raises
        ------
        NameUnknownError, InputError, CheckpointError, CheckpointChangedError, StoreBusyError
        """
        from lark_store.probing.run import probe

        spec = build(
            ProbeSpec,
            options,
            sources=tuple(named(sources, "source")),
            checkpoints=() if checkpoints is None else tuple(named(checkpoints)),
            compute=build(Compute, options),
        )
        return probe(self._writable, spec, on_progress)

    @keywords(SurvivalSpec)
    def survival(self, *, output: str | Path | None = None, **options: Unpack[SurvivalOptions]) -> SurvivalReport:
        """Analyse when probed facts are learned or lost, and what predicts it; needs the extra `survival`.

        `event` is `acquisition` (facts trained on: the first correct greedy answer), `generalisation` (withheld facts),
        `learning` (both) or `degradation` (correct at the `baseline`: the first wrong answer); with `rule="stable"` the
        answer must be the same at the next checkpoint too. Time is epochs since the baseline. Facts are seen if their
        content is in the source `seen_in`, or if their metadata `seen_key` is true; all others are withheld.

        Curves are Kaplan–Meier's, `by` latent knowledge, `seen` or a metadata key, with a log-rank test. Hazard ratios
        are Cox's, with Efron's ties, beside a discrete-time model (cloglog) and a test of proportional hazards
        (Schoenfeld residuals). `covariates` are values at the baseline: `latent` (greedy wrong, a sample correct),
        `p` and `logprob` (of the answer), `n_tokens`, `seen`, keys of the metadata, and influence on the fact as a
        query: `phi_pt` and `best_driver` (the highest of pretraining and fine-tuning samples, from `attribute`) and
        `self_influence`. Numbers other than 0 and 1 are in standard deviations. The SQL functions `fact_events` and
        `survival` give the same. With `output`, a folder, it draws `curves.svg` with numbers at risk,
        `hazards.svg`, and `recall.svg`, the share of correct facts at each epoch.

        Raises
        ------
        NameUnknownError, NothingToScoreError, InputError
        """
        from pathlib import Path

        from lark_store.query.answers.survival import draw, survival

        spec = build(SurvivalSpec, options)
        report = survival(self._db, spec)
        if output is not None:
            draw(report, spec.event, Path(output))
        return report
