"""The record of several rankings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    import polars as pl

    from lark_store.results import Hits

_SAMPLE = ["source", "stage", "variant", "sample_id", "text"]


@dataclass(frozen=True)
class Rankings:
    """The results of `top` for several queries or checkpoints: `hits` of each query, checkpoint by checkpoint.

    The Arrow stream interface exports `frame`.
    """

    hits: tuple[Hits, ...]

    @property
    def frame(self) -> pl.DataFrame:
        """The rows of all `hits`, after the columns query_id and checkpoint."""
        import polars as pl

        names = ["query_id", "checkpoint"]
        parts = [
            hits.frame.with_columns(query_id=pl.lit(hits.query_id), checkpoint=pl.lit(hits.checkpoint))
            for hits in self.hits
        ]
        return pl.concat([part.select(*names, pl.exclude(names)) for part in parts], how="vertical_relaxed")

    @property
    def side_by_side(self) -> dict[str, pl.DataFrame]:
        """A frame per query: its hits with their rank and score at each checkpoint, null if not among the k best."""
        grouped: dict[str, list[Hits]] = {}
        for hits in self.hits:
            grouped.setdefault(hits.query_id, []).append(hits)
        return {query: _beside(members) for query, members in grouped.items()}

    def __len__(self) -> int:
        return len(self.hits)

    def __iter__(self) -> Iterator[Hits]:
        return iter(self.hits)

    def __getitem__(self, number: int) -> Hits:
        return self.hits[number]

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        return self.frame.__arrow_c_stream__(requested_schema)

    def _repr_html_(self) -> str:
        return self.frame._repr_html_()


def _beside(hits: list[Hits]) -> pl.DataFrame:
    """Return the samples of several rankings, the best rank first, with rank and score in each."""
    import polars as pl

    keys = [name for name in _SAMPLE if name not in {"stage", "text"}]
    samples = pl.concat(part.frame.select(_SAMPLE) for part in hits).unique(keys, keep="first", maintain_order=True)
    figures: list[str] = []
    for part in hits:
        names = {"rank": f"rank {part.checkpoint}", "score": f"score {part.checkpoint}"}
        ranked = part.frame.select(*keys, *(pl.col(old).alias(new) for old, new in names.items()))
        samples = samples.join(ranked, on=keys, how="left", maintain_order="left")
        figures += names.values()
    ranks = [name for name in figures if name.startswith("rank ")]
    best = pl.min_horizontal(ranks)
    return samples.sort(best, *ranks, nulls_last=True, maintain_order=True).select(*figures, *_SAMPLE)
