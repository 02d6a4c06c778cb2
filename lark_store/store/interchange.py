"""`Store`, import and export."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lark_store.specs import ExportSpec, ImportSpec
from lark_store.store.base import Part, keywords

if TYPE_CHECKING:
    from typing import Unpack

    from lark_store.results import IngestReport, OnProgress
    from lark_store.specs import ExportOptions, ImportOptions


class InterchangeMethods(Part):
    """The methods that export data and import sketches."""

    @keywords(ExportSpec)
    def export(self, what: str, path: str | Path, **options: Unpack[ExportOptions]) -> int:
        """Write the rows of a view, or of one SELECT, to a .parquet, .csv, .json or .jsonl file; return their number.

        Streamed, read-only like `sql`, and all or nothing. Keeps an existing file unless `overwrite`.

        With `vectors`, `what` is `sketches` and the file is Parquet: committed sketches of one sketcher (default: the
        store's default) with the column `vector`, (k,) in the sketcher's type, restricted to the given checkpoints,
        sources and variants (default: all). Vectors are stored with norm √k: divide by √k for the unit sketch.

        Raises
        ------
        InputError, QueryError, NameUnknownError, NothingToScoreError
        """
        from lark_store.errors import InputError
        from lark_store.query.answers.export import export, export_vectors

        spec = ExportSpec(**options)
        if not spec.vectors:
            if spec.checkpoints or spec.sources or spec.variants or spec.sketcher:
                raise InputError(
                    "filters by checkpoint, source, variant and sketcher apply to vectors only",
                    "add `--vectors`, or filter the rows with a SELECT",
                )
            return export(self._db, what, Path(path), overwrite=spec.overwrite)
        if what != "sketches":
            raise InputError(f"`{what}` has no vectors", "use `lark-store export sketches OUT.parquet --vectors`")
        return export_vectors(self._db, Path(path), spec)

    @keywords(ImportSpec)
    def sketcher_import(
        self,
        name: str,
        path: str | Path,
        *,
        checkpoint: str,
        source: str,
        variant: str,
        on_progress: OnProgress | None = None,
        **options: Unpack[ImportOptions],
    ) -> IngestReport:
        """Import external vectors as sketches of a separate sketcher, created if it does not exist.

        Kinds: `numpy` (a .npy file, (N, D) floats), `parquet` (columns sample_id and vector, optionally grad_norm,
        loss, n_tokens, n_loss_tokens), `bergson` (a folder written by `bergson build`). `ids` is a text file with one
        sample_id per line, in row order, for files without ids. D is 2 to 4,194,304, the same for all imports under one
        name. Stored as `dtype`, `float16` or `float32` (default: float32 for float64 vectors, else float16). Missing
        columns: `grad_norm` is the vector's norm, `loss` NaN, `n_tokens` 0.

        Idempotent and resumable like `ingest`. Zero and non-finite vectors are recorded as failures.

        Raises
        ------
        NameUnknownError, NameTakenError, NameInvalidError, InputError, StoreBusyError
        """
        from lark_store.ingest.import_vectors import import_sketches

        spec = ImportSpec(sketcher=name, checkpoint=checkpoint, source=source, variant=variant, **options)
        return import_sketches(self._writable, spec, Path(path), on_progress)
