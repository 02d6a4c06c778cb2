"""`verify`: stored sketches computed again, each sample alone and through autograd's own parameter gradients."""

from __future__ import annotations

import gc
import math
import random
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from sqlalchemy import select

from lark_store.errors import CheckpointError, InputError
from lark_store.ingest.batched import hook_path
from lark_store.ingest.checkpoints import verify as verify_files
from lark_store.ingest.factors import RECIPE_KEY, corrector_for
from lark_store.ingest.gradients import Sketch, pick_device
from lark_store.ingest.models import context_length, load_model, load_tokenizer
from lark_store.ingest.oporp import GradientSketcher
from lark_store.ingest.sketchers import (
    IMPORTED,
    check_ours,
    chosen_of,
    fingerprint,
    is_masked,
    oporp_of,
    placements_of,
)
from lark_store.ingest.sources import Sample
from lark_store.ingest.variants import Renderer, Tokens, UnusableSampleError
from lark_store.schema.catalog import Checkpoint, IngestRun, Sketcher
from lark_store.schema.database import Database, find
from lark_store.schema.records import Progress
from lark_store.schema.vectors import sketch_table, where

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from lark_store.schema.records import OnProgress

# The same sample, alone and in any batch: rounding alone may part them. In half precision it moves the length of a
# gradient of few targets by per cents (2% seen on SmolLM2), its direction much less.
LIMITS = {"float32": 0.9999, "bfloat16": 0.999, "float16": 0.999, "auto": 0.999}
_SCHEMA = {
    "sketcher": pl.String,
    "checkpoint": pl.String,
    "source": pl.String,
    "variant": pl.String,
    "sample_id": pl.String,
    "cosine": pl.Float64,
    "norm_ratio": pl.Float64,
    "limit": pl.Float64,
    "ok": pl.Boolean,
}


def verify(
    db: Database,
    n: int,
    sketcher: str | None,
    checkpoint: str | None,
    device: str,
    precision: str,
    on_progress: OnProgress | None = None,
) -> pl.DataFrame:
    """Compute stored sketches again and compare; see `Store.verify`."""
    if n < 1:
        raise InputError(f"{n} sketches are none to verify", "try `--sketches 20`")
    on = pick_device(device)
    drawn = _draw(db, n, sketcher, checkpoint)
    made: list[dict[str, Any]] = []
    for _, some in groupby(drawn, key=lambda row: (row[0].checkpoint_id, row[0].fingerprint, _precision(row[0]))):
        rows = list(some)
        again = _Again(db, rows[0][0], on, precision)
        for run, sample_id in rows:
            made.append(again.compare(run, sample_id))
            if on_progress:
                on_progress(Progress("computing sketches again", len(made), len(drawn)))
        again.close()
    return pl.DataFrame(made, schema=_SCHEMA)


def _precision(run: IngestRun) -> str:
    return str(run.recipe["precision"])


def _draw(db: Database, n: int, sketcher: str | None, checkpoint: str | None) -> list[tuple[IngestRun, str]]:
    """Draw rows of committed runs, the same each time, in the runs' order."""
    with db.session() as session:
        wanted: dict[str, int] = {}
        if sketcher is not None:
            wanted["sketcher_id"] = check_ours(find(session, Sketcher, sketcher)).id
        if checkpoint is not None:
            wanted["checkpoint_id"] = find(session, Checkpoint, checkpoint).id
        query = select(IngestRun).filter_by(status="done", **wanted).where(IngestRun.n_sketched > 0)
        ours = IngestRun.sketcher.has(Sketcher.correction != IMPORTED)  # what was imported can't be computed again
        runs = list(session.scalars(query.where(ours)))
        for run in runs:  # what is read of them once the session is over
            _ = run.sketcher, run.checkpoint, run.source, run.variant
    rows = [
        (run, sample_id)
        for run in sorted(runs, key=lambda run: (run.checkpoint_id, run.fingerprint, _precision(run), run.id))
        for sample_id in sorted(
            db.vectors.read(sketch_table(run.fingerprint), ["sample_id"], where(ingest_run=run.id))["sample_id"]
        )
    ]
    if not rows:
        raise InputError("there are no sketches to verify", "`lark-store ingest` makes them")
    chosen = random.Random(0).sample(range(len(rows)), min(n, len(rows)))  # noqa: S311
    return [rows[i] for i in sorted(chosen)]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


