"""Records without rows: reports on single things, options, progress."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import datetime as dt
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import polars as pl


@dataclass(frozen=True)
class SourceReport:
    """The result of adding a source. `examples` lists up to three ids per kind of row that was not added.

    `n_read` counts rows; a preference pair is one row and two samples. `n_changed` samples were skipped: their id
    exists with other content; `n_replaced` replaced it. `n_stripped` of `n_existing` were stored by an older version
    without the white space around text or id. `forms` counts rows. `previews` are the first samples of a dry run:
    `sample_id`, `content` (text or dialogue) and, with a checkpoint, `variant` and `rendered`, or `note`.
    """

    name: str
    n_read: int
    n_added: int
    n_existing: int
    n_duplicate: int
    n_empty: int
    n_changed: int
    n_replaced: int
    n_stripped: int = 0
    examples: dict[str, list[str]] = field(default_factory=dict)
    summary: str = ""
    forms: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    previews: list[dict[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint as added. `parts`: where its config and tokenizer are, if not in `path`. `notes` list caveats."""

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
    parts: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class CheckpointRun:
    """The checkpoints of a training run, in order; `new` were added by this call. `skipped`: folders and reasons."""

    checkpoints: tuple[CheckpointInfo, ...]
    new: frozenset[str]
    skipped: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class VariantInfo:
    """A format variant."""

    name: str
    template: str
    targets: str
    max_length: int
    sha256: str
    loss: str = "mean"


@dataclass(frozen=True)
class SketcherInfo:
    """The configuration of a sketcher."""

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
    power: float | None


@dataclass(frozen=True)
class CorrectionInfo:
    """The stored factors of a correction; `is_new`: they were added by this call.

    `notes` list checks that were not possible when factors were taken from an optimizer.
    """

    checkpoint: str
    kind: str
    origin: str
    sha256: str
    n_bytes: int
    sources: str | None
    n_samples: int | None
    created_at: dt.datetime
    is_new: bool
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Chosen:
    """The samples of a source that an ingest is limited to; `how` records the selection in the runs' recipes."""

    ids: frozenset[str]
    how: dict[str, Any]


@dataclass(frozen=True)
class RenderedSample:
    """A sample as the model sees it: its tokens as text pieces, with their targets marked."""

    source: str
    sample_id: str
    variant: str
    rule: str
    pieces: list[str]
    is_target: list[bool]
    n_cut: int
    notes: tuple[str, ...] = ()

    @property
    def marked(self) -> str:
        """The text with targets in ⟦ ⟧."""
        parts, inside = [], False
        for piece, target in zip(self.pieces, self.is_target, strict=True):
            if target != inside:
                parts.append("⟦" if target else "⟧")
                inside = target
            parts.append(piece)
        return "".join(parts) + ("⟧" if inside else "")


@dataclass(frozen=True)
class Progress:
    """The progress of a step. `label` changes with the step."""

    label: str
    done: int
    total: int
    failed: int = 0


OnProgress: TypeAlias = "Callable[[Progress], None]"


@dataclass(frozen=True)
class NewText:
    """A query outside the store: `prompt` and `response`, or `text`, or a `file` or `row` with one of these.

    A file is plain text, or .jsonl, .parquet, .csv or .tsv with the columns of a source; its first row is used. A row
    has such columns as keys; its id, if any, names the query. `precision` and `attention` are the model's for
    sketching.
    """

    prompt: str | None = None
    response: str | None = None
    text: str | None = None
    file: Path | None = None
    precision: str = "auto"
    attention: str = "auto"
    row: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Inventory:
    """The contents of a store, a frame per kind; `sketches` has a row per sketcher × checkpoint × source × variant."""

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
    """A store's schema version, the newest version known to this lark-store, and disk usage.

    `tables` has the columns table, rows, files (of the newest version), versions and bytes (of all versions): a row per
    vector table, then the catalog and the snapshots' catalogs. It is empty if the schemas differ.
    """

    schema: str
    newest: str
    tables: pl.DataFrame


@dataclass(frozen=True)
class SnapshotInfo:
    """A snapshot: its creation time, its version of each vector table, and their total number of rows."""

    name: str
    created_at: dt.datetime
    tables: dict[str, int]
    n_rows: int


@dataclass(frozen=True)
class BackupInfo:
    """A backup: its location, store, schema and time, and its number of files, bytes and rows.

    `damaged` has the errors of a damaged store, which was copied as it is without counting rows.
    """

    path: Path | str
    store_uuid: str
    schema: str
    created_at: dt.datetime
    n_files: int
    n_bytes: int
    n_rows: int
    damaged: tuple[str, ...] = ()
