"""`Store`, in and out: export, and sketches that were made elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lark_store.store.part import Part

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lark_store.schema.records import IngestReport, OnProgress


class Doors(Part):
    """The methods that let data out and in."""

    def export(
        self,
        what: str,
        path: str | Path,
        *,
        overwrite: bool = False,
        vectors: bool = False,
        checkpoints: Sequence[str] = (),
        sources: Sequence[str] = (),
        variants: Sequence[str] = (),
        sketcher: str | None = None,
    ) -> int:
        """Write the rows of a view, or of one SELECT, to a .parquet, .csv, .json or .jsonl file; returns their number.

        Streamed, read-only like `sql`, and whole or not at all; a file that is there is kept unless `overwrite`.

        With `vectors`, `what` is `sketches` and the file Parquet: committed sketches of one sketcher (default: the
        store's) with the column `vector`, (k,) in the sketcher's own type, of the checkpoints, sources and variants
        asked for (default: all). A vector is stored with norm √k: divide by √k for the unit sketch.

        Raises
        ------
        InputError, QueryError, NameUnknownError, NothingToScoreError
        """
        from lark_store.errors import InputError
        from lark_store.query.export import export, export_vectors

        if not vectors:
            if checkpoints or sources or variants or sketcher:
                raise InputError(
                    "only vectors are chosen by checkpoint, source, variant and sketcher",
                    "add `--vectors`, or choose rows by a SELECT",
                )
            return export(self._db, what, Path(path), overwrite=overwrite)
        if what != "sketches":
            raise InputError(f"`{what}` has no vectors", "`lark-store export sketches OUT.parquet --vectors`")
        return export_vectors(
            self._db,
            Path(path),
            checkpoints=checkpoints,
            sources=sources,
            variants=variants,
            sketcher=self._sketcher(sketcher),
            overwrite=overwrite,
        )

    def sketcher_import(
        self,
        name: str,
        path: str | Path,
        *,
        checkpoint: str,
        source: str,
        variant: str,
        ids: str | Path | None = None,
        kind: str = "auto",
        dtype: str | None = None,
        on_progress: OnProgress | None = None,
    ) -> IngestReport:
        """Import vectors that were made elsewhere as sketches of a sketcher of their own, made here if it is new.

        Kinds: `numpy` (a .npy file, (N, D) floats), `parquet` (columns sample_id and vector, maybe grad_norm, loss,
        n_tokens, n_loss_tokens), `bergson` (a folder made by `bergson build`). `ids` is a text file, a sample_id per
        line, in the order of the rows, where the file itself has none. D is any number from 2 to 4,194,304, the same
        for all imports under one name. Stored as `dtype`, `float16` or `float32` (default: float32 for float64
        vectors, else float16); where it says none, `grad_norm` is the vector's norm, `loss` NaN, `n_tokens` 0.

        Idempotent and resumable like `ingest`. Vectors that are zero or not finite are recorded as failed.

        Raises
        ------
        NameUnknownError, NameTakenError, NameInvalidError, InputError, StoreBusyError
        """
        from lark_store.ingest.imports import Wanted, import_sketches

        wanted = Wanted(name, checkpoint, source, variant, dtype)
        file = None if ids is None else Path(ids)
        return import_sketches(self._writable, wanted, Path(path), kind, file, on_progress)
