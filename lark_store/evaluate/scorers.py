"""Scorers: compute a matrix of scores (queries × samples) from a score's name.

    lark:cosine@epoch-1          the store's sketches of `lark`, by the method `cosine`, at a checkpoint
    adam:cosine@base+epoch-1     the sum over checkpoints; by learning rate: adam:cosine-lr-weighted@base+epoch-1
    ekfac-1:dot@base>epoch-3     samples at `base`, queries at `epoch-3`: influence over two stages of training
    bm25, random, length, …      a baseline (see `baselines`), maybe with an argument and checkpoints: `same:relation`

A baseline's name takes precedence over a sketcher's. A higher score means: training on the sample lowers the query's
loss more.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import polars as pl

from lark_store.errors import InputError, NameUnknownError, NothingToScoreError
from lark_store.evaluate.baselines import BASELINES, BaselineContext
from lark_store.evaluate.baselines.cache import cached
from lark_store.query.methods import Method

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from lark_store.evaluate.baselines.preparation import Seconds
    from lark_store.evaluate.dataset import Material, Text

    Matrix: TypeAlias = NDArray[np.float32]

_SPEC = re.compile(r"(?P<name>[^:@>]+)(?::(?P<argument>[^@>]+))?(?:@(?P<at>[^@>]+)(?:>(?P<queries_at>[^@>+]+))?)?")
_USAGE = (
    "use `SKETCHER:METHOD@CHECKPOINT`, with `@CHECKPOINT>QUERIES_CHECKPOINT` for queries at another one, or a baseline "
    "such as `bm25`"
)

_SECONDS = "select sum(seconds) from ingest_runs where sketcher = ? and list_contains(?, checkpoint)"
_SKETCHED = "select source, variant, sample_id from sketches where sketcher = ? and checkpoint = ?"


@dataclass(frozen=True)
class Scorer:
    """A custom score: `function` returns the matrix (Q, N) for the queries and samples of a `Material`."""

    name: str
    function: Callable[[Material], Matrix]


ScoreSpec: TypeAlias = "str | Scorer"


@dataclass(frozen=True)
class Parsed:
    """A score's name in its parts: baseline or sketcher, the argument after `:`, the checkpoints after `@`.

    `queries_at` is the checkpoint after `>`; None: the queries are at the samples' checkpoints.
    """

    spec: str
    name: str
    argument: str | None
    checkpoints: list[str]
    queries_at: str | None = None

    @property
    def method(self) -> str:
        """The method of a score from sketches: by default `cosine`, across checkpoints `dot`."""
        return self.argument or ("cosine" if self.queries_at is None else "dot")

    @property
    def over(self) -> str | None:
        """How the method, which may not say so itself, combines the checkpoints."""
        return None if len(self.checkpoints) == 1 or Method.of(self.method).over else "sum"

    def context(self, context: BaselineContext) -> BaselineContext:
        """Return the context of a baseline of this name."""
        return context.for_score(self.spec, self.argument, self.checkpoints, self.queries_at)


def matrices(material: Material, scores: Sequence[ScoreSpec], context: BaselineContext) -> dict[str, Matrix]:
    """Return each scorer's matrix by name, (Q, N) float32, in the order of `scores`.

    Raises
    ------
    InputError
        A name is invalid or repeated, or a score is not finite.
    NameUnknownError, NothingToScoreError
    """
    check(material, scores, context)
    return {name_of(score): timed([material], score, context)[0].matrix for score in scores}


@dataclass(frozen=True)
class Timed:
    """A score's matrix (Q, N) float32, and its seconds."""

    matrix: Matrix
    seconds: Seconds


def timed(trials: Sequence[Material], score: ScoreSpec, context: BaselineContext) -> list[Timed]:
    """Return a checked score's matrix and seconds in each trial; the trials share what the score prepares.

    Raises
    ------
    InputError
        A score is not finite.
    NameUnknownError, NothingToScoreError
    """
    context, results = context.for_new_score(), []
    for material in trials:
        context.preparation.begin()
        values = _matrix_of(material, score, context) if isinstance(score, str) else score.function(material)
        matrix = np.asarray(values, dtype=np.float32)
        seconds = context.preparation.seconds(len(material.queries))
        if matrix.shape != (len(material.queries), len(material.samples)) or not np.isfinite(matrix).all():
            raise InputError(
                f"`{name_of(score)}` returned {matrix.shape[0]} rows with {int((~np.isfinite(matrix)).sum())} "
                f"non-finite scores for {len(material.queries)} queries and {len(material.samples)} samples",
                "a scorer returns one finite number per query and sample",
            )
        results.append(Timed(matrix, seconds))
    return results


def name_of(score: ScoreSpec) -> str:
    """Return a score's name."""
    return score if isinstance(score, str) else score.name


def check(material: Material, scores: Sequence[ScoreSpec], context: BaselineContext) -> None:
    """Check all scores before computing the first.

    Raises
    ------
    InputError, NameUnknownError, NothingToScoreError, CheckpointError, CheckpointChangedError
    """
    names = [name_of(score) for score in scores]
    if not names:
        raise InputError("no score is given", "give one with `--score`, such as `lark:cosine@epoch-1` or `bm25`")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise InputError(f"`{twice}` is given twice", "give each score once")
    for score in scores:
        if isinstance(score, str):
            parsed = _parse(material, score)
            if parsed.name not in BASELINES:
                check_store(material, parsed)
            else:
                BASELINES[parsed.name].check(material, parsed.context(context))


def _matrix_of(material: Material, spec: str, context: BaselineContext) -> Matrix:
    parsed = _parse(material, spec)
    if parsed.name in BASELINES:
        return cached(material, parsed.context(context), BASELINES[parsed.name])
    return from_sketches(material, parsed, context)


