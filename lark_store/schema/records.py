"""What the API returns besides polars frames: frozen dataclasses that say what was done."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import datetime as dt
    from collections.abc import Callable
    from pathlib import Path

    import numpy as np
    import polars as pl
    from numpy.typing import NDArray


@dataclass(frozen=True)
class SourceReport:
    """What adding a source did with its rows. `examples` names up to three of each kind that was not added.

    `n_changed` rows have an id that is there with other content and were not taken, `n_replaced` took its place.
    """

    name: str
    n_read: int
    n_added: int
    n_existing: int
    n_duplicate: int
    n_empty: int
    n_changed: int
    n_replaced: int
    examples: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint as it was added."""

    name: str
    model: str
    path: str
    revision: str | None
    weights_sha256: str
    tokenizer_sha256: str
    epoch: float | None
    step: int | None
    learning_rate: float | None
    metrics: dict[str, float]


@dataclass(frozen=True)
class VariantInfo:
    """A format variant."""

    name: str
    template: str
    targets: str
    max_length: int
    sha256: str


@dataclass(frozen=True)
class SketcherInfo:
    """A sketcher: what is sketched and how."""

    name: str
    k: int
    seed: int
    dtype: str
    parameters: str | None
    exclude: str | None
    map_version: int
    correction: str
    positions: str
    damping: float | None
    min_ndim: int | None


@dataclass(frozen=True)
class CorrectionInfo:
    """The factors of a correction, as they are in the store; `is_new`: they were not there before."""

    checkpoint: str
    kind: str
    origin: str
    sha256: str
    n_bytes: int
    sources: str | None
    n_samples: int | None
    created_at: dt.datetime
    is_new: bool


@dataclass(frozen=True)
class Chosen:
    """The samples of one source to which an ingest keeps, and how they were chosen, for the recipe of its runs."""

    ids: frozenset[str]
    how: dict[str, Any]


@dataclass(frozen=True)
class RenderedSample:
    """A sample as a model sees it: its tokens as text pieces, and which of them are targets."""

    source: str
    sample_id: str
    variant: str
    rule: str
    pieces: list[str]
    is_target: list[bool]
    n_cut: int

    @property
    def marked(self) -> str:
        """The text with its targets between ⟦ and ⟧."""
        out, inside = [], False
        for piece, target in zip(self.pieces, self.is_target, strict=True):
            if target != inside:
                out.append("⟦" if target else "⟧")
                inside = target
            out.append(piece)
        return "".join(out) + ("⟧" if inside else "")


@dataclass(frozen=True)
class Progress:
    """How far a piece of work is. `label` changes when the next piece begins."""

    label: str
    done: int
    total: int
    failed: int = 0


OnProgress: TypeAlias = "Callable[[Progress], None]"


@dataclass(frozen=True)
class IngestReport:
    """What an ingest did, one row per checkpoint × source × variant.

    `units` has the columns checkpoint, source, variant, n_samples, n_existing, n_sketched, n_failed, run, seconds and
    bytes; `failures` has checkpoint, source, variant, sample_id, reason; `notes` say what was done in another way
    than usual. Offers the Arrow stream interface with its units.
    """

    units: pl.DataFrame
    failures: pl.DataFrame
    notes: list[str]

    @property
    def n_failed(self) -> int:
        """How many samples could not be sketched."""
        return int(self.units["n_failed"].sum())

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        return self.units.__arrow_c_stream__(requested_schema)

    def _repr_html_(self) -> str:
        return self.units._repr_html_()


@dataclass(frozen=True)
class PlanReport:
    """What an ingest would take.

    `units` has the columns checkpoint, source, variant, n_samples, n_existing, tokens_per_sample (mean), seconds and
    bytes (of the sketches that are missing). `checkpoints` has checkpoint, path (`BatchPath`: several samples in one
    backward, `HookPath`: one at a time), tensors and coordinates sketched, bytes_per_sample, seconds_per_sample and
    peak_bytes of memory: the device's on CUDA, else the process's. Offers the Arrow stream interface with its units.
    """

    units: pl.DataFrame
    checkpoints: pl.DataFrame

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        return self.units.__arrow_c_stream__(requested_schema)

    def _repr_html_(self) -> str:
        return self.units._repr_html_()


@dataclass(frozen=True)
class NewText:
    """A query that is not in the store: `prompt` and `response`, or `text`, or a `file` with one of these.

    A file is .jsonl, .parquet, .csv or .tsv with the columns of a source, whose first row is taken, or plain text.
    `precision` is the model's while the text is sketched.
    """

    prompt: str | None = None
    response: str | None = None
    text: str | None = None
    file: Path | None = None
    precision: str = "auto"


SIGNIFICANT = 0.05  # the false discovery rate at which hits are counted


