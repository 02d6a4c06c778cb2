"""Facts, prompts with an exact answer: whether a model gives it greedily, and how likely it is.

Greedy decoding needs no generation: the answer is greedy if each of its tokens, and then an end token, is the most
likely one after the tokens before (teacher forcing).

An answer must end where the variant's template ends it with a token that ends an answer, as in a chat. In other
variants, such as `raw`, a completion is correct if it begins with the answer.

Shape letters: A tokens of an answer, and its end if it must have one; V vocabulary.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lark_store.modeling.encoded import UnusableSampleError
from lark_store.modeling.losses import Batch, target_logits
from lark_store.modeling.tokens import Tokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lark_store.modeling.rendering import Renderer
    from lark_store.modeling.sample import Sample

NORMALISATION = "NFKD; runs of white space are one space; none at the ends"
_PARTIAL = "\ufffd"  # a character whose last bytes are missing


@dataclass(frozen=True)
class Fact:
    """A fact as tokens: `prompt` (T,) and `answer`; `ends` are the tokens that end it, none if it need not end."""

    sample_id: str
    prompt: list[int]
    answer: list[int]
    ends: tuple[int, ...]

    @property
    def n_tokens(self) -> int:
        """The number of tokens that the model must give, A."""
        return len(self.answer) + bool(self.ends)

    @property
    def forced(self) -> Tokens:
        """The fact as a sample whose targets are the answer and its end."""
        ids = [*self.prompt, *self.answer, *self.ends[:1]]
        return Tokens(ids, [False] * len(self.prompt) + [True] * self.n_tokens, "response")


def fact_of(renderer: Renderer, sample: Sample, ends: set[int]) -> Fact | UnusableSampleError:
    """Render a sample as a fact, or return why it can't be one. `ends` are the model's, from `greedy.end_ids`."""
    try:
        prompt, answer, after = renderer.around_answer(sample)
    except UnusableSampleError as error:
        return error
    if not prompt:
        return UnusableSampleError("the prompt has no tokens to answer to")
    must_end = bool(after) and after[0] in ends
    return Fact(sample.sample_id, prompt, answer, tuple(sorted(ends)) if must_end else ())


@dataclass(frozen=True)
class Forced:
    """A fact under teacher forcing.

    `logprob` is the log-probability of the answer and its end, in nats; `output` the greedy answer up to its first
    wrong token, None if the answer is greedy; `logits_AV` the logits that predict the answer and its end, float32.
    """

    is_correct: bool
    logprob: float
    output: list[int] | None
    logits_AV: torch.Tensor


def force(model: Any, facts: Sequence[Fact]) -> list[Forced]:
    """Run a batch of facts through the model in one forward pass."""
    with torch.no_grad():
        logits_NV = target_logits(model, Batch([fact.forced for fact in facts], model.device)).float()
    parts = torch.split(logits_NV, [fact.n_tokens for fact in facts])
    return [_forced(fact, logits_AV) for fact, logits_AV in zip(facts, parts, strict=True)]


def _forced(fact: Fact, logits_AV: torch.Tensor) -> Forced:
    logp_AV = logits_AV.double().log_softmax(dim=-1)
    greedy = logits_AV.argmax(dim=-1).tolist()
    accepted = [{token} for token in fact.answer] + ([set(fact.ends)] if fact.ends else [])
    wrong = next((n for n, tokens in enumerate(accepted) if greedy[n] not in tokens), None)
    terms = [logp_AV[n, sorted(tokens)].logsumexp(dim=0) for n, tokens in enumerate(accepted)]
    output = None if wrong is None else greedy[: wrong + 1]
    return Forced(wrong is None, float(torch.stack(terms).sum()), output, logits_AV)


def next_logits(model: Any, sequences: Sequence[list[int]]) -> torch.Tensor:
    """Return the logits of the next token after each sequence, (B, V) float32."""
    samples = [Tokens([*ids, 0], [False] * len(ids) + [True], "response") for ids in sequences]
    with torch.no_grad():
        return target_logits(model, Batch(samples, model.device)).float()


def normalised(text: str) -> str:
    r"""Return a text in the form in which answers are compared.

    >>> normalised("  New\tYork ")
    'New York'
    """
    return " ".join(unicodedata.normalize("NFKD", text).split())


def decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    """Return the text of tokens, special ones included."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def can_become(text: str, answer: str) -> bool:
    """Tell whether a text may go on to be the (normalised) answer; its last character may be incomplete."""
    return answer.startswith(normalised(text.rstrip(_PARTIAL)))