class _Again:
    """Sketches one checkpoint's samples again, as a run's recipe says."""

    def __init__(self, db: Database, run: IngestRun, device: torch.device, precision: str) -> None:
        self.db = db
        folder = verify_files(run.checkpoint).folder
        wanted = _precision(run) if precision == "auto" else precision
        model = load_model(folder, device, wanted)
        self.limit = LIMITS[wanted] if wanted == _precision(run) else LIMITS["bfloat16"]
        placements = placements_of(run.sketcher, model)
        if fingerprint(run.sketcher, placements) != run.fingerprint:
            raise CheckpointError(
                f"checkpoint `{run.checkpoint.name}` has other parameters than when it was ingested",
                "has the transformers library changed? the SQL view `ingest_runs` has its version in `versions`",
            )
        chosen = chosen_of(run.sketcher, model)
        corrector, sha256 = corrector_for(db, run.sketcher, run.checkpoint, placements, device)
        if sha256 != run.recipe.get(RECIPE_KEY):
            raise CheckpointError(
                f"the factors of checkpoint `{run.checkpoint.name}` are not those of ingest run {run.id}",
                "restore them from a backup, or remove the checkpoint and ingest again",
            )
        sketcher = GradientSketcher(oporp_of(run.sketcher), placements, device, corrector)
        self.path = hook_path(model, chosen, sketcher, masked=is_masked(run.sketcher))
        self.tokenizer, self.context = load_tokenizer(folder), context_length(model)

    def compare(self, run: IngestRun, sample_id: str) -> dict[str, Any]:
        """Return a row of the report."""
        names = {"checkpoint": run.checkpoint.name, "source": run.source.name, "variant": run.variant.name}
        stored = next(self._stored(run, names | {"sample_id": sample_id}))
        row = {"sketcher": run.sketcher.name, **names, "sample_id": sample_id, "limit": self.limit}
        made = self._sketch(run, sample_id)
        if not isinstance(made, Sketch):
            return row | {"cosine": None, "norm_ratio": None, "ok": False}
        vector, new = np.asarray(stored["vector"], np.float64), made.vector.double().numpy()
        with np.errstate(all="ignore"):  # what is stored may be zero, or no number at all
            cosine = float(vector @ new / np.linalg.norm(vector) / np.linalg.norm(new))
            ratio = float(np.divide(made.grad_norm, stored["grad_norm"]))
        ok = cosine >= self.limit and abs(ratio - 1) < 50 * (1 - self.limit)
        return row | {"cosine": _finite(cosine), "norm_ratio": _finite(ratio), "ok": ok}

    def _stored(self, run: IngestRun, names: dict[str, str]) -> Iterator[dict[str, Any]]:
        filter_ = where(**names, ingest_run=run.id)
        for batch in self.db.vectors.scan(sketch_table(run.fingerprint), ["grad_norm", "vector"], filter_):
            yield from batch.to_pylist()

    def _sketch(self, run: IngestRun, sample_id: str) -> Sketch | UnusableSampleError:
        columns = ["sample_id", "prompt", "response", "text"]
        rows = self.db.vectors.read("samples", columns, where(source=run.source.name, sample_id=sample_id)).to_dicts()
        if not rows:
            return UnusableSampleError("its sample is gone")
        tokens = Renderer(run.variant, self.tokenizer, self.context).attempt(Sample(**rows[0]))
        return self.path.sketch([tokens])[0] if isinstance(tokens, Tokens) else tokens

    def close(self) -> None:
        """Free the model before the next is loaded."""
        self.path.close()
        del self.path
        gc.collect()