def _parse(material: Material, spec: str) -> Parsed:
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise InputError(f"`{spec}` is not a score", _USAGE)
    name, checkpoints = match["name"], match["at"].split("+") if match["at"] else []
    parsed = Parsed(spec, name, match["argument"], checkpoints, match["queries_at"])
    if name in BASELINES:
        _check_across(parsed)
        return parsed
    known = [*BASELINES, *material.store.sql("select name from sketchers")["name"]]
    if name not in known:
        raise NameUnknownError.of("score", name, known, "sketch with `lark-store ingest`")
    if not checkpoints:
        raise InputError(f"`{spec}` names no checkpoint", f"use `{spec}@CHECKPOINT`; join several with `+`")
    return parsed


def _check_across(parsed: Parsed) -> None:
    """Refuse a second checkpoint for a baseline that has no score across two models."""
    if parsed.queries_at is None or BASELINES[parsed.name].is_across:
        return
    able = " and ".join(f"`{name}`" for name, baseline in BASELINES.items() if baseline.is_across)
    raise InputError(
        f"`{parsed.spec}`: `{parsed.name}` has no score with samples and queries at two checkpoints",
        f"give no `>{parsed.queries_at}`, or use a sketcher or {able}",
    )


def check_store(material: Material, score: Parsed) -> None:
    """Check that a score from the store's sketches can be computed, without reading a sketch.

    Raises
    ------
    NothingToScoreError
        A query or a sample has no sketch at a checkpoint.
    NameUnknownError, InputError
    """
    spec, sketcher, checkpoints = score.spec, score.name, score.checkpoints
    parsed = Method.of(score.method, score.over)
    if score.queries_at is not None and (parsed.over or parsed.scoring.is_local):
        raise InputError(
            f"`{spec}`: `{parsed.name}` needs queries and samples at the same checkpoints",
            f"give one checkpoint and the method `dot` or `cosine`, as in `{sketcher}:dot@{checkpoints[0]}>"
            f"{score.queries_at}`",
        )
    rates = dict(material.store.sql("select name, learning_rate from checkpoints").iter_rows())
    of_queries = checkpoints if score.queries_at is None else [score.queries_at]
    for checkpoint in dict.fromkeys([*checkpoints, *of_queries]):
        if checkpoint not in rates:
            raise NameUnknownError.of("checkpoint", checkpoint, rates, "add it with `lark-store checkpoint add`")
        if parsed.over == "lr-weighted" and rates[checkpoint] is None:
            raise InputError(
                f"`{spec}` weighs checkpoints by learning rate, and `{checkpoint}` has none",
                f"use `{sketcher}:{parsed.base}-sum@{'+'.join(checkpoints)}`, which needs no learning rate",
            )
    if len(set(checkpoints)) < len(checkpoints):
        raise InputError(f"`{spec}` names a checkpoint twice", "name each checkpoint once")
    for kind, texts, places in (
        ("queries", material.queries, of_queries),
        ("samples", material.samples, checkpoints),
    ):
        for checkpoint in places:
            rows = material.store.sql(_SKETCHED, [sketcher, checkpoint]).rows()
            _check_sketched(spec, sketcher, checkpoint, kind, texts, set(rows))


def _check_sketched(
    spec: str, sketcher: str, checkpoint: str, kind: str, texts: Sequence[Text], sketched: set[tuple[Any, ...]]
) -> None:
    missing = [text for text in texts if (text.source, text.variant, text.id) not in sketched]
    if missing:
        first = missing[0]
        options = f"--checkpoint {checkpoint} --source {first.source} --variant {first.variant} --sketcher {sketcher}"
        raise NothingToScoreError(
            f"{len(missing)} of {len(texts)} {kind} have no score by `{spec}`, such as `{first.id}` of "
            f"`{first.source}` as `{first.variant}`: there is no `{sketcher}` sketch at `{checkpoint}`",
            f"sketch them with `lark-store ingest {options}`; the SQL view `failures` says why some failed",
        )


def from_sketches(material: Material, score: Parsed, context: BaselineContext) -> Matrix:
    """Return the scores from the store's sketches, summed over checkpoints, (Q, N) float32.

    Raises
    ------
    NothingToScoreError
        A query or a sample has no sketch at a checkpoint.
    NameUnknownError, InputError
    """
    columns = ["source", "variant", "sample_id"]
    candidates = pl.DataFrame([(t.source, t.variant, t.id) for t in material.samples], columns, orient="row")
    spec, sketcher = score.spec, score.name
    scores = material.store.scores(
        material.query_ids,
        checkpoint=score.checkpoints,
        query_checkpoint=score.queries_at,
        sources=list(dict.fromkeys(candidates["source"])),
        variants=list(dict.fromkeys(candidates["variant"])),
        queries=material.queries[0].source,
        query_variant=material.queries[0].variant,
        sketcher=sketcher,
        method=score.method,
        over_checkpoints=score.over,
        device=context.device,
    )
    runs = material.store.sql(_SECONDS, [sketcher, list({*score.checkpoints, score.queries_at or ""})])
    context.preparation.add_overhead(runs.item() or 0.0)
    for note in scores.notes:
        context.note(f"{spec}: {note}")
    numbered = scores.samples.with_row_index("_place")
    places = candidates.join(numbered, on=columns, how="left", maintain_order="left")["_place"]
    if places.null_count():
        first = material.samples[places.is_null().arg_true()[0]]
        raise NothingToScoreError(
            f"{places.null_count()} of {len(places)} samples have no score by `{spec}`, such as `{first.id}` of "
            f"`{first.source}` as `{first.variant}`",
            f"sketch them with `lark-store ingest --sketcher {sketcher}`",
        )
    return scores.matrix[:, places.to_numpy()]
