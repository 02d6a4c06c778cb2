"""Cached matrices of slow baselines, on disk beside the journals.

The file name holds the hash of everything that determines the scores, so any run that would compute the same scores
reuses them.
"""

from __future__ import annotations

import json
from dataclasses import astuple
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np

from lark_store.core.atomic_files import writing
from lark_store.evaluate.baselines.preparation import Seconds
from lark_store.evaluate.progress_log import digest

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lark_store.evaluate.baselines.base import Baseline
    from lark_store.evaluate.baselines.context import BaselineContext, Matrix
    from lark_store.evaluate.dataset import Material, Text

_TUNED_ON = """
    SELECT s.source, s.sample_id, s.content_sha256 FROM samples s JOIN sources o ON o.name = s.source
    WHERE o.stage = 'finetune' ORDER BY ALL"""


def cached(material: Material, context: BaselineContext, baseline: Baseline) -> Matrix:
    """Return a baseline's scores, (Q, N): cached in the evaluation's folder with notes and times, or computed."""
    if context.folder is None or not baseline.is_slow:
        return baseline.scores(material, context)
    path = context.folder / f"scores-{digest(_identity(material, context))[:12]}.npz"
    if path.is_file():
        with np.load(path, allow_pickle=False) as archive:
            for note in json.loads(str(archive["notes"])):
                context.note(note)
            stored: Matrix = archive["matrix"]
            context.preparation.restore(Seconds(*archive["seconds"].tolist()))
            return stored
    notes: list[str] = []
    matrix = baseline.scores(material, context.with_note(notes.append))
    seconds = astuple(context.preparation.seconds(len(material.queries)))
    with writing(path) as draft, draft.open("wb") as file:
        np.savez(file, matrix=matrix, notes=np.array(json.dumps(notes)), seconds=np.array(seconds))
    for note in notes:
        context.note(note)
    return matrix


def _identity(material: Material, context: BaselineContext) -> dict[str, Any]:
    """Return everything that determines a baseline's scores: texts, weights, definitions, versions, the seed."""
    store = material.store
    weights = dict(store.sql("select name, [weights_sha256, tokenizer_sha256] from checkpoints").iter_rows())
    sketchers = store.sql("select name, parameters, exclude, min_ndim, correction from sketchers order by name")
    return {
        "score": context.spec,
        "holds": ["matrix", "notes", "seconds"],
        "seed": context.seed,
        "precision": context.precision,
        "weights": [weights[name] for name in (*context.checkpoints, context.queries_at) if name is not None],
        "queries": _texts(material.queries),
        "samples": _texts(material.samples),
        "variants": dict(store.sql("select name, sha256 from variants").iter_rows()),
        "tuned_on": digest(store.sql(_TUNED_ON).rows()),
        "sketchers": sketchers.rows(),
        "versions": {name: version(name) for name in ("lark-store", "torch", "transformers")},
    }


def _texts(texts: Iterable[Text]) -> str:
    rows = [(text.variant, text.source, text.id, *text.sample.content) for text in texts]
    return digest(rows)
