"""Greedy decoding: the answer that a model gives to a prompt.

Only the model decides. Penalties, sampling and forced tokens of a checkpoint's `generation_config.json` don't apply.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lark_store.modeling.auto_models import text_config
from lark_store.modeling.encoded import UnusableSampleError, special_ids
from lark_store.modeling.loading import context_length, quiet

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_CHATML_END = "<|im_end|>"
_CONTENT = "lark-store's mark"


def greedy_answer(model: Any, tokenizer: Any, input_ids: Sequence[int], max_tokens: int) -> list[int]:
    """Return the most likely next tokens after a prompt, one at a time, without the end token.

    They are those of `model.generate(do_sample=False)` with the end tokens of `end_ids`.

    Parameters
    ----------
    input_ids
        The prompt's tokens, (T,).
    max_tokens
        The most tokens to generate; fewer where the model's context ends.

    Raises
    ------
    UnusableSampleError
        The prompt is empty, or fills the model's context.
    """
    import torch
    from transformers import GenerationConfig

    if not input_ids:
        raise UnusableSampleError("the prompt has no tokens to answer to")
    context = context_length(model)
    room = max_tokens if context is None else min(max_tokens, context - len(input_ids))
    if room < 1:
        raise UnusableSampleError(f"the prompt's {len(input_ids)} tokens fill the model's context ({context})")
    ends = end_ids(model, tokenizer)
    first_end = min(ends, default=None)
    greedy = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=room,
        eos_token_id=sorted(ends) or None,
        pad_token_id=first_end,
        use_cache=True,
    )
    prompt_1T = torch.tensor([list(input_ids)], device=model.device)
    with _only(greedy, model), quiet(), torch.no_grad():
        whole_1T = model.generate(prompt_1T, attention_mask=torch.ones_like(prompt_1T), generation_config=greedy)
    answer: list[int] = whole_1T[0, len(input_ids) :].tolist()
    return answer[:-1] if answer and answer[-1] in ends else answer


def end_ids(model: Any, tokenizer: Any) -> set[int]:
    """Return the ids of the tokens that end an answer.

    They are the ends of text of the model's configs and of the tokenizer, and the end of an assistant's turn.
    """
    ends = {tokenizer.eos_token_id, _end_of_turn(tokenizer)}
    for config in (model.generation_config, model.config, text_config(model)):
        configured = getattr(config, "eos_token_id", None)
        ends.update(configured if isinstance(configured, list) else [configured])
    return {number for number in ends if number is not None and number >= 0}


def _end_of_turn(tokenizer: Any) -> int | None:
    """Return the first special token that the chat template prints after an assistant's message.

    Without such a template it is ChatML's, if the tokenizer has it.
    """
    special = special_ids(tokenizer)
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _CONTENT}]
        try:
            tail = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(_CONTENT)[2]
        except Exception:  # noqa: BLE001  # template expressions raise any exception type
            tail = ""
        return next((i for i in tokenizer(tail, add_special_tokens=False)["input_ids"] if i in special), None)
    number: int | None = tokenizer.convert_tokens_to_ids(_CHATML_END)
    return number if number in special and number != tokenizer.unk_token_id else None


@contextmanager
def _only(config: Any, model: Any) -> Iterator[None]:
    """Make `config` the model's own, since `generate` takes the options that a config leaves open from there."""
    own = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own
