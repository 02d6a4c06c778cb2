"""The loss of queries before and after a sample, with one loaded model: by training on it, or in one context.

Shape letters: Q queries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from lark_store.errors import InputError
from lark_store.gradients.measured_influence import SingleSampleTrainer
from lark_store.modeling.in_context import joined, separator_of
from lark_store.modeling.losses import Batch, losses, sample_losses

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from numpy.typing import NDArray

    from lark_store.eif.material import Loaded, Material, Part
    from lark_store.modeling.tokens import Tokens
    from lark_store.specs import EifSpec

    Floats = NDArray[np.float64]


class Meter(Protocol):
    """Measures losses in nats per target token."""

    def before(self, queries: Sequence[Tokens]) -> Floats:
        """Return the loss of each query alone, (Q,)."""
        ...

    def after(self, sample: Tokens, queries: Sequence[Tokens]) -> Floats:
        """Return the loss of each query after the sample, (Q,)."""
        ...


class _Reader:
    """Reads the losses of queries alone."""

    def __init__(self, loaded: Loaded, spec: EifSpec) -> None:
        self._model, self._batch_tokens = loaded.model, spec.compute.batch_tokens

    def before(self, queries: Sequence[Tokens]) -> Floats:
        """Return the loss of each query alone, (Q,)."""
        values: Floats = losses(self._model, queries, self._batch_tokens).numpy()
        return values


class TrainingMeter(_Reader):
    """Trains on the sample at a learning rate, from the checkpoint each time."""

    def __init__(self, loaded: Loaded, spec: EifSpec, rate: float) -> None:
        super().__init__(loaded, spec)
        self._trainer = SingleSampleTrainer(
            loaded.model, _loss, optimizer=spec.optimizer, learning_rate=rate, steps=spec.steps
        )

    def after(self, sample: Tokens, queries: Sequence[Tokens]) -> Floats:
        """Return the loss of each query after training on the sample, (Q,)."""
        with self._trainer.trained_on(sample):
            return self.before(queries)


class ContextMeter(_Reader):
    """Puts the sample before the query, in one context."""

    def __init__(self, loaded: Loaded, spec: EifSpec, template: str) -> None:
        super().__init__(loaded, spec)
        self._separator, self._bos = separator_of(template, loaded.tokenizer), loaded.tokenizer.bos_token_id

    def after(self, sample: Tokens, queries: Sequence[Tokens]) -> Floats:
        """Return the loss of each query after the sample in one context, (Q,)."""
        return self.before([joined(sample, query, self._separator, self._bos) for query in queries])


def _loss(model: Any, samples: Sequence[Tokens]) -> torch.Tensor:
    return sample_losses(model, Batch(samples, model.device))


def check_fits(material: Material, loaded: Loaded) -> None:
    """Check that each sample and query of a matrix fit into the model's context together.

    Raises
    ------
    InputError
    """
    separator = len(separator_of(material.samples.variant.template, loaded.tokenizer))
    for part in material.parts:
        sample, n_sample = _longest(part.samples, material.samples)
        query, n_query = _longest(part.queries, material.queries)
        if loaded.context is not None and n_sample + separator + n_query > loaded.context:
            raise InputError(
                f"sample `{sample}` and query `{query}` have {n_sample + separator + n_query} tokens together, but the "
                f"model's context holds {loaded.context}",
                "use a variant with a smaller `--max-length`",
            )


def _longest(ids: list[str], texts: Any) -> tuple[str, int]:
    lengths = {each: len(texts.tokens(each).input_ids) for each in ids}
    longest = max(lengths, key=lengths.__getitem__)
    return longest, lengths[longest]


def rounding_noise(meter: Meter, material: Material, part: Part) -> float:
    """Return the rounding error of a loss: how much it differs when a query is computed alone, in nats.

    The root mean square over queries, at least the resolution of float32 at this loss.
    """
    tokens = [material.queries.measured_tokens(query) for query in part.queries]
    together = meter.before(tokens)
    alone = np.concatenate([meter.before([each]) for each in tokens])
    resolution = np.finfo(np.float32).eps * np.sqrt(np.mean(together**2))
    return float(max(resolution, np.sqrt(np.mean((together - alone) ** 2))))
