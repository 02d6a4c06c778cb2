"""Estimate the time of a probing: a few batches run through a model built from the checkpoint's config."""

from __future__ import annotations

import time
from itertools import islice
from typing import TYPE_CHECKING

from lark_store.modeling.facts import force
from lark_store.modeling.greedy import end_ids
from lark_store.modeling.loading import (
    context_length,
    load_tokenizer,
    meta_model,
    resolve_dtype,
    unweighted_model,
)
from lark_store.modeling.rendering import Renderer
from lark_store.probing.units import fact_batches, max_tokens

if TYPE_CHECKING:
    import torch

    from lark_store.modeling.checkpoints import ModelFolder
    from lark_store.probing.units import Unit
    from lark_store.schema.database import Database
    from lark_store.specs import ProbeSpec

_BATCHES = 3


def seconds(db: Database, spec: ProbeSpec, unit: Unit, folder: ModelFolder, device: torch.device) -> float:
    """Return the estimated seconds of a unit's missing facts, without sampled answers.

    A sampled answer costs a forward pass per token only while it may still become the right one, which no estimate
    knows: nothing for a fact that is unknown to the model.
    """
    shape = meta_model(folder)
    dtype = resolve_dtype(shape, spec.compute.precision, device)
    model, tokenizer = unweighted_model(folder, dtype, device, spec.compute.attention), load_tokenizer(folder)
    renderer = Renderer(unit.variant, tokenizer, context_length(shape))
    ends = end_ids(model, tokenizer)
    found = (batch for batch, _ in fact_batches(db, unit, renderer, ends, max_tokens(spec, device)) if batch)
    elapsed, n_facts = 0.0, 0
    for number, batch in enumerate(islice(found, _BATCHES + 1)):
        started = time.perf_counter()
        force(model, batch)
        if number == 1:  # the first one warms up; its time counts if it is the only one
            elapsed, n_facts = 0.0, 0
        elapsed += time.perf_counter() - started
        n_facts += len(batch)
    return elapsed / max(n_facts, 1) * len(unit.pending)