@dataclass(frozen=True)
class Hits:
    """The answer to `top`, and how it was made.

    `frame` has the columns rank, score, noise (the score's standard deviation from sketching, in the score's unit),
    p_value and q_value (against `null`), source, stage, variant, sample_id and text; of a hybrid also cosine,
    cosine_rank, bm25 and bm25_rank. What there is none of is null. `score` names what is shown, as `lark · cosine`;
    `notes` say what a reader has to know of it, such as that a source was searched in part. Offers the Arrow stream
    interface, so polars, pandas and DuckDB take it as it is.
    """

    frame: pl.DataFrame
    query_id: str
    checkpoint: str
    query_checkpoint: str
    query_variant: str
    method: str
    n_searched: int
    ingest_runs: list[int]
    score: str
    exact: bool = True
    condition: str | None = None
    null: str = "none"
    recall: float | None = None
    candidates: int | None = None
    notes: tuple[str, ...] = ()

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        return self.frame.__arrow_c_stream__(requested_schema)

    def _repr_html_(self) -> str:
        return self.frame._repr_html_()

    def __len__(self) -> int:
        return len(self.frame)

    @property
    def n_significant(self) -> int:
        """How many of the hits have a q-value of at most 0.05."""
        return int((self.frame["q_value"] <= SIGNIFICANT).sum())

    @property
    def how(self) -> str:
        """How the answer was made: exact or not, what was searched, from which runs, and what is significant."""
        runs = ", ".join(map(str, self.ingest_runs))
        at = "" if self.query_checkpoint in self.checkpoint.split(" + ") else f", query at `{self.query_checkpoint}`"
        under = f" where {self.condition}" if self.condition else ""
        there = (
            ", over {} sketches at each" if " over " in self.score else " over {} sketches at `" + self.checkpoint + "`"
        )
        return (
            f"{self._kind} {self.score}{there.format(self.n_searched)}{under}{at}, "
            f"query as `{self.query_variant}`; ingest runs {runs}{self._significance}"
            + "".join(f"\nnote: {note}" for note in self.notes)
        )

    @property
    def _kind(self) -> str:
        if self.exact:
            return "exact"
        return f"approximate (recall@10 {self.recall:.3f} when measured, {self.candidates} candidates)"

    @property
    def _significance(self) -> str:
        if self.null == "none":
            return ""
        against = {"sources": "the other sources' samples", "signs": "shuffled signs"}.get(self.null, f"`{self.null}`")
        n = self.n_significant
        found = f"{n} of {len(self)} hits" if n else "nothing significant"
        return f"\nagainst {against}: {found} at q ≤ {SIGNIFICANT}"


@dataclass(frozen=True)
class ScoreMatrix:
    """Every sample's score for every query: `matrix` (Q, N) float32, its rows `query_ids`, its columns `samples`.

    `samples` has the columns source, variant and sample_id, sorted by them. Above 0, training on the sample lowers the
    query's loss. `score` names what is shown, as `lark · cosine`; `notes` say what a reader has to know of it. Offers
    the Arrow stream interface with its long form.
    """

    query_ids: list[str]
    samples: pl.DataFrame
    matrix: NDArray[np.float32]
    score: str
    method: str
    checkpoints: list[str]
    notes: tuple[str, ...] = ()

    @property
    def frame(self) -> pl.DataFrame:
        """The long form: a row for each query and sample, with query_id, source, variant, sample_id and score."""
        import polars as pl

        n = len(self.samples)
        ids = pl.Series("query_id", self.query_ids, dtype=pl.String)
        asked = pl.DataFrame(ids).select(pl.col("query_id").repeat_by(n).explode())
        every = pl.concat([self.samples] * len(self.query_ids), rechunk=False)
        return asked.hstack(every).with_columns(score=pl.Series(self.matrix.reshape(-1)))

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        return self.frame.__arrow_c_stream__(requested_schema)

    def _repr_html_(self) -> str:
        return self.frame._repr_html_()


@dataclass(frozen=True)
class Inventory:
    """What a store holds, a frame per kind; `sketches` has one row per sketcher × checkpoint × source × variant."""

    path: str
    checkpoints: pl.DataFrame
    sources: pl.DataFrame
    variants: pl.DataFrame
    sketchers: pl.DataFrame
    sketches: pl.DataFrame

    def frames(self) -> dict[str, Any]:
        """Return the frames by name, in reading order."""
        names = ("checkpoints", "sources", "variants", "sketchers", "sketches")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class StoreStatus:
    """A store's schema version, the newest that this lark-store knows, and what the store takes on disk.

    `tables` has the columns table, rows, files (of the newest version), versions and bytes (of all versions): a row per
    vector table, then the catalog and the snapshots' catalogs. It is empty where the schemas differ.
    """

    schema: str
    newest: str
    tables: pl.DataFrame


@dataclass(frozen=True)
class SnapshotInfo:
    """A snapshot: when it was made, the version of each vector table then, and their rows in all."""

    name: str
    created_at: dt.datetime
    tables: dict[str, int]
    n_rows: int


@dataclass(frozen=True)
class RepairReport:
    """What a repair did: findings that were mended, and those that are left. Offers the Arrow stream of what is left.

    Both have the columns of `Store.db_check`. Of a dry run, `mended` has what would be.
    """

    mended: pl.DataFrame
    left: pl.DataFrame

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        return self.left.__arrow_c_stream__(requested_schema)

    def _repr_html_(self) -> str:
        return self.left._repr_html_()


@dataclass(frozen=True)
class BackupInfo:
    """A backup: where it is, of which store, with which schema, when it was taken, its files, bytes and rows."""

    path: Path | str
    store_uuid: str
    schema: str
    created_at: dt.datetime
    n_files: int
    n_bytes: int
    n_rows: int
