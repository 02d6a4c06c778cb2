"""Candidates first: what an ingest keeps to is asked of `query`, by embeddings that `ingest` makes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from lark_store.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lark_store.schema.database import Database
    from lark_store.schema.records import Chosen, OnProgress


@dataclass(frozen=True)
class Candidates:
    """What was asked for, as it was given; see `Store.ingest`."""

    n: int | None
    by: str | None
    queries: str | None
    encoder: str | None

    def choice(
        self,
        db: Database,
        sources: Sequence[str],
        *,
        limit: int | None,
        device: str,
        keep: bool,
        on_progress: OnProgress | None,
    ) -> Callable[[], dict[str, Chosen]] | None:
        """Return what chooses the candidates, once for all ranks; None where all samples are taken.

        `keep` says whether embeddings that are made on the way may be written to the store.

        Raises
        ------
        InputError
            Options that do not go together.
        """
        self._check(limit)
        if self.n is None:
            return None
        return partial(self._choose, db, sources, device=device, keep=keep, on_progress=on_progress)

    def _choose(
        self, db: Database, sources: Sequence[str], *, device: str, keep: bool, on_progress: OnProgress | None
    ) -> dict[str, Chosen]:
        from lark_store.query.nearest import by_vectors, by_words, find_nearest

        assert self.n is not None
        nearest = find_nearest(db, sources, self.n, self.by or "bm25", self.queries)
        if nearest.by == "bm25":
            return by_words(db, nearest)
        from lark_store.ingest.embeddings import Embeddings
        from lark_store.ingest.encoders import open_encoder
        from lark_store.ingest.gradients import pick_device

        assert self.encoder is not None
        encoder = open_encoder(self.encoder, pick_device(device))
        embeddings = Embeddings(db, encoder, on_progress)
        if keep:
            embeddings.complete([nearest.queries, *nearest.sources])
        return by_vectors(nearest, embeddings.blocks, {"encoder": encoder.name, "encoder_sha256": encoder.sha256})

    def _check(self, limit: int | None) -> None:
        """Refuse options that do not go together."""
        options = {"--by": self.by, "--queries": self.queries, "--encoder": self.encoder}
        given = [name for name, value in options.items() if value is not None]
        if self.n is None:
            if given:
                raise InputError(f"`{given[0]}` says how candidates are chosen", "say how many with `--candidates N`")
            return
        if limit is not None:
            raise InputError("a limit and candidates both say what is taken of a source", "leave one of them out")
        if self.by == "embedding" and self.encoder is None:
            raise InputError(
                "candidates by embedding need an encoder", "name a folder or a model of the hub with `--encoder`"
            )
        if self.by != "embedding" and self.encoder is not None:
            raise InputError("an encoder is for candidates by embedding", "give `--by embedding` too")
