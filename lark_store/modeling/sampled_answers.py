"""Sample answers to a fact and count those that match.

Only samples that may still become the answer go on, and samples with the same tokens so far share one forward pass. So
the count has the distribution of whole answers sampled one by one, at a fraction of their cost: a fact that the model
does not know ends at its first token, whose distribution teacher forcing has computed already.

Each fact has a random generator of its own, so counts don't depend on the other facts or on their order.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lark_store.modeling.facts import Fact, Forced, can_become, decoded, next_logits, normalised

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MORE_TOKENS = 8  # a matching answer may have more tokens than the canonical one: twice as many, and these
_SEQUENCES_PER_PASS = 16
Prefix = tuple[int, ...]


class AnswerSampler:
    """Samples `n` answers per fact at a temperature with one model."""

    def __init__(self, model: Any, tokenizer: Any, *, n: int, temperature: float, seed: int) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.n, self.temperature, self.seed = n, temperature, seed

    def n_correct(self, fact: Fact, forced: Forced) -> int:
        """Return how many of the sampled answers match the fact's, both normalised."""
        rng = np.random.default_rng([self.seed, *hashlib.sha256(fact.sample_id.encode()).digest()])
        answer = normalised(decoded(self.tokenizer, fact.answer))
        alive: dict[Prefix, int] = {(): self.n}
        correct = 0
        for _ in range(2 * len(fact.answer) + _MORE_TOKENS):
            probabilities = self._next(fact, forced, list(alive))
            following: dict[Prefix, int] = {}
            for prefix, p_V in zip(sorted(alive), probabilities, strict=True):
                counts_V = rng.multinomial(alive[prefix], p_V)
                is_answer = normalised(decoded(self.tokenizer, prefix)) == answer
                for token in np.flatnonzero(counts_V).tolist():
                    n, longer = int(counts_V[token]), (*prefix, token)
                    if token in fact.ends:
                        correct += n if is_answer else 0
                    elif not fact.ends and normalised(decoded(self.tokenizer, longer)) == answer:
                        correct += n
                    elif can_become(decoded(self.tokenizer, longer), answer):
                        following[longer] = n
            alive = following
            if not alive:
                break
        return correct

    def _next(self, fact: Fact, forced: Forced, prefixes: list[Prefix]) -> list[NDArray[np.float64]]:
        """Return the probabilities of the token after each prefix, (V,), in the order of the sorted prefixes."""
        known = {tuple(fact.answer[:n]): n for n in range(len(forced.logits_AV))}
        rows = {prefix: forced.logits_AV[known[prefix]] for prefix in prefixes if prefix in known}
        others = sorted(prefix for prefix in prefixes if prefix not in known)
        for start in range(0, len(others), _SEQUENCES_PER_PASS):
            part = others[start : start + _SEQUENCES_PER_PASS]
            logits_BV = next_logits(self.model, [[*fact.prompt, *prefix] for prefix in part])
            rows |= dict(zip(part, logits_BV, strict=True))
        return [self._probabilities(rows[prefix]) for prefix in sorted(prefixes)]

    def _probabilities(self, logits_V: torch.Tensor) -> NDArray[np.float64]:
        p_V: NDArray[np.float64] = torch.softmax(logits_V.double() / self.temperature, dim=-1).cpu().numpy()
        p_V /= p_V.sum()
        return p_V
