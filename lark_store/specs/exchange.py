"""Options of an export and of an import of vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

from lark_store.specs.option import like, option
from lark_store.specs.search import SearchSpec

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class ExportSpec:
    """An export; see `Store.export`. The names select vectors; an empty list selects all."""

    overwrite: bool = option(False, help="Replace an existing file.")
    vectors: bool = option(False, help="Include the vectors of `sketches` (Parquet only).")
    checkpoints: Sequence[str] = option(
        (), flags="--checkpoint -c", metavar="NAME", help="Vectors of this checkpoint (default: all)."
    )
    sources: Sequence[str] = like(SearchSpec, "sources")
    variants: Sequence[str] = like(SearchSpec, "variants")
    sketcher: str | None = option(
        None, metavar="NAME", help="Vectors of this sketcher (default: the store's, else the only one with sketches)."
    )


@dataclass(frozen=True, kw_only=True)
class ImportSpec:
    """An import of vectors; see `Store.sketcher_import`. With `dtype` None the sketcher or the file decides."""

    sketcher: str
    checkpoint: str
    source: str
    variant: str
    ids: str | Path | None = option(
        None, metavar="FILE", help="A text file with one sample_id per line, if FILE has no ids."
    )
    kind: str = option("auto", help="`auto`, `numpy`, `parquet` or `bergson`.")
    dtype: str | None = option(
        None, help="Store as `float16` or `float32` (default: float32 for float64 vectors, else float16)."
    )


class ExportOptions(TypedDict, total=False):
    """The keywords of `Store.export`."""

    overwrite: bool
    vectors: bool
    checkpoints: Sequence[str]
    sources: Sequence[str]
    variants: Sequence[str]
    sketcher: str | None


class ImportOptions(TypedDict, total=False):
    """The keywords of `Store.sketcher_import`."""

    ids: str | Path | None
    kind: str
    dtype: str | None
