"""The model's own answer to a question: greedy, as a chat prompt in a format variant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lark_store.errors import InputError
from lark_store.modeling.encoded import UnusableSampleError
from lark_store.modeling.greedy import greedy_answer
from lark_store.modeling.losses import Batch, sample_losses
from lark_store.modeling.predicted_answers import AnswerSettings
from lark_store.modeling.sample import Sample
from lark_store.modeling.tokens import Tokens

if TYPE_CHECKING:
    from lark_store.modeling.rendering import Renderer

_PARTIAL = "\ufffd"  # a character whose last bytes are missing


@dataclass(frozen=True)
class ModelAnswer:
    """A model's answer: its text, its tokens (T,), the mean of their log-probabilities in nats, whether it ended."""

    text: str
    ids: list[int]
    log_probability: float
    is_complete: bool


def answer_question(model: Any, renderer: Renderer, question: str, max_tokens: int) -> ModelAnswer:
    """Answer a question greedily with at most `max_tokens` tokens.

    Raises
    ------
    InputError
        The question can't be rendered or is too long, or the answer is empty.
    """
    try:
        asked = renderer.prompt(Sample("question", prompt=question), AnswerSettings.greedy(1))
        prompt = asked.input_ids
        _check_length(renderer, len(prompt) + asked.n_cut, max_tokens)
        answer = greedy_answer(model, renderer.tokenizer, prompt, max_tokens)
    except UnusableSampleError as error:
        raise InputError(f"the question can't be asked: {error}", "shorten it, or use another variant") from error
    text = renderer.tokenizer.decode(answer, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    text = text.rstrip(_PARTIAL)
    if not text.strip():
        raise InputError("the model's answer is empty", "ask in another way, or another checkpoint")
    return ModelAnswer(text, answer, _log_probability(model, prompt, answer), len(answer) < max_tokens)


def _check_length(renderer: Renderer, n_prompt: int, max_tokens: int) -> None:
    if n_prompt + max_tokens > renderer.max_length:
        raise UnusableSampleError(
            f"its {n_prompt} tokens and {max_tokens} of an answer exceed the maximum length of "
            f"`{renderer.variant.name}`, {renderer.max_length}"
        )


def _log_probability(model: Any, prompt: list[int], answer: list[int]) -> float:
    import torch

    whole = Tokens([*prompt, *answer], [False] * len(prompt) + [True] * len(answer), "response")
    with torch.no_grad():
        return -float(sample_losses(model, Batch([whole], model.device))[0])
