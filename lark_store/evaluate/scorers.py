"""Scorers: what gives a matrix (queries × samples) of scores, by the name that it is asked for with.

    lark:cosine@epoch-1          the store's sketches of `lark`, by the method `cosine`, at a checkpoint
    adam:cosine@base+epoch-1     their sum; weighted by learning rate: adam:cosine-lr-weighted@base+epoch-1
    bm25, random, length, …      a rival (see `rivals`), which may take an argument and checkpoints too: `same:relation`

A rival's name goes before a sketcher's. Higher means: training on the sample lowers the query's loss more.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import polars as pl

from lark_store.errors import InputError, NameUnknownError, NothingToScoreError
from lark_store.evaluate.rivals import RIVALS, Given
from lark_store.query.methods import Method

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from lark_store.evaluate.material import Material

    Matrix: TypeAlias = NDArray[np.float32]

_SPEC = re.compile(r"(?P<name>[^:@]+)(?::(?P<argument>[^@]+))?(?:@(?P<at>[^@]+))?")


@dataclass(frozen=True)
class Scorer:
    """A score of one's own: `function` gives the matrix (Q, N) of a `Material`'s queries and samples."""

    name: str
    function: Callable[[Material], Matrix]


Asked: TypeAlias = "str | Scorer"


def matrices(material: Material, asked: Sequence[Asked], how: Given) -> dict[str, Matrix]:
    """Return each scorer's matrix, (Q, N) float32, by its name, in the order asked for.

    Raises
    ------
    InputError
        A name makes no sense, is asked for twice, or a score is not a number.
    NameUnknownError, NothingToScoreError
    """
    names = [each if isinstance(each, str) else each.name for each in asked]
    if not names:
        raise InputError("no score is named", "give one with `--score`, such as `lark:cosine@epoch-1` or `bm25`")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise InputError(f"`{twice}` is asked for twice", "name each score once")
    found = {}
    for name, each in zip(names, asked, strict=True):
        made = _named(material, each, how) if isinstance(each, str) else each.function(material)
        matrix = np.asarray(made, dtype=np.float32)
        if matrix.shape != (len(material.queries), len(material.samples)) or not np.isfinite(matrix).all():
            raise InputError(
                f"`{name}` gave {matrix.shape[0]} rows of scores of which {int((~np.isfinite(matrix)).sum())} are no "
                f"numbers, for {len(material.queries)} queries and {len(material.samples)} samples",
                "a scorer gives one finite number for each",
            )
        found[name] = matrix
    return found


def _named(material: Material, spec: str, how: Given) -> Matrix:
    parsed = _SPEC.fullmatch(spec)
    if parsed is None:
        raise InputError(f"`{spec}` is no score", "say `SKETCHER:METHOD@CHECKPOINT`, or a rival such as `bm25`")
    name, argument, at = parsed["name"], parsed["argument"], parsed["at"]
    checkpoints = at.split("+") if at else []
    if name in RIVALS:
        return RIVALS[name](material, how.of(spec, argument, checkpoints))
    known = [*RIVALS, *material.store.sql("select name from sketchers")["name"]]
    if name not in known:
        raise NameUnknownError.of("score", name, known, "sketch with `lark-store ingest`")
    if not checkpoints:
        raise InputError(f"`{spec}` names no checkpoint", f"say `{spec}@CHECKPOINT`; several are joined by `+`")
    return of_store(material, spec, name, argument or "cosine", checkpoints, how)


def of_store(material: Material, spec: str, sketcher: str, method: str, checkpoints: list[str], how: Given) -> Matrix:
    """Return what the store's sketches give, summed over checkpoints, (Q, N) float32.

    Raises
    ------
    NothingToScoreError
        A query or a sample has no sketch there.
    NameUnknownError, InputError
    """
    columns = ["source", "variant", "sample_id"]
    wanted = pl.DataFrame([(text.source, text.variant, text.id) for text in material.samples], columns, orient="row")
    joined = None if len(checkpoints) == 1 or Method.of(method).over else "sum"
    found = material.store.scores(
        material.query_ids,
        checkpoint=checkpoints,
        sources=list(dict.fromkeys(wanted["source"])),
        variants=list(dict.fromkeys(wanted["variant"])),
        queries=material.queries[0].source,
        query_variant=material.queries[0].variant,
        sketcher=sketcher,
        method=method,
        over_checkpoints=joined,
        device=how.device,
    )
    for note in found.notes:
        how.note(f"{spec}: {note}")
    numbered = found.samples.with_row_index("_place")
    places = wanted.join(numbered, on=columns, how="left", maintain_order="left")["_place"]
    if places.null_count():
        first = material.samples[places.is_null().arg_true()[0]]
        raise NothingToScoreError(
            f"{places.null_count()} of {len(places)} samples have no score by `{spec}`, such as `{first.id}` of "
            f"`{first.source}` as `{first.variant}`",
            f"sketch them with `lark-store ingest --sketcher {sketcher}`",
        )
    return found.matrix[:, places.to_numpy()]
