"""`verify`: recompute stored sketches, one sample at a time, from autograd's parameter gradients."""

from __future__ import annotations

import gc
import json
import math
import random
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from sqlalchemy import select

from lark_store.core.device import pick_device
from lark_store.core.names import IMPORTED
from lark_store.errors import CheckpointError, InputError
from lark_store.gradients.paths.batched import hook_path
from lark_store.gradients.paths.hooks import Sketch
from lark_store.gradients.sketch.accumulate import GradientSketcher
from lark_store.gradients.sketch.layout import (
    check_not_imported,
    fingerprint,
    is_masked,
    oporp_of,
    placements_of,
    sketched_parameters,
)
from lark_store.ingest.correction_store import RECIPE_KEY, corrector_for
from lark_store.modeling.checkpoints import verify as verify_files
from lark_store.modeling.encoded import UnusableSampleError
from lark_store.modeling.loading import check_precision, context_length, load_model, load_tokenizer
from lark_store.modeling.predicted_answers import AnswerPredictor
from lark_store.modeling.rendering import Renderer
from lark_store.modeling.sample import SAMPLE_COLUMNS, Sample
from lark_store.modeling.tokens import Tokens
from lark_store.results import Progress
from lark_store.schema.catalog import Checkpoint, IngestRun, Sketcher
from lark_store.schema.database import Database, find
from lark_store.schema.table_schemas import sketch_table
from lark_store.schema.vectors import where

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from lark_store.modeling.predicted_answers import AnswerPrompt
    from lark_store.results import OnProgress
    from lark_store.specs import Compute

# Minimum cosine. Alone and in a batch, a sample's sketches differ only by rounding. In half precision, the norm of a
# gradient with few targets changes by some per cent (2% seen on SmolLM2), its direction much less.
LIMITS = {"float32": 0.9999, "bfloat16": 0.999, "float16": 0.999, "auto": 0.999}
_SCHEMA = {
    "sketcher": pl.String,
    "checkpoint": pl.String,
    "source": pl.String,
    "variant": pl.String,
    "sample_id": pl.String,
    "cosine": pl.Float64,
    "norm_ratio": pl.Float64,
    "same_answer": pl.Boolean,
    "limit": pl.Float64,
    "ok": pl.Boolean,
}


def verify(
    db: Database,
    n: int,
    sketcher: str | None,
    checkpoint: str | None,
    compute: Compute,
    on_progress: OnProgress | None = None,
    *,
    seed: int = 0,
) -> pl.DataFrame:
    """Recompute and compare stored sketches, drawn by `seed`; see `Store.verify`."""
    if n < 1:
        raise InputError(f"`--sketches` must be at least 1, not {n}", "try `--sketches 20`")
    check_precision(compute.precision)
    torch_device = pick_device(compute.device)
    drawn = _draw(db, n, sketcher, checkpoint, seed)
    report: list[dict[str, Any]] = []
    for _, group in groupby(drawn, key=lambda row: (row[0].checkpoint_id, row[0].fingerprint, _precision(row[0]))):
        rows = list(group)
        resketcher = _Resketcher(db, rows[0][0], torch_device, compute)
        for run, sample_id in rows:
            report.append(resketcher.compare(run, sample_id))
            if on_progress:
                on_progress(Progress("recomputing sketches", len(report), len(drawn)))
        resketcher.close()
    return pl.DataFrame(report, schema=_SCHEMA)


def _precision(run: IngestRun) -> str:
    return str(run.recipe["precision"])


def _draw(db: Database, n: int, sketcher: str | None, checkpoint: str | None, seed: int) -> list[tuple[IngestRun, str]]:
    """Draw rows of committed runs by seed, in the order of runs."""
    with db.session() as session:
        filters: dict[str, int] = {}
        if sketcher is not None:
            filters["sketcher_id"] = check_not_imported(find(session, Sketcher, sketcher)).id
        if checkpoint is not None:
            filters["checkpoint_id"] = find(session, Checkpoint, checkpoint).id
        query = select(IngestRun).filter_by(status="done", **filters).where(IngestRun.n_sketched > 0)
        not_imported = IngestRun.sketcher.has(Sketcher.correction != IMPORTED)  # imported sketches can't be recomputed
        runs = list(session.scalars(query.where(not_imported)))
        for run in runs:  # load relationships before the session ends
            _ = run.sketcher, run.checkpoint, run.source, run.variant
    rows = [
        (run, sample_id)
        for run in sorted(runs, key=lambda run: (run.checkpoint_id, run.fingerprint, _precision(run), run.id))
        for sample_id in sorted(
            db.vectors.read(sketch_table(run.fingerprint), ["sample_id"], where(ingest_run=run.id))["sample_id"]
        )
    ]
    if not rows:
        raise InputError("there are no sketches to verify", "create some with `lark-store ingest`")
    numbers = random.Random(seed).sample(range(len(rows)), min(n, len(rows)))  # noqa: S311
    return [rows[i] for i in sorted(numbers)]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


