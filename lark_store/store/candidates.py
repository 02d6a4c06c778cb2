"""Candidate selection for `ingest`: `query` ranks the samples, with embeddings computed by `ingest`."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from lark_store.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from lark_store.results import Chosen, OnProgress
    from lark_store.schema.database import Database
    from lark_store.specs import IngestSpec


def chooser(
    db: Database, spec: IngestSpec, *, keep: bool, on_progress: OnProgress | None
) -> Callable[[IngestSpec], dict[str, Chosen]] | None:
    """Return the function that chooses the candidates, once for all ranks; None where all samples are taken.

    It takes the ingest's spec with all names. `keep` allows it to write new embeddings to the store.

    Raises
    ------
    InputError
        The options contradict each other.
    """
    _check(spec)
    if spec.candidates is None:
        return None
    return partial(_choose, db, n=spec.candidates, keep=keep, on_progress=on_progress)


def _choose(db: Database, spec: IngestSpec, *, n: int, keep: bool, on_progress: OnProgress | None) -> dict[str, Chosen]:
    from lark_store.query.scoring.prefilter import by_vectors, by_words, find_nearest

    nearest = find_nearest(db, spec.sources, n, spec.by or "bm25", spec.queries)
    if nearest.method == "bm25":
        return by_words(db, nearest)
    from lark_store.core.device import pick_device
    from lark_store.ingest.embeddings import Embeddings
    from lark_store.modeling.sentence_encoders import open_encoder

    encoder = open_encoder(str(spec.encoder), pick_device(spec.compute.device))
    embeddings = Embeddings(db, encoder, on_progress)
    if keep:
        embeddings.complete([nearest.queries, *nearest.sources])
    return by_vectors(nearest, embeddings.blocks, {"encoder": encoder.name, "encoder_sha256": encoder.sha256})


def _check(spec: IngestSpec) -> None:
    """Refuse contradictory options."""
    options = {"--by": spec.by, "--queries": spec.queries, "--encoder": spec.encoder}
    used = [name for name, value in options.items() if value is not None]
    if spec.candidates is None:
        if used:
            raise InputError(f"`{used[0]}` needs `--candidates`", "give the number of candidates with `--candidates N`")
        return
    if spec.limit is not None:
        raise InputError("`--limit` and `--candidates` can't be combined", "leave one of them out")
    if spec.by == "embedding" and spec.encoder is None:
        raise InputError(
            "choosing candidates by embedding needs an encoder", "give a folder or a hub model with `--encoder`"
        )
    if spec.by != "embedding" and spec.encoder is not None:
        raise InputError("an encoder is only used to choose candidates by embedding", "add `--by embedding`")