class _Resketcher:
    """Recomputes sketches of one checkpoint by a run's recipe."""

    def __init__(self, db: Database, run: IngestRun, device: torch.device, compute: Compute) -> None:
        self.db = db
        folder = verify_files(run.checkpoint).model
        effective_precision = _precision(run) if compute.precision == "auto" else compute.precision
        recorded = str(run.recipe.get("attention", "auto"))
        attention = recorded if compute.attention == "auto" else compute.attention
        model = load_model(folder, device, effective_precision, attention)
        self.is_same_precision = effective_precision == _precision(run)
        self.limit = LIMITS[effective_precision if self.is_same_precision else "bfloat16"]
        placements = placements_of(run.sketcher, model)
        if fingerprint(run.sketcher, placements) != run.fingerprint:
            raise CheckpointError(
                f"checkpoint `{run.checkpoint.name}` has other parameters than when it was ingested",
                "compare the installed transformers version with `versions` in the SQL view `ingest_runs`",
            )
        parameters = sketched_parameters(run.sketcher, model)
        corrector, sha256 = corrector_for(db, run.sketcher, run.checkpoint, placements, device)
        if sha256 != run.recipe.get(RECIPE_KEY):
            raise CheckpointError(
                f"the factors of checkpoint `{run.checkpoint.name}` differ from those of ingest run {run.id}",
                "restore them from a backup, or remove the checkpoint and ingest again",
            )
        sketcher = GradientSketcher(oporp_of(run.sketcher), placements, device, corrector)
        self.path = hook_path(model, parameters, sketcher, masked=is_masked(run.sketcher))
        self.tokenizer, self.context = load_tokenizer(folder), context_length(model)
        self.predict = AnswerPredictor(model, self.tokenizer)

    def compare(self, run: IngestRun, sample_id: str) -> dict[str, Any]:
        """Recompute a sketch; return a row of the report."""
        names = {"checkpoint": run.checkpoint.name, "source": run.source.name, "variant": run.variant.name}
        stored = next(self._stored(run, names | {"sample_id": sample_id}))
        row = {"sketcher": run.sketcher.name, **names, "sample_id": sample_id, "limit": self.limit}
        answer = None if stored["answer_tokens"] is None else json.loads(stored["answer_tokens"])
        new, same_answer = self._sketch(run, sample_id, answer)
        if not isinstance(new, Sketch):
            return row | {"cosine": None, "norm_ratio": None, "same_answer": same_answer, "ok": False}
        vector, new_vector = np.asarray(stored["vector"], np.float64), new.vector.double().numpy()
        with np.errstate(all="ignore"):  # stored values may be zero or NaN
            cosine = float(vector @ new_vector / np.linalg.norm(vector) / np.linalg.norm(new_vector))
            ratio = float(np.divide(new.grad_norm, stored["grad_norm"]))
        ok = cosine >= self.limit and abs(ratio - 1) < 50 * (1 - self.limit)
        ok = ok and (same_answer is not False or not self.is_same_precision)
        return row | {"cosine": _finite(cosine), "norm_ratio": _finite(ratio), "same_answer": same_answer, "ok": ok}

    def _stored(self, run: IngestRun, names: dict[str, str]) -> Iterator[dict[str, Any]]:
        filter_ = where(**names, ingest_run=run.id)
        for batch in self.db.vectors.scan(
            sketch_table(run.fingerprint), ["grad_norm", "vector", "answer_tokens"], filter_
        ):
            yield from batch.to_pylist()

    def _sketch(
        self, run: IngestRun, sample_id: str, answer: list[int] | None
    ) -> tuple[Sketch | UnusableSampleError, bool | None]:
        """Sketch a sample with its stored answer; return also whether the checkpoint still predicts this answer."""
        rows = self.db.vectors.read(
            "samples", SAMPLE_COLUMNS, where(source=run.source.name, sample_id=sample_id)
        ).to_dicts()
        if not rows:
            return UnusableSampleError("the sample was removed"), None
        same: list[bool] = []

        def predict(prompt: AnswerPrompt) -> list[int]:
            same.append(self.predict(prompt) == answer)
            return answer or []

        tokens = Renderer(run.variant, self.tokenizer, self.context).attempt(Sample.of_row(rows[0]), predict)
        sketch = self.path.sketch([tokens])[0] if isinstance(tokens, Tokens) else tokens
        return sketch, next(iter(same), None)

    def close(self) -> None:
        """Free the model before the next one is loaded."""
        self.path.close()
        del self.path
        gc.collect()
